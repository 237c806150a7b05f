"""Whether a student and its teacher speak in the same pieces: logits can be compared only entry by entry."""

from __future__ import annotations

from itertools import zip_longest
from typing import Protocol

from cvmk.errors import ConfigError


class Vocabulary(Protocol):
    """What is read of a `cvmk.text` tokenizer."""

    kind: str

    @property
    def pieces(self) -> list[str]: ...

    @property
    def fingerprint(self) -> str: ...


def check_vocabularies(student: Vocabulary, teacher: Vocabulary) -> None:
    """ConfigError unless both tokenizers give the same ids to every text; it names both and the first piece that differs."""
    if student.fingerprint == teacher.fingerprint:
        return
    ours, theirs = (f"{len(tokenizer.pieces)} pieces, kind {tokenizer.kind}" for tokenizer in (student, teacher))
    difference = "the pieces are the same, but not how text is cut into them"
    for index, (mine, other) in enumerate(zip_longest(student.pieces, teacher.pieces)):
        if mine != other:
            named = ["no piece" if piece is None else repr(piece) for piece in (mine, other)]
            difference = f"the first difference is id {index}, {named[0]} in the student and {named[1]} in the teacher"
            break
    raise ConfigError(
        f"the student's vocabulary ({ours}) is not the teacher's ({theirs}): {difference}; set tokenizer.path to the teacher's folder or train the teacher anew"
    )
