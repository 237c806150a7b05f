"""A student and a teacher of different vocabularies are refused, and both are named."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cvmk.distill import check_vocabularies
from cvmk.errors import ConfigError


@dataclass
class Pieces:
    kind: str = "bpe"
    pieces: list[str] = field(default_factory=lambda: ["<pad>", "<unk>", "a", "b"])
    fingerprint: str = "one"


def test_the_same() -> None:
    check_vocabularies(Pieces(), Pieces())


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (Pieces(pieces=["<pad>", "<unk>", "a", "c"], fingerprint="two"), ["id 3", "'b' in the student", "'c' in the teacher"]),
        (Pieces(pieces=["<pad>", "<unk>", "a"], fingerprint="two"), ["4 pieces, kind bpe", "3 pieces", "id 3", "no piece in the teacher"]),
        (Pieces(kind="unigram", fingerprint="two"), ["kind bpe", "kind unigram", "how text is cut"]),
    ],
)
def test_different(teacher: Pieces, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_vocabularies(Pieces(), teacher)
    for word in ["student", "teacher", *words]:
        assert word in str(caught.value)
