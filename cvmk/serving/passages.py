"""Where the sentences of a text are that is there as a whole, and what stands between them."""

from __future__ import annotations

from typing import NamedTuple

from cvmk.streaming import Sentences

_WINDOW = 2000
"""Characters of a sentence; a longer one is cut behind a clause."""
_WIDE = "。！？｡"
_NARROW = ".!?…"


class Piece(NamedTuple):
    """Characters [begin, end) of a text: a sentence, without white space around it, or what stands between two."""

    begin: int
    end: int
    is_sentence: bool


def pieces(text: str, sentences: Sentences) -> list[Piece]:
    """A text cut up, in its order and without gaps. What holds no letter is no sentence: no model says it better."""
    found: list[Piece] = []
    begin = kept = 0  # from `kept` to `begin` nothing is to be translated
    while begin < len(text):
        window = text[begin : begin + _WINDOW]
        end, after = sentences.end(window) or _whole_or_clause(window, begin + len(window) == len(text), sentences)
        sentence = window[:end].strip()
        if any(map(str.isalpha, sentence)):
            first = begin + window.index(sentence)
            found += [Piece(kept, first, False), Piece(first, first + len(sentence), True)]
            kept = first + len(sentence)
        begin += after
    return [piece for piece in (*found, Piece(kept, len(text), False)) if piece.begin < piece.end]


def _whole_or_clause(window: str, is_last: bool, sentences: Sentences) -> tuple[int, int]:
    end = len(window) if is_last else sentences.clause(window, len(window))
    return end, end


def space_between(source: str, translation: str) -> str:
    """What goes between a translated sentence and the next where nothing stood between the two: a space behind a full stop that was none wide before."""
    return " " if source[-1:] in _WIDE and translation[-1:] in _NARROW and source and translation else ""
