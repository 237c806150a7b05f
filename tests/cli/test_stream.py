"""`cvmk stream`: what it prints where, and how it ends."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import select
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from fake_server import FakeServer, InThread
from runs import command

from cvmk.cli import main
from cvmk.cli._live_input import Typed, from_text, pieces
from cvmk.config.schema import ModelConfig, TokenizerConfig
from cvmk.formats import save_model_folder
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer
from cvmk.text.tokenizers import train_tokenizer

TEXT = "We need a table. Thanks a lot.\nWhere is the station of the train. No idea at all\n"
WHOLE = "WE NEED A TABLE.\nTHANKS A LOT.\nWHERE IS THE STATION OF THE TRAIN.\nNO IDEA AT ALL\n"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with InThread() as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "model"
    tokenizer = train_tokenizer(["a man rides a horse", "two dogs"] * 20, TokenizerConfig(kind="fallback", vocabulary=280))
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, ffn=16, heads=2, encoder_layers=1, decoder_layers=1, max_length=32)
    save_model_folder(folder, CVMTransformer(config, tokenizer.vocab_size), tokenizer, "")
    return folder


def stream(*arguments: Any, text: str | bytes = "") -> tuple[int, str, str]:
    """Exit code and both outputs of a process whose standard input is a pipe."""
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run(command("stream", *arguments), input=data, capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# A pipe


def test_finished_sentences_a_line_each(server: FakeServer, tmp_path: Path) -> None:
    """However the text comes, and whatever breaks."""
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    for arguments, text in (
        (("--wpm", 0, "--file", tmp_path / "text"), ""), ((), TEXT), (("--file", "-", "--wpm", 30_000), TEXT),
    ):  # fmt: skip
        server.script.drop_behind_request = [3, 5]
        code, out, error = stream("--server", server.address, *arguments, text=text)
        assert (code, out, error) == (0, WHOLE, "")
    assert stream("--server", server.address, text="größer — “ok”.") == (0, "GRÖSSER — “OK”.\n", "")


def test_what_is_asked_for_reaches_the_server(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n", encoding="utf-8")
    arguments = ("--source", "en", "--target", "fr", "--model", "m", "--policy", "local-agreement", "--agreeing", 3, "--mask", 1, "--beam-size", 4)
    code, out, error = stream("--server", server.address, *arguments, "--priority", "low", "--partial-words", "--token-file", tmp_path / "token", text="one")
    opened = server.opened[0]
    assert (code, out, error) == (0, "ONE\n", "")
    assert (opened.source, opened.target, opened.model, opened.beam_size, opened.priority, opened.partial_words) == ("en", "fr", "m", 4, 1, True)
    assert (opened.policy.local_agreement.agreeing, opened.policy.local_agreement.mask) == (3, 1)
    assert {each["authorization"] for each in server.metadata} == {"Bearer s3cret"}


def test_records(server: FakeServer, model: Path) -> None:
    code, out, _ = stream("--server", server.address, "--json", text="one two. three")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [record["revision"] for record in records] == list(range(1, len(records) + 1))
    assert [record["committed"] for record in records if record["final"]] == ["ONE TWO.", "THREE"]
    here = [json.loads(line) for line in stream("--model-folder", model, "--json", text="a man rides a horse. Two")[1].splitlines()]
    assert set(here[0]) | {"queue_us", "decode_us"} == set(records[0]) and [each["segment"] for each in here if each["final"]] == [0, 1]


def test_a_model_in_this_process(model: Path) -> None:
    lines = ["a man rides", "two dogs", "a horse"]
    expected = "".join(f"{found.text}\n" for found in Translator(model).translate(lines))
    assert stream("--model-folder", model, "--file", "-", "--wpm", 60_000, text="\n".join(lines)) == (0, expected, "")


# How it ends


def test_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    code, out, error = stream("--server", address, text="one")
    assert (code, out, error.count("\n")) == (5, "", 1)
    assert error.startswith(f"cvmk: no server answers at {address} (") and "start one by `cvmk serve`" in error


def test_what_the_server_says(server: FakeServer) -> None:
    for status, expected in ((grpc.StatusCode.NOT_FOUND, 2), (grpc.StatusCode.INTERNAL, 5)):
        server.script.refusals = [(status, None)]
        code, out, error = stream("--server", server.address, text="one")
        assert (code, out, error) == (expected, "", f"cvmk: the server at {server.address} says: not now\n")


def test_what_came_before_a_fault_of_the_text_is_translated(server: FakeServer) -> None:
    code, out, error = stream("--server", server.address, text=b"one. tw\xc3\xb6 \xff three")
    assert (code, out, error) == (5, "ONE.\nTWÖ\n", "cvmk: standard input is not valid UTF-8 (byte 11): convert it to UTF-8\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "2"], "--k is no option of the policy retranslation: it belongs to --policy wait-k"),
        (["--policy", "wait-k", "--mask", "2"], "it belongs to --policy retranslation and --policy local-agreement"),
        (["--mask", "-1"], "mask is -1"),
        (["--wpm", "9"], "--wpm is the pace of a file"),
        (["--file", "x", "--wpm", "-9"], "--wpm is -9, and must be 0 or more"),
        (["--beam-size", "-1"], "--beam-size is -1"),
        (["--model-folder", "x", "--token-file", "y"], "--token-file is for a server, and --model-folder asks none"),
        (["--server", "nowhere", "--file", "{text}"], "'nowhere' is no address of a server"),
        (["--certificate", "x", "--file", "{text}"], "certificate and private_key go together"),
        (["--token-file", "{text}", "--file", "{text}"], "text has 2 words, and a token is one"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("two words", encoding="utf-8")
    assert main(["stream", *(each.format(text=tmp_path / "text") for each in arguments)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and message in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--file", "--token-file", "--authority"])
def test_a_file_that_is_missing(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("text", encoding="utf-8")
    assert main(["stream", "--file", str(tmp_path / "text"), option, str(tmp_path / "none")]) == 5
    assert str(tmp_path / "none") in capsys.readouterr().err


# A terminal


class Terminal:
    """`cvmk stream` on a terminal of its own."""

    def __init__(self, *arguments: Any) -> None:
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.settings = termios.tcgetattr(self._slave)
        environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
        kept = {name: value for name, value in environment.items() if name != "NO_COLOR"}

        own = "import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); signal.signal(signal.SIGINT, signal.SIG_DFL); "
        own += "os.execv(sys.argv[1], sys.argv[1:])"  # interrupts are ignored by what a shell has started in the background, and by its children
        self.process = subprocess.Popen(
            [sys.executable, "-c", own, *command("stream", *arguments)], stdin=self._slave, stdout=self._slave, stderr=self._slave, env=kept
        )
        self.seen = ""

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, seconds: float = 30) -> None:
        """Until the terminal was sent this text since the last call."""
        end, data = time.monotonic() + seconds, b""
        while text not in data.decode(errors="replace"):
            assert time.monotonic() < end and self.process.poll() is None, f"{text!r} was not shown: {data.decode(errors='replace')!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                data += os.read(self._master, 65536)
        self.seen += data.decode(errors="replace")

    def end(self) -> int:
        code = self.process.wait(30)
        while select.select([self._master], [], [], 0.1)[0]:
            self.seen += os.read(self._master, 65536).decode(errors="replace")
        assert termios.tcgetattr(self._slave) == self.settings
        os.close(self._master)
        os.close(self._slave)
        return code


def test_typing(server: FakeServer) -> None:
    terminal = Terminal("--server", server.address)
    terminal.press("we need ")  # before it is there
    terminal.wait_for("\x1b[2mWE NEED")  # dim
    terminal.press("an\x7f tabel\x7f\x7f")
    terminal.wait_for("we need a tab")
    terminal.press("\x1b[Dle. Now")  # an arrow is nothing
    terminal.wait_for("WE NEED A TABLE.")
    terminal.press("\x17Thanks")
    terminal.wait_for("Thanks")
    terminal.press("\x04")
    assert terminal.end() == 0
    assert "THANKS" in terminal.seen and "\x1b[2mWE NEED A TABLE" not in terminal.seen.replace("\x1b[2mWE NEED A TABLE\x1b", "")


def test_interrupting(server: FakeServer) -> None:
    terminal = Terminal("--server", server.address)
    terminal.wait_for("type, and end with Ctrl-D")
    terminal.press("one two ")
    terminal.wait_for("ONE TWO")
    terminal.press("\x03")
    assert terminal.end() == 130 and "cvmk: interrupted" in terminal.seen


def test_a_terminal_is_sent_no_commands_of_the_text(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("evil \x1b]0;title\x07 text.", encoding="utf-8")
    terminal = Terminal("--server", server.address, "--file", tmp_path / "text", "--wpm", "0")
    assert terminal.end() == 0 and "EVIL \ufffd]0;TITLE\ufffd TEXT." in terminal.seen and "\x1b]" not in terminal.seen


# Its parts


@pytest.mark.parametrize("text", [TEXT, "  two  words\n\n x", "你好。我们 ok 走", "", " \n", "one"])
def test_pieces_are_words_and_all_of_the_text(text: str) -> None:
    found = list(pieces(text))
    assert "".join(found) == text
    assert len([piece for piece in found if piece.strip()]) == {TEXT: 18, "  two  words\n\n x": 3, "你好。我们 ok 走": 6, "one": 1}.get(text, 0)


def test_pace() -> None:
    class Written:
        def __init__(self) -> None:
            self.times: list[float] = []

        async def append(self, text: str) -> None:
            self.times.append(asyncio.get_running_loop().time())

    written = Written()
    asyncio.run(from_text("a b c d e f", 3000.0)(written))
    assert len(written.times) == 6 and all(time - written.times[0] >= 0.02 * index - 0.015 for index, time in enumerate(written.times))


def test_keys() -> None:
    typed = Typed()
    typed.type("one twoo\x7f thr\x17")
    assert typed.text == "one two "
    typed.floor = 4
    typed.type("\x15\x7f\x08")
    assert typed.text == "one " and typed.translated(3) == "one" and (typed.text, typed.begin) == (" ", 3)
    typed.type("\x1b[A\tü\x00\r\x1bOPx\x04later")
    assert typed.text == "  ü\nx" and typed.ended
