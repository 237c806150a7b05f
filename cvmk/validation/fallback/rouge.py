"""ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, averaged over sentences.

Words are the runs of a-z and 0-9 of the lower-cased text, as in the original ROUGE script and in the package rouge-score: letters
beyond ASCII separate words. That tokeniser sees nothing of a text in another script. Where a reference is mostly in one, the corpus is
scored with `scripts.words` instead ("tok:unicode" in the signature), which splits Latin text in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from cvmk.validation import scripts

_WORD = re.compile(r"[a-z0-9]+")


def tokenize(line: str) -> list[str]:
    return _WORD.findall(line.lower())


def tokenizer_for(reference_sets: Sequence[Sequence[str]]) -> str:
    """The name of the tokeniser that sees these references: "default" or "unicode"."""
    return "default" if all(scripts.is_latin(reference) for references in reference_sets for reference in references) else "unicode"


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"default": tokenize, "unicode": scripts.words}


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by one bit-parallel step for each word of `second` (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for place, word in enumerate(first):
        positions[word] = positions.get(word, 0) | (1 << place)
    mask = (1 << len(first)) - 1
    unmatched = mask
    for word in second:
        hit = unmatched & positions.get(word, 0)
        unmatched = ((unmatched + hit) | (unmatched - hit)) & mask
    return len(first) - unmatched.bit_count()


def sentence_f1(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L F1 in [0, 1]; 0 where a side has no word."""
    common = longest_common_subsequence(hypothesis, reference)
    return 2 * common / (len(hypothesis) + len(reference)) if common else 0.0


def statistics(hypotheses: Sequence[str], reference_sets: Sequence[Sequence[str]], tokenize: Callable[[str], list[str]] = tokenize) -> np.ndarray:
    """Per sentence: F1 against the best reference, and 1."""
    rows = np.ones((len(hypotheses), 2))
    for row, hypothesis, *references in zip(rows, hypotheses, *reference_sets, strict=True):
        words = tokenize(hypothesis)
        row[0] = max(sentence_f1(words, tokenize(reference)) for reference in references)
    return rows


def value(sums: np.ndarray) -> np.ndarray:
    """Mean of the sentences' scores x 100."""
    sums = np.asarray(sums, dtype=np.float64)
    means: np.ndarray = 100.0 * sums[..., 0] / np.maximum(sums[..., 1], 1)
    return means


def signature(references: int, tokenizer: str = "default") -> str:
    named = "" if tokenizer == "default" else f"|tok:{tokenizer}"
    return f"nrefs:{references}|rougeL|f1|mean over sentences|case:lc|stem:no{named}"
