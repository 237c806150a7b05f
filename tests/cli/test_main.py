from __future__ import annotations

import subprocess
import sys

import pytest

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
