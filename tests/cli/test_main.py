from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from runs import command

from cvmk.cli import main


def test_help_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for verb in ("train", "translate", "validate", "doctor"):
        assert verb in text


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "--nonsense"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_deliberate_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert main(["train", "nowhere.toml"]) == 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("cvmk: ") for line in lines)


def test_start_is_light() -> None:
    code = "import sys, cvmk.cli; cvmk.cli._parser(); print('torch' in sys.modules, 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


def test_a_full_standard_output_is_named() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("train", "--explain-config"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert done.stderr == "cvmk: cannot read or write standard output: No space left on device\n"


@pytest.mark.parametrize("verb", [["doctor"], ["doctor", "--json"], ["validate", "m", "--source", "s", "--reference", "r"], ["translate", "m"]])
def test_a_closed_standard_output_is_named(verb: list[str]) -> None:
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command(*verb)], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert done.stderr.startswith("cvmk: standard output is closed: open it")


@pytest.mark.parametrize("tag", ["hsb", "ceb", "yue", "zh-Hant", "pt-BR", "pt_br", "deu", "sr-Latn-RS"])
def test_a_check_takes_any_language(tmp_path: Path, capsys: pytest.CaptureFixture[str], tag: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[data]\ntrain = {{ tsv = "a" }}\nvalid = {{ tsv = "a" }}\ntarget_language = "{tag}"\n')
    assert main(["train", str(config), "--check"]) == 0
    assert "valid configuration" in capsys.readouterr().out


def test_a_check_knows_the_languages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[data]\nembedded = "phrasebook"\nsource_language = "xx"\n')
    assert main(["train", str(config), "--check"]) == 2
    assert "data.source_language" in capsys.readouterr().err


def test_nothing_is_opened_in_place_of_a_closed_stream(tmp_path: Path) -> None:
    """With descriptors 1 and 2 closed the next file would get one of them, and what is printed would go into it."""
    code = "import os, sys; from cvmk.cli import main; code = main(['train', 'nowhere.toml']); sys.exit(code if os.open('file', os.O_CREAT) > 2 else 99)"
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code], cwd=tmp_path)
    assert done.returncode == 5


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_too_little_memory_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr("cvmk.cli.doctor.run", fail)
    assert main(["doctor"]) == 5
    assert capsys.readouterr().err.startswith("cvmk: not enough memory")


def test_other_runtime_errors_are_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("cvmk.cli.doctor.run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])
