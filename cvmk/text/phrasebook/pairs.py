"""English-German phrasebook sentences made from templates and a lexicon, so that a first run needs no data.

The mapping from source to target is a function. The held-out sentences are new combinations of words that the training
pairs have: no sentence of the validation and test sets occurs in training or in the other set, on either side.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass

from cvmk.errors import ConfigError
from cvmk.text.corpus import CorpusReport, ParallelCorpus
from cvmk.text.phrasebook import clauses, daily, travel
from cvmk.text.phrasebook.choice import Choice, Template
from cvmk.text.phrasebook.grammar import Both, sentence
from cvmk.text.phrasebook.numbers import german

TEMPLATES: tuple[Template, ...] = (*clauses.TEMPLATES, *daily.TEMPLATES, *travel.TEMPLATES)
HELD_OUT = 500  # pairs each of validation and test
CANDIDATES = 3 * HELD_OUT
LARGEST = 200_000
SHORTEST, LONGEST = 3, 16  # words of either side
SEEN = 3  # training pairs that have each word of a held-out pair, on its side


@dataclass
class Phrasebook:
    """Training, validation and test pairs."""

    train: ParallelCorpus
    valid: ParallelCorpus
    test: ParallelCorpus


def phrasebook(pairs: int = 20_000, seed: int = 0) -> Phrasebook:
    """`pairs` distinct training pairs and 500 + 500 held-out ones; the same arguments give the same sentences.

    Raises ConfigError for a number of pairs outside 1000..200000.
    """
    if not 1000 <= pairs <= LARGEST:
        raise ConfigError(f"data.phrasebook_pairs = {pairs} is outside the possible range: set it to 1000 to {LARGEST}")
    stream = _distinct(seed)
    candidates = list(itertools.islice(stream, CANDIDATES))
    reserved = {target for _, target in candidates}
    train = list(itertools.islice((pair for pair in stream if pair[1] not in reserved), pairs))
    seen = [Counter(word for text in side for word in set(_words(text))) for side in zip(*train, strict=True)]
    compounds = {german(value) for value in range(10_000)}
    different = list({target: (source, target) for source, target in candidates}.values())
    # Small training sets lack some words: sentences with such words are held out only where there are too few others.
    held_out = sorted(different, key=lambda pair: not all(_known(text, counts, compounds) for text, counts in zip(pair, seen, strict=True)))
    return Phrasebook(
        _corpus(train, "phrasebook train"), _corpus(held_out[:HELD_OUT], "phrasebook valid"), _corpus(held_out[HELD_OUT : 2 * HELD_OUT], "phrasebook test")
    )


def _distinct(seed: int) -> Iterator[Both]:
    """Endless pairs whose sources are all different."""
    choice = Choice(seed)
    shares = list(itertools.accumulate(template.weight for template in TEMPLATES))
    seen: set[str] = set()
    while True:
        en, de = TEMPLATES[bisect.bisect(shares, choice.share() * shares[-1])].say(choice)
        if en in seen or not SHORTEST <= en.count(" ") + 1 <= LONGEST or not SHORTEST <= de.count(" ") + 1 <= LONGEST:
            continue
        seen.add(en)
        yield sentence(en), sentence(de)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s.,?]+", text.lower())


def _known(text: str, counts: Counter[str], compounds: Container[str]) -> bool:
    """Whether every word is in enough training sentences; compound numbers are known by their parts."""
    return all(counts[word] >= SEEN or word in compounds for word in _words(text))


def _corpus(pairs: list[Both], name: str) -> ParallelCorpus:
    sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    return ParallelCorpus(sources, targets, name, CorpusReport(len(pairs), len(pairs)), name)
