"""BLEU (Papineni et al. 2002) with the 13a tokenisation of mteval and its exponential smoothing (Chen & Cherry 2014, method 3)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDER = 4

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SYMBOL = re.compile(r"([ !-&(-+/:-@\[-`{-~])")  # ASCII but letters, digits and ' , - .
_MARK_AFTER_NON_DIGIT = re.compile(r"([^0-9])([.,])")
_MARK_BEFORE_NON_DIGIT = re.compile(r"([.,])([^0-9])")
_DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")


def tokenize_13a(line: str) -> list[str]:
    """Words and punctuation marks of a line, as NIST's mteval-v13a splits them; numbers such as 1,000.5 stay whole."""
    line = line.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        line = line.replace(entity, character)
    line = _SYMBOL.sub(r" \1 ", f" {line} ")
    line = _MARK_AFTER_NON_DIGIT.sub(r"\1 \2 ", line)
    line = _MARK_BEFORE_NON_DIGIT.sub(r" \1 \2", line)
    return _DASH_AFTER_DIGIT.sub(r"\1 \2 ", line).split()


def _ngrams(tokens: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    return [Counter(zip(*(tokens[start:] for start in range(n)), strict=False)) for n in range(1, ORDER + 1)]


def statistics(hypotheses: Sequence[str], reference_sets: Sequence[Sequence[str]]) -> np.ndarray:
    """Per sentence: hypothesis length, closest reference length, matches of order 1..4, n-grams of order 1..4."""
    rows = np.zeros((len(hypotheses), 2 + 2 * ORDER))
    for row, hypothesis, *references in zip(rows, hypotheses, *reference_sets, strict=True):
        tokens = tokenize_13a(hypothesis)
        references_tokens = [tokenize_13a(reference) for reference in references]
        row[0] = len(tokens)
        row[1] = min((abs(len(words) - len(tokens)), len(words)) for words in references_tokens)[1]
        references_ngrams = [_ngrams(words) for words in references_tokens]
        for n, counts in enumerate(_ngrams(tokens)):
            row[2 + n] = sum(min(count, max(known[n][ngram] for known in references_ngrams)) for ngram, count in counts.items())
            row[2 + ORDER + n] = max(0, len(tokens) - n)
    return rows


def value(sums: np.ndarray) -> np.ndarray:
    """BLEU in [0, 100] from summed statistics: brevity penalty times the geometric mean of the smoothed precisions."""
    sums = np.asarray(sums, dtype=np.float64)
    length, reference_length = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    # The k-th order without a match counts 1 / 2^k matches.
    smoothed = np.where(matches > 0, matches, 0.5 ** np.cumsum(matches == 0, axis=-1))
    precisions = smoothed / np.maximum(totals, 1)
    with np.errstate(over="ignore"):
        penalty = np.exp(np.minimum(0.0, 1.0 - reference_length / np.maximum(length, 1)))
    defined = matches.any(axis=-1) & totals.all(axis=-1)
    return np.where(defined, 100.0 * penalty * np.exp(np.log(precisions).mean(axis=-1)), 0.0)


def signature(references: int) -> str:
    return f"nrefs:{references}|case:mixed|eff:no|tok:13a|smooth:exp"
