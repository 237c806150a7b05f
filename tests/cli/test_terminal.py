"""What is printed, in any encoding, to readers that go away; and settings of the environment that make no sense."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import command

from cvmk.cli import _terminal, main
from cvmk.config.schema import ModelConfig, TokenizerConfig
from cvmk.formats import save_model_folder
from cvmk.nn import CVMTransformer
from cvmk.text.tokenizers import train_tokenizer

LATIN = {"PYTHONIOENCODING": "latin-1"}
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

CONFIG = """
run = {folder = "run", device = "cpu", threads = 1}
data = {train = {tsv = "pairs"}, valid = {tsv = "pairs"}, source_language = "en", target_language = "ja"}
tokenizer = {kind = "fallback", vocabulary = 300}
model = {d_model = 16, ffn = 16, heads = 2, encoder_layers = 1, decoder_layers = 1, max_length = 300}
training = {iterations = 2, max_tokens = 500}
validation = {bootstrap = 50}
"""
TEXT = ["朝に私は歌を買います。", "Größe — „schön“"]


def run(*arguments: str, place: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL")}
    return subprocess.run(arguments, env={**kept, "PYTHONSAFEPATH": "1", **environment}, capture_output=True, cwd=place)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose name is not ASCII, a text, and a configuration."""
    folder = tmp_path_factory.mktemp("terminal")
    tokenizer = train_tokenizer(TEXT * 20, TokenizerConfig(kind="fallback", vocabulary=300))
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, ffn=16, heads=2, encoder_layers=1, decoder_layers=1, max_length=64)
    save_model_folder(folder / "モデル", CVMTransformer(config, tokenizer.vocab_size), tokenizer, "", {"languages": {"source": "en", "target": "ja"}})
    (folder / "text").write_text("\n".join(TEXT) + "\n", encoding="utf-8")
    (folder / "pairs").write_text("".join(f"{text}\t{text}\n" for text in TEXT * 5), encoding="utf-8")
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    return folder


def test_training_ends_well(place: Path) -> None:
    """The report with its samples came to a UnicodeEncodeError after the whole run."""
    done = run(*command("train", "config.toml", "--restart"), place=place, **LATIN)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Sample translations:\n  ???????????\n" in done.stdout
    assert "朝に" in (place / "run" / "training_report.json").read_text(encoding="utf-8")
    done = run(*command("train", "config.toml", "--restart", "--json"), place=place, **ASCII)
    assert json.loads(done.stdout.decode("ascii"))["validation"]["samples"][0]["source"] == TEXT[0]


def test_validation_prints_names_and_notes(place: Path) -> None:
    options = ["validate", "モデル", "--source", "text", "--reference", "text", "--bootstrap", "50", "--metrics", "chrf"]
    done = run(*command(*options), place=place, **LATIN)
    assert done.returncode == 0 and b"???: 2 sentences" in done.stdout, done.stderr.decode()
    done = run(*command(*options, "--json"), place=place, **ASCII)
    assert json.loads(done.stdout.decode("ascii"))["model"] == "モデル"


def test_translations_are_data_and_stay_utf8(place: Path) -> None:
    plain = run(*command("translate", "モデル", "--input", "text"), place=place, **LATIN)
    lines = run(*command("translate", "モデル", "--input", "text", "--json"), place=place, **ASCII).stdout.decode("utf-8").splitlines()
    assert plain.returncode == 0 and [json.loads(line)["translation"] for line in lines] == plain.stdout.decode("utf-8").splitlines()


@pytest.mark.parametrize(("encoding", "name"), [(LATIN, "größe".encode("latin-1")), (ASCII, rb"gr\xf6\xdfe")], ids=["latin-1", "C"])
@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["train", "--explain-config"], 0), (["train", "größe.toml"], 5)])
def test_no_verb_fails_for_its_characters(place: Path, encoding: dict[str, str], name: bytes, arguments: list[str], code: int) -> None:
    done = run(*command(*arguments), place=place, **encoding)
    assert done.returncode == code
    assert done.stderr == (b"" if code == 0 else b"cvmk: cannot read " + name + b".toml: No such file or directory\n")


def test_arguments_and_names_where_the_locale_has_no_umlauts(place: Path) -> None:
    checked = run(*command("train", "config.toml", "--check", "--set", "run.folder=größe"), place=place, **ASCII)
    assert checked.returncode == 0, checked.stderr.decode()
    done = run(*command("train", "config.toml", "--set", "data.folder=größe"), place=place, **ASCII)
    assert done.returncode == 5
    assert done.stderr.decode() == "cvmk: the encoding of this locale (ascii) cannot spell 'gr\\xf6\\xdfe/pairs': set PYTHONUTF8=1, or a locale in UTF-8\n"


