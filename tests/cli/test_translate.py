from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from cvmk.cli import main
from cvmk.cli.translate import read_lines
from cvmk.config.schema import ModelConfig, TokenizerConfig
from cvmk.errors import DataError
from cvmk.formats import save_model_folder
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer
from cvmk.text.lines import one_line
from cvmk.text.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = train_tokenizer(["a man rides a horse", "two dogs"] * 20, TokenizerConfig(kind="fallback", vocabulary=280))
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, ffn=16, heads=2, encoder_layers=1, decoder_layers=1, max_length=32)
    save_model_folder(folder, CVMTransformer(config, tokenizer.vocab_size), tokenizer, "")
    return folder


def translate(model: Path, data: bytes, *options: str, capsys, tmp_path: Path) -> tuple[int, bytes, str]:
    (tmp_path / "in").write_bytes(data)
    code = main(["translate", str(model), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--max-length-b", "3", *options])
    out = (tmp_path / "out").read_bytes() if (tmp_path / "out").exists() else b""
    return code, out, capsys.readouterr().err


@pytest.fixture
def call(model: Path, capsys, tmp_path: Path):
    return lambda data, *options: translate(model, data, *options, capsys=capsys, tmp_path=tmp_path)


def expected(model: Path, texts: list[str], **options: object) -> list[str]:
    return [one_line(found.text) for found in Translator(model).translate(texts, max_length_b=3, **options)]


def test_lines_keep_order_count_and_ends(model: Path, call) -> None:
    data = "a man\n\n  \ntwo dogs\r\nride\x0bs a\x85\u2028horse\n\r\nthe end".encode()
    code, out, error = call(data)
    a, b, c, d = expected(model, ["a man", "two dogs", "ride\x0bs a\x85\u2028horse", "the end"])
    assert (code, error) == (0, "")
    assert out.decode() == f"{a}\n\n\n{b}\r\n{c}\n\r\n{d}"


@pytest.mark.parametrize(("data", "want"), [(b"", b""), (b"\n", b"\n"), (b"\n\n\n", b"\n\n\n"), (b"  ", b""), (b"\xef\xbb\xbf\n", b"\n")])
def test_hardly_any_input(call, data: bytes, want: bytes) -> None:
    assert call(data) == (0, want, "")


def test_n_best_and_json(model: Path, call) -> None:
    code, out, _ = call(b"a man\n\n", "--beam-size", "3", "--n-best", "2", "--length-penalty", "0.6")
    rows = [line.split("\t", 2) for line in out.decode().splitlines()]
    found = Translator(model).translate(["a man"], beam_size=3, n_best=2, length_penalty=0.6, max_length_b=3)[0]
    assert code == 0 and [row[0] for row in rows] == ["1", "1", "2"]
    assert [row[2] for row in rows[:2]] == [one_line(h.text) for h in found.hypotheses]
    assert [float(row[1]) for row in rows[:2]] == pytest.approx([h.score for h in found.hypotheses], abs=1e-5)
    _, out, _ = call(b"a man\n\n", "--beam-size", "3", "--n-best", "2", "--length-penalty", "0.6", "--json")
    records = [json.loads(line) for line in out.decode().split("\n")[:-1]]
    assert [record["line"] for record in records] == [1, 2] and records[0]["translation"] == one_line(found.text)
    assert [h["score"] for h in records[0]["hypotheses"]] == pytest.approx([h.score for h in found.hypotheses], abs=1e-5)
    assert records[1] == {"line": 2, "translation": "", "score": 0.0, "truncated": False, "hypotheses": [{"translation": "", "score": 0.0}]}


def test_alignments(model: Path, call) -> None:
    code, out, _ = call(b"a man\n\n", "--json", "--alignments", "--beam-size", "2", "--n-best", "2")
    records = [json.loads(line) for line in out.decode().splitlines()]
    translator = Translator(model)
    found = translator.translate(["a man"], beam_size=2, n_best=2, max_length_b=3, alignments=True)[0]
    names = translator.tokenizer.pieces
    assert code == 0 and records[0]["source_pieces"] == [*(names[piece] for piece in found.source), "</s>"] and list(found.source) == translator.encode("a man")
    for written, hypothesis in zip(records[0]["hypotheses"], found.hypotheses, strict=True):
        assert written["pieces"] == [names[piece] for piece in hypothesis.tokens] and hypothesis.tokens
        assert len(written["alignment"]) == len(hypothesis.tokens)
        for row, weights in zip(written["alignment"], hypothesis.alignment, strict=True):
            assert row == pytest.approx(list(weights), abs=1e-4) and len(row) == len(records[0]["source_pieces"]) and sum(row) == pytest.approx(1, abs=1e-2)
    assert records[1]["source_pieces"] == ["</s>"] and records[1]["hypotheses"] == [{"translation": "", "score": 0.0, "pieces": [], "alignment": []}]
    code, _, error = call(b"a man\n", "--alignments")
    assert code == 2 and "add --json" in error


def test_many_lines(model: Path, call) -> None:
    lines = ["a man" if index % 3 else "" for index in range(2500)]
    code, out, _ = call("\n".join(lines).encode())
    a = expected(model, ["a man"])[0]
    assert code == 0 and out.decode().split("\n") == [a if line else "" for line in lines]


def test_invalid_utf8_names_the_line_and_leaves_the_output(call, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("before")
    code, out, error = call(b"a man\ntwo \xff dogs\n")
    assert (code, out) == (5, b"before") and "in, line 2 is not valid UTF-8 (byte 5" in error and error.count("\n") == 1


def test_too_long_names_the_line_or_truncates(call) -> None:
    data = b"a man\n" * 1030 + b"x" * 400 + b"\n"
    code, out, error = call(data)
    assert (code, out) == (5, b"") and "line 1031 has" in error and "--on-long truncate" in error
    code, out, error = call(data, "--on-long", "truncate")
    assert code == 0 and out.count(b"\n") == 1031 and error.count("\n") == 1 and "line 1031" in error


@pytest.mark.parametrize(("options", "code", "named"), [
    (["--beam-size", "0"], 2, "beam_size"), (["--n-best", "2"], 2, "n_best"), (["--batch-tokens", "0"], 2, "batch-tokens"),
    (["--threads", "-1"], 2, "threads"),
    (["--device", "gpu"], 2, "device"), (["--compute-type", "int3"], 2, "compute_type"), (["--input", "nowhere"], 5, "nowhere"),
    (["--input", "."], 5, "read ."),
    (["--output", "/dev/null/x"], 5, "/dev/null"),
])  # fmt: skip
def test_bad_options(call, options: list[str], code: int, named: str) -> None:
    found, out, error = call(b"a man\n", *options)
    assert (found, out) == (code, b"") and named in error and error.count("\n") == 1 and error.startswith("cvmk: ")


def test_missing_model(call, capsys, tmp_path: Path) -> None:
    assert main(["translate", str(tmp_path / "nowhere")]) == 5
    assert "nowhere does not exist" in capsys.readouterr().err


def test_pipes_flow_line_by_line(model: Path) -> None:
    """A line that was written is translated before the input ends; a bad line comes after the translations before it."""
    code = "import sys; from cvmk.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "translate", str(model), "--max-length-b", "3", "--threads", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        a, b = (text.encode() for text in expected(model, ["a man", "two dogs"]))
        process.stdin.write(b"a man\n")
        process.stdin.flush()
        assert process.stdout.readline() == a + b"\n"
        process.stdin.write(b"two dogs\n\xff\n")
        process.stdin.close()
        assert process.stdout.read() == b + b"\n"
        assert b"standard input, line 3 is not valid UTF-8" in process.stderr.read()
        assert process.wait(60) == 5


@pytest.mark.parametrize("empty", ["model", "--input", "--output"])
def test_an_empty_name_is_told(model: Path, capsys, empty: str) -> None:
    arguments = ["translate", "" if empty == "model" else str(model), *(() if empty == "model" else (empty, ""))]
    assert main(arguments) == 5
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "empty: name" in told


def test_a_terminated_translation_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cvmk", "translate", str(model), "--output", "out", "--threads", "1"]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    assert running.stdin is not None
    running.stdin.write(b"a man\n")
    running.stdin.flush()
    while not any(tmp_path.iterdir()):
        assert running.poll() is None
        time.sleep(0.01)
    running.terminate()
    assert running.communicate()[1] == b"cvmk: terminated\n" and running.returncode == 143 and not any(tmp_path.iterdir())


def test_reader_splits_whatever_the_blocks() -> None:
    read, write = os.pipe()
    with open(read, "rb") as stream:
        for block in (b"\xef\xbb\xbfon", b"e\ntw", b"o\r", b"\nthree\n"):
            os.write(write, block)
        os.close(write)
        lines = [line for chunk, _ in read_lines(stream, "x", 2) for line in chunk]
    assert [(line.number, line.text, line.end) for line in lines] == [(1, "one", "\n"), (2, "two", "\r\n"), (3, "three", "\n")]
    sizes = [len(chunk) for chunk, _ in read_lines(io.BytesIO(b"a\n" * 10 + b"b"), "x", 4)]
    assert sum(sizes) == 11 and max(sizes) <= 4


def test_reader_stops_at_bad_bytes() -> None:
    (lines, trouble), *rest = read_lines(io.BytesIO(b"a\nb\n\xe4\nc\n"), "x", 9)
    assert [line.text for line in lines] == ["a", "b"] and isinstance(trouble, DataError) and not rest


@pytest.mark.parametrize(("closed", "name"), [("<&-", "standard input"), (">&-", "standard output")])
def test_a_closed_stream_is_named(model: Path, closed: str, name: str) -> None:
    arguments = [sys.executable, "-m", "cvmk", "translate", str(model)]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 5
    assert done.stderr.startswith(f"cvmk: {name} is closed") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("threads", ["-1", "999999999"])
def test_impossible_numbers_of_threads(call, threads: str) -> None:
    code, _, error = call(b"a man\n", "--threads", threads)
    assert code == 2 and "--threads" in error


# -- what is read and where it is written -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
def test_compressed_input_by_content(model: Path, call, compress) -> None:
    code, out, error = call(compress(b"a man\n\ntwo dogs") + compress(b"\nride\n"))
    a, b, c = expected(model, ["a man", "two dogs", "ride"])
    assert (code, out.decode(), error) == (0, f"{a}\n\n{b}\n{c}\n", "")
    code, out, error = call(compress(b"a man\n" * 99)[:-9])
    assert (code, out) == (5, f"{a}\n\n{b}\n{c}\n".encode()) and "in is a truncated or corrupt" in error and error.count("\n") == 1


def test_other_encodings_are_named(call) -> None:
    for encoding, name in (("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")):
        code, out, error = call("a man\ntwo dogs\n".encode(encoding))
        assert (code, out) == (5, b"") and f"in is {name} text: convert it to UTF-8" in error and error.count("\n") == 1


def test_byte_order_marks_in_the_middle(model: Path, call) -> None:
    """`cat a b`, where both begin with one, and a may lack its last line end."""
    code, out, _ = call("\ufeffa man\n\ufefftwo dogs\nri\ufeffde\n\ufeff\n".encode())
    a, b, c = expected(model, ["a man", "two dogs", "ride"])
    assert (code, out.decode()) == (0, f"{a}\n{b}\n{c}\n\n")
    assert expected(model, ["\ufeff a\ufeff man\ufeff"]) == [a]


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("output", ["fifo", "link", "/dev/null", "null"])
def test_special_outputs(model: Path, capsys, tmp_path: Path, output: str) -> None:
    (tmp_path / "in").write_bytes(b"a man\n")
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "null").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "fifo")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_bytes()))
    if output == "fifo":
        reader.start()
    kinds = {path: path.lstat().st_mode for path in (*(tmp_path / name for name in ("fifo", "link", "null")), Path("/dev/null"))}
    assert main(["translate", str(model), "--input", str(tmp_path / "in"), "--output", str(tmp_path / output), "--max-length-b", "3"]) == 0
    assert {path: path.lstat().st_mode for path in kinds} == kinds
    wanted = f"{expected(model, ['a man'])[0]}\n"
    if output == "fifo":
        reader.join(20)
        assert got == [wanted.encode()]
    assert (tmp_path / "real").read_text() == (wanted if output == "link" else "old")


def test_a_hyphen_is_a_standard_stream(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cvmk", "translate", str(model), "--max-length-b", "3", "--input", "-", "--output", "-"]
    done = subprocess.run(command, input=gzip.compress(b"a man\n"), capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.decode()) == (0, expected(model, ["a man"])[0] + "\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("beam_size", ["1", "2"])
def test_a_least_length_beyond_what_the_model_can_say(call, model: Path, beam_size: str) -> None:
    """It ended in a ValueError about the room of the state."""
    code, out, error = call(b"a man\ntwo dogs\n", "--min-length", "99999", "--beam-size", beam_size, "--json")
    assert (code, error) == (0, "") and out.count(b"\n") == 2
