"""BLEU (Papineni et al. 2002) with the smoothing of mteval (Chen & Cherry 2014, method 3), over the words of a tokeniser: 13a of mteval,
or for languages without spaces zh, char and none, all as sacrebleu has them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

ORDER = 4

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SYMBOL = re.compile(r"([ !-&(-+/:-@\[-`{-~])")  # ASCII but letters, digits and ' , - .
_MARK_AFTER_NON_DIGIT = re.compile(r"([^0-9])([.,])")
_MARK_BEFORE_NON_DIGIT = re.compile(r"([.,])([^0-9])")
_DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")
_CHINESE = re.compile(
    # General punctuation to the symbols, for sacrebleu reads the planes of rare ideographs as this range, and then: radicals and strokes,
    # punctuation, bopomofo, enclosed and squared characters, ideographs, compatibility and vertical forms, full and half widths.
    "([\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u33ff\u3400-\u4db5\u4e00-\u9fbb"
    "\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef])"
)


def unescaped(line: str) -> str:
    for entity, character in _ENTITIES:
        line = line.replace(entity, character)
    return line


def symbols_apart(line: str) -> str:
    """Blanks around the symbols of ASCII."""
    return _SYMBOL.sub(r" \1 ", line)


def marks_apart(line: str) -> str:
    """Blanks around periods and commas but for those within numbers, and around the dash after a digit."""
    line = _MARK_AFTER_NON_DIGIT.sub(r"\1 \2 ", line)
    line = _MARK_BEFORE_NON_DIGIT.sub(r" \1 \2", line)
    return _DASH_AFTER_DIGIT.sub(r"\1 \2 ", line)


def tokenize_13a(line: str) -> list[str]:
    """Words and punctuation marks of a line, as NIST's mteval-v13a splits them; numbers such as 1,000.5 stay whole."""
    line = unescaped(line.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " "))
    return marks_apart(symbols_apart(f" {line} ")).split()


def tokenize_zh(line: str) -> list[str]:
    """Chinese characters and full-width marks each by itself, the rest as 13a splits it."""
    return marks_apart(symbols_apart(_CHINESE.sub(r" \1 ", line.strip()))).split()


def tokenize_char(line: str) -> list[str]:
    """The characters of a line without its white space."""
    return list("".join(line.split()))


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"13a": tokenize_13a, "zh": tokenize_zh, "char": tokenize_char, "none": str.split}
"""By sacrebleu's name: a line to its words."""


def _ngrams(tokens: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    return [Counter(zip(*(tokens[start:] for start in range(n)), strict=False)) for n in range(1, ORDER + 1)]


def statistics(
    hypotheses: Sequence[str], reference_sets: Sequence[Sequence[str]], tokenize: Callable[[str], Sequence[str]] = tokenize_13a
) -> np.ndarray:
    """Per sentence: hypothesis length, closest reference length, matches of order 1..4, n-grams of order 1..4."""
    rows = np.zeros((len(hypotheses), 2 + 2 * ORDER))
    for row, hypothesis, *references in zip(rows, hypotheses, *reference_sets, strict=True):
        tokens = tokenize(hypothesis)
        references_tokens = [tokenize(reference) for reference in references]
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


def signature(references: int, tokenizer: str = "13a") -> str:
    return f"nrefs:{references}|case:mixed|eff:no|tok:{tokenizer}|smooth:exp"