@pytest.mark.parametrize(("encoding", "errors", "printed"), [("ascii", "strict", b"?? \n"), ("cp1252", "xmlcharrefreplace", b"&#26085;&#26412; \n")])
def test_what_a_stream_does_with_its_characters(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, printed: bytes) -> None:
    """An explicit wish (PYTHONIOENCODING=cp1252:xmlcharrefreplace) is granted."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, newline="\n"))
    _terminal.prepare()
    _terminal.show("日本 ")
    assert sys.stdout.buffer.getvalue() == printed
    _terminal.show_json({"日本": "a\udce4b \U0001f600\ud800"})
    assert json.loads(sys.stdout.buffer.getvalue()[len(printed) :].decode("ascii"))["日本"].startswith("a")


@pytest.mark.parametrize("text", ["grün", "gr\udcc3\udcbcn"])
def test_as_text(text: str) -> None:
    assert _terminal.as_text(text) == "grün"
    assert _terminal.as_text("\udcfc \ud800").isprintable()


def piped(place: Path, arguments: list[str], **environment: str) -> tuple[int, str]:
    """The exit code of a verb and its standard error, where standard output has a reader that is gone at once."""
    line = " ".join(map(shlex.quote, command(*arguments)))
    done = run("bash", "-c", f"{line} | true; exit ${{PIPESTATUS[0]}}", place=place, **environment)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["doctor"], 0),
        (["--help"], 0),
        (["train", "--explain-config"], 0),
        (["translate", "モデル", "--input", "text"], 0),
        (["validate", "モデル", "--source", "text", "--reference", "text", "--bootstrap", "50", "--min-score", "chrf=101"], 3),
    ],
)
def test_a_reader_that_goes_away(place: Path, arguments: list[str], code: int) -> None:
    """A gate that fails said 0, because nobody read the report."""
    found, error = piped(place, arguments)
    assert found == code and error.count("\n") == (code == 3) and "Broken pipe" not in error


def test_a_reader_that_goes_away_from_an_unbuffered_stream(place: Path) -> None:
    assert piped(place, ["train", "--explain-config"], PYTHONUNBUFFERED="1") == (0, "")


def test_a_run_survives_the_reader_of_its_log(place: Path) -> None:
    """`cvmk train ... 2>&1 | head -1` ended the training with exit code 0 and without a model."""
    line = " ".join(map(shlex.quote, command("train", "config.toml", "--restart")))
    done = run("bash", "-c", f"{line} 2>&1 >/dev/null | true; exit ${{PIPESTATUS[0]}}", place=place)
    assert done.returncode == 0 and (place / "run" / "model" / "config.json").exists()
    done = run("bash", "-c", f"{' '.join(map(shlex.quote, command('train', 'nowhere.toml')))} 2>/dev/full", place=place)
    assert done.returncode == 5


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--explain-config"], ["train", "config.toml", "--check"]])
def test_a_full_disk_is_named_once(place: Path, arguments: list[str]) -> None:
    done = run("bash", "-c", " ".join(map(shlex.quote, command(*arguments))) + " > /dev/full", place=place)
    assert done.returncode == 5
    assert done.stderr == b"cvmk: cannot read or write standard output: No space left on device\n"


@pytest.mark.parametrize("arguments", [["train", "--explain-config"], ["train", "config.toml", "--check"], ["train", "config.toml", "--json"], ["bench"]])
def test_a_closed_standard_output_is_told_before_the_work(place: Path, arguments: list[str]) -> None:
    done = run("bash", "-c", " ".join(map(shlex.quote, command(*arguments))) + " >&-", place=place)
    assert done.returncode == 5
    assert done.stderr == b"cvmk: standard output is closed: open it\n"


VERBS = [
    ["doctor"],
    ["bench"],
    ["train", "--explain-config"],
    ["train", "config.toml", "--check"],
    ["train", "config.toml"],
    ["translate", "nowhere"],
    ["validate", "nowhere", "--source", "text", "--reference", "text"],
]


@pytest.mark.parametrize("arguments", VERBS)
@pytest.mark.parametrize("setting", ["CVMK_BACKEND", "CVMK_CPU_ISA", "CVMK_KEPT_MIB"])
def test_a_setting_without_sense_ends_every_verb(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], setting: str
) -> None:
    from cvmk import libraries

    if setting == "CVMK_CPU_ISA" and libraries.load("_native", "native")[0] is None:
        pytest.skip("without the native library nothing reads CVMK_CPU_ISA")
    monkeypatch.chdir(place)
    monkeypatch.setenv(setting, "fastest")
    assert main(arguments) == 2 or arguments == ["doctor"]  # whose report, in this process, was made when the setting had sense
    error = capsys.readouterr().err
    assert arguments == ["doctor"] or (error.startswith(f"cvmk: {setting} ") and "'fastest'" in error and error.count("\n") == 1)
