"""Greedy matching of word vectors (Zhang et al. 2020, BERTScore), without BERT: the stand-in for BERTScore.

Each word of one side takes its most similar word of the other side; the weighted means of these similarities are precision and recall.
The vectors come from a callable. The built-in one hashes character n-grams, so it sees spelling and not meaning: its numbers are not
comparable with BERTScore's, and its signature says so.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from cvmk.validation import scripts
from cvmk.validation.fallback.rouge import value as value

Embedder = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""A sentence to its words' vectors [words, dimensions] and their weights [words] (positive; rare words weigh more)."""

DIMENSIONS = 512
ORDERS = (1, 2, 3, 4)

_WORD = re.compile("w[wm]*|[mp]")


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """w: a letter, digit or low line; m: a mark, such as the vowels of Indic scripts, which belongs to the letter before it; p: a punctuation mark."""
    if character.isspace():
        return " "
    if character.isalnum() or character == "_":
        return "w"
    return "m" if unicodedata.category(character)[0] == "M" else "p"


@lru_cache(maxsize=1 << 16)
def _word_vector(word: str) -> np.ndarray:
    """Hashed counts of a word's character n-grams, longer n-grams weighing more, as they are rarer."""
    vector = np.zeros(DIMENSIONS)
    marked = f"\x02{word}\x03"
    for order in ORDERS:
        for start in range(len(marked) - order + 1):
            code = zlib.crc32(marked[start : start + order].encode("utf-8", "surrogatepass"))
            vector[code % DIMENSIONS] += math.sqrt(order) if code & (1 << 31) else -math.sqrt(order)
    vector.setflags(write=False)
    return vector


def hashed_ngrams(sentence: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and weights of a sentence's words and punctuation marks.

    A word weighs log2(1 + its length): short words are the frequent ones (Zipf), so this stands in for the inverse document frequency
    without making a sentence's score depend on the other sentences.
    """
    words = scripts.spans(sentence, _kind, _WORD)
    if not words:
        return np.zeros((0, DIMENSIONS)), np.zeros(0)
    return np.stack([_word_vector(word) for word in words]), np.log2(1.0 + np.array([len(word) for word in words]))


def sentence_f1(hypothesis: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray]) -> float:
    """F1 in [0, 1] of two embedded sentences; 1 where both are empty, 0 where one is."""
    (ours, our_weights), (theirs, their_weights) = hypothesis, reference
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    similarity = np.clip(_unit(ours) @ _unit(theirs).T, 0.0, 1.0)
    precision = float(np.average(similarity.max(axis=1), weights=our_weights))
    recall = float(np.average(similarity.max(axis=0), weights=their_weights))
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)


def statistics(hypotheses: Sequence[str], reference_sets: Sequence[Sequence[str]], embed: Embedder = hashed_ngrams) -> np.ndarray:
    """Per sentence: F1 against the best reference, and 1."""
    rows = np.ones((len(hypotheses), 2))
    for row, hypothesis, *references in zip(rows, hypotheses, *reference_sets, strict=True):
        ours = embed(hypothesis)
        row[0] = max(sentence_f1(ours, embed(reference)) for reference in references)
    return rows


def signature(references: int) -> str:
    vectors = f"character-ngrams {ORDERS[0]}-{ORDERS[-1]} hashed to {DIMENSIONS}"
    return f"bertscore-fallback|nrefs:{references}|vectors:{vectors}|weights:log2 length|f1|not comparable with BERTScore"
