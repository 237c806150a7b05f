"""Names that people have written down: configuration keys, and verbs with their arguments. A new one is one line more in its list; one that is
gone is a failure, for files and scripts that name it exist."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cvmk.cli import _parser
from cvmk.config.schema import TrainConfig
from cvmk.config.section import walk

LISTS = Path(__file__).resolve().parent / "resources"


def configuration_keys() -> list[str]:
    return [name for name, _, table in walk(TrainConfig) if table is None]


def command_line() -> list[str]:
    """"VERB --option" and "VERB POSITIONAL" of every verb, as its help shows them."""
    (verbs,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    found = []
    for verb, parser in verbs.choices.items():
        for action in parser._actions:
            names = action.option_strings or [action.metavar or action.dest]
            found += [f"{verb} {name}" for name in names if name not in ("-h", "--help")]
    return found


def judged(found: list[str], frozen: list[str], file: str) -> None:
    """Fails with a sentence a name."""
    lost = [f"{name!r} is gone, but files and scripts name it: bring it back, if only to warn of what replaces it" for name in frozen if name not in found]
    new = [f"{name!r} is new: add the line to {file}, and from then on it stays" for name in found if name not in frozen]
    assert not lost + new, "; ".join(lost + new)


@pytest.mark.parametrize(("file", "names"), [("configuration_keys.txt", configuration_keys), ("command_line.txt", command_line)])
def test_no_name_is_lost(file: str, names: object):
    frozen = (LISTS / file).read_text(encoding="utf-8").splitlines()
    assert callable(names) and frozen == sorted(set(frozen)), f"tests/resources/{file} must be sorted, each line once"
    judged(names(), frozen, f"tests/resources/{file}")


def test_a_lost_name_and_a_new_one_are_told_by_a_sentence():
    with pytest.raises(AssertionError, match=r"'run\.seed' is gone.*'run\.new' is new: add the line to tests/x\.txt"):
        judged(["run.folder", "run.new"], ["run.folder", "run.seed"], "tests/x.txt")
