"""Where two sentences differ, word by word; and which sentences are worth showing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, NamedTuple

from cvmk.report.evaluations import Evaluation
from cvmk.validation.metrics import measure
from cvmk.validation.scripts import written_words

LONGEST = 400
"""Characters of a sentence that are shown."""


class Part(NamedTuple):
    """Neighbouring words of a sentence, with the space behind them."""

    text: str
    extra: bool = False
    """They are not in the reference."""
    missing: bool = False
    """They are the reference's, and not in the sentence."""
    changed: bool = False
    """They are not what the baseline says."""


@dataclass(frozen=True)
class Translation:
    system: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """A sentence of a set, and what the systems made of it."""

    set: str
    line: int
    """Counted from 1."""
    source: str
    reference: str
    translations: list[Translation] = field(default_factory=list)
    why: str = ""
    """Why it is shown."""


def words(text: str) -> list[str]:
    """What is compared: words as they are written, and characters where a script has no spaces, each with the space behind it."""
    places = written_words(text)
    ends = [begin for begin, _ in places[1:]] + [len(text)]
    return [text[begin:end] + (" " if end < after else "") for (begin, end), after in zip(places, ends, strict=False)]


def marked(text: str, reference: str, baseline: str | None = None) -> tuple[Part, ...]:
    """A translation with what it has beyond the reference, what it lacks, and what the baseline says otherwise. Case and punctuation count."""
    ours, theirs = words(text), words(reference)
    before = None if baseline is None else _common(ours, words(baseline))
    space = " " if any(word.endswith(" ") for word in (*ours, *theirs)) else ""
    found: list[Part] = []
    for kind, start, end, from_, to in _matcher(ours, theirs).get_opcodes():
        found += [Part(ours[at], extra=kind != "equal", changed=before is not None and at not in before) for at in range(start, end)]
        if kind in ("insert", "replace"):
            if found:  # the last word of a sentence has no space behind it
                found[-1] = found[-1]._replace(text=found[-1].text.rstrip() + space)
            found.append(Part("".join(theirs[from_:to]).rstrip() + space, missing=True))
    return tuple(Part("".join(part.text for part in group), *kinds) for kinds, group in groupby(found, lambda part: part[1:]))


def _matcher(ours: Sequence[str], theirs: Sequence[str]) -> SequenceMatcher[str]:
    return SequenceMatcher(None, [word.rstrip() for word in ours], [word.rstrip() for word in theirs], autojunk=False)


def _common(ours: Sequence[str], theirs: Sequence[str]) -> set[int]:
    """The places of our words that stand in theirs too, in their order."""
    return {at for block in _matcher(ours, theirs).get_matching_blocks() for at in range(block.a, block.a + block.size)}


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def chosen(evaluation: Evaluation, name: str, systems: Sequence[tuple[str, Sequence[str]]], teacher: str | None, most: int) -> list[Sample]:
    """The samples of a set. `systems` are names and translations, the baseline first where there is another one.

    With one system they are the first sentences and those that are least like their references; with several, those where the last one gains
    or loses most against the baseline, by the chrF of a sentence.
    """
    if not systems or most < 1:
        return []
    likeness = [_likeness(translations, evaluation.references) for _, translations in systems]
    count = len(evaluation.sources)
    picked: dict[int, str] = {}
    if len(systems) > 1:
        gains = [max((ours[at] - likeness[0][at] for ours in likeness[1:]), key=abs) for at in range(count)]
        order = sorted(range(count), key=lambda at: (gains[at], at))
        for losing, winning in zip(order[: most // 2], reversed(order[-(most // 2) :]), strict=False):
            if gains[winning] > 0:
                picked.setdefault(winning, f"gains most against {systems[0][0]}")
            if gains[losing] < 0:
                picked.setdefault(losing, f"loses most against {systems[0][0]}")
    else:
        order = sorted((at for at in range(count) if systems[0][1][at] != evaluation.references[at]), key=lambda at: (likeness[0][at], at))
        picked |= dict.fromkeys(order[:most // 2], "least like its reference")
    for at in range(count):
        if len(picked) >= most:
            break
        picked.setdefault(at, "one of the first")
    return [_sample(evaluation, name, at, why, systems, teacher) for at, why in sorted(picked.items(), key=lambda item: _ORDER.index(item[1][:5]))]


_ORDER = ("gains", "loses", "least", "one o")


def _sample(evaluation: Evaluation, name: str, at: int, why: str, systems: Sequence[tuple[str, Sequence[str]]], teacher: str | None) -> Sample:
    reference = shortened(evaluation.references[at])
    first = shortened(systems[0][1][at])
    translations = [Translation(systems[0][0], marked(first, reference))]
    translations += [Translation(system, marked(shortened(texts[at]), reference, first)) for system, texts in systems[1:]]
    if teacher is not None and evaluation.teacher is not None:
        translations.append(Translation(teacher, marked(shortened(evaluation.teacher[at]), reference)))
    return Sample(name, at + 1, shortened(evaluation.sources[at]), reference, translations, why)


def recorded_samples(system: str, name: str, result: Mapping[str, Any]) -> list[Sample]:
    """The first sentences of a set, as a recorded validation has them."""
    found = []
    samples = result.get("samples")
    for line, one in enumerate(samples if isinstance(samples, list) else [], 1):
        texts = [one.get(key) for key in ("source", "reference", "hypothesis")] if isinstance(one, dict) else []
        kept = [shortened(text) for text in texts if isinstance(text, str)]
        if len(kept) == 3:
            source, reference, hypothesis = kept
            found.append(Sample(name, line, source, reference, [Translation(system, marked(hypothesis, reference))], "one of the first"))
    return found


def _likeness(translations: Sequence[str], references: Sequence[str]) -> list[float]:
    measurement = measure("chrf", translations, references)
    return [float(score) for score in measurement.combine(measurement.statistics)]
