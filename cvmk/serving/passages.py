"""Where the sentences of a text are that is there as a whole, and what stands between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cvmk.inference.translator import Translator
from cvmk.streaming import Sentences
from cvmk.streaming.core import room_of, window_of
from cvmk.text.lines import trimmed
from cvmk.validation.scripts import unspaced_language

_WINDOW = 2000
"""Characters of a sentence where no model says how many it reads."""
_WIDE = "。！？｡"
_NARROW = ".!?…"
_LINE = re.compile(r"[^\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")


class Piece(NamedTuple):
    """Characters [begin, end) of a text: a sentence, without white space around it, or what stands between two."""

    begin: int
    end: int
    is_sentence: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """A text: the pieces of its sentences for a model, and `gaps`, one before each of them and one behind the last. In tuples: a garbage collection passes
    over those."""

    sources: tuple[tuple[int, ...], ...]
    gaps: tuple[str, ...]

    def joined(self, translations: Sequence[str]) -> str:
        """The text with the translations in the places of its sentences. Where two sentences have nothing between them, as in Chinese, a language that
        is written with spaces gets one."""
        spaced = unspaced_language(translations) is None
        parts = [self.gaps[0]]
        for index, (translation, gap) in enumerate(zip(translations, self.gaps[1:], strict=True)):
            inside = index + 1 < len(translations)
            parts += [translation, gap or (" " if spaced and inside and translation else "")]
        return "".join(parts)


def cut(text: str, translator: Translator, language: str) -> Cut:
    """Sentences as a stream would find them, each within a line and no longer than the model reads."""
    encoded: dict[str, list[int]] = {}
    room = room_of(translator)

    def fits(part: str) -> bool:
        encoded[part] = pieces = translator.tokenizer.encode(part)
        return len(pieces) <= room

    rules = Sentences(language)
    places = [
        (line.start() + begin, line.start() + end) for line in _LINE.finditer(text) for begin, end in _sentences(line.group(), rules, window_of(room), fits)
    ]
    sources = []
    for begin, end in [*places]:
        one = text[begin:end]
        source = encoded[one] if one in encoded and trimmed(one) == one else translator.encode(one)
        if source:
            sources.append(source)
        else:  # as a byte order mark, which is nothing to a model: it stays as it is
            places.remove((begin, end))
    ends = [0, *(end for _, end in places)]
    begins = [*(begin for begin, _ in places), len(text)]
    return Cut(tuple(map(tuple, sources)), tuple(text[end:begin] for end, begin in zip(ends, begins, strict=True)))


def pieces(text: str, sentences: Sentences) -> list[Piece]:
    """A text cut up, in its order and without gaps. What holds no letter is no sentence: no model says it better."""
    found: list[Piece] = []
    kept = 0  # from here to the next sentence nothing is to be translated
    for begin, end in _sentences(text, sentences):
        if any(map(str.isalpha, text[begin:end])):
            found += [Piece(kept, begin, False), Piece(begin, end, True)]
            kept = end
    return [piece for piece in (*found, Piece(kept, len(text), False)) if piece.begin < piece.end]


def space_between(source: str, translation: str) -> str:
    """What goes between a translated sentence and the next where nothing stood between the two: a space behind a full stop that was none wide before."""
    return " " if source[-1:] in _WIDE and translation[-1:] in _NARROW and source and translation else ""


def _sentences(text: str, rules: Sentences, longest: int = _WINDOW, fits: Callable[[str], bool] = lambda part: True) -> Iterator[tuple[int, int]]:
    """Characters [begin, end) of each sentence, without white space around it."""
    begin = 0
    while begin < len(text):
        window = text[begin : begin + longest]
        end, after = rules.end_within(window, begin + len(window) == len(text), fits) or (len(window), len(window))
        if sentence := window[:end].strip():
            first = begin + window.index(sentence)
            yield first, first + len(sentence)
        begin += after
