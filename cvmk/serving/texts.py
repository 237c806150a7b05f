"""Whole texts, cut into what a model translates at a time, and put together again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cvmk.inference.translator import Translation, Translator
from cvmk.streaming import Retranslation, Sentences, StreamCore, Update
from cvmk.validation.scripts import unspaced_language

_LINE = re.compile(r"[^\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")
_NOTHING = Translation("", 0.0, [])


@dataclass(frozen=True)
class Cut:
    """A text: `sentences`, and `gaps`, one before each of them and one behind the last."""

    sentences: list[str]
    gaps: list[str]

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
    sentences, gaps, last = list[str](), list[str](), 0
    for line in _LINE.finditer(text):
        for begin, end in _places(line.group(), translator, language):
            whole = line.group()[begin:end]
            sentence = whole.strip()
            if not sentence:
                continue
            first = line.start() + begin + len(whole) - len(whole.lstrip())
            gaps.append(text[last:first])
            sentences.append(sentence)
            last = first + len(sentence)
    return Cut(sentences, [*gaps, text[last:]])


def _places(line: str, translator: Translator, language: str) -> list[tuple[int, int]]:
    core = StreamCore(lambda: translator, Retranslation(), Sentences(language))
    core.append(line)
    steps, answer, found = core.advance(end=True), None, list[tuple[int, int]]()
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            return found
        answer = None if isinstance(step, Update) else _NOTHING  # only where it is cut is asked for
        if isinstance(step, Update):
            found.append((step.begin, step.source_read))
