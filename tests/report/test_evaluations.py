"""The file of what a model was scored on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvmk.errors import DataError
from cvmk.report import evaluations
from cvmk.report.evaluations import read_evaluation, write_evaluation

TEXTS = ["plain", 'quotes " and \\', "line\u2028separator", "surrogate \ud800", "", "桌子"]


@pytest.mark.parametrize("teacher", [None, TEXTS[::-1]])
def test_what_is_written_is_read(tmp_path: Path, teacher: list[str] | None) -> None:
    path = tmp_path / "folder" / "validation.jsonl"
    write_evaluation(path, TEXTS, TEXTS, TEXTS, teacher)
    found = read_evaluation(path)
    assert found.sources == found.references == found.hypotheses == tuple(TEXTS) and found.sentences == len(TEXTS)
    assert found.teacher == (None if teacher is None else tuple(teacher))


def test_of_a_large_set_the_first_sentences_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "MOST", 3)
    write_evaluation(tmp_path / "e.jsonl", TEXTS, TEXTS, TEXTS)
    found = read_evaluation(tmp_path / "e.jsonl")
    assert found.sources == tuple(TEXTS[:3]) and found.sentences == len(TEXTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-40], "cut off"),
        (lambda data: b"", "corrupt"),
        (lambda data: data.replace(b'"version": 1', b'"version": 9'), "version 9"),
        (lambda data: data.replace(b'"hypothesis"', b'"hypotheses"'), "corrupt"),
        (lambda data: data.replace(b'"plain"', b"7"), "corrupt"),
        (lambda data: b"[1, 2]\n" + data, "corrupt"),
        (lambda data: b"\xff\n" + data, "corrupt"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "e.jsonl"
    write_evaluation(path, TEXTS, TEXTS, TEXTS)
    assert callable(change)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        read_evaluation(path)
    assert str(path) in str(error.value)
