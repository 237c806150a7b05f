"""chrF2 (Popović 2015): F-score of character n-grams of order 1 to 6, recall weighing twice as much as precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDER = 6
BETA = 2


def _ngrams(sentence: str) -> list[Counter[str]]:
    """Counts of the n-grams of order 1..6 of a sentence without its white space."""
    text = "".join(sentence.split())
    return [Counter(text[start : start + n] for start in range(len(text) - n + 1)) for n in range(1, ORDER + 1)]


def _row(hypothesis: Sequence[Counter[str]], reference: Sequence[Counter[str]]) -> list[int]:
    row: list[int] = []
    for ours, theirs in zip(hypothesis, reference, strict=True):
        matches = sum(min(count, theirs[ngram]) for ngram, count in ours.items() if ngram in theirs)
        # An order that the reference is too short for does not count against the hypothesis.
        row += [ours.total() if theirs else 0, theirs.total(), matches]
    return row


def statistics(hypotheses: Sequence[str], reference_sets: Sequence[Sequence[str]]) -> np.ndarray:
    """Per sentence and order: n-grams of the hypothesis, of the reference, matches. Of several references the best one counts."""
    rows = np.zeros((len(hypotheses), 3 * ORDER))
    for row, hypothesis, *references in zip(rows, hypotheses, *reference_sets, strict=True):
        ours = _ngrams(hypothesis)
        candidates = [_row(ours, _ngrams(reference)) for reference in references]
        row[:] = candidates[int(np.argmax(value(np.array(candidates))))] if len(candidates) > 1 else candidates[0]
    return rows


def value(sums: np.ndarray) -> np.ndarray:
    """chrF2 in [0, 100] from summed statistics: F of the precision and recall averaged over the orders that both sides have."""
    sums = np.asarray(sums, dtype=np.float64)
    ours, theirs, matches = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    used = (ours > 0) & (theirs > 0)
    orders = np.maximum(used.sum(axis=-1), 1)
    precision = np.where(used, matches / np.maximum(ours, 1), 0.0).sum(axis=-1) / orders
    recall = np.where(used, matches / np.maximum(theirs, 1), 0.0).sum(axis=-1) / orders
    denominator = BETA**2 * precision + recall
    return np.where(denominator > 0, 100.0 * (1 + BETA**2) * precision * recall / np.where(denominator > 0, denominator, 1.0), 0.0)


def signature(references: int) -> str:
    return f"nrefs:{references}|case:mixed|eff:yes|nc:{ORDER}|nw:0|space:no"
