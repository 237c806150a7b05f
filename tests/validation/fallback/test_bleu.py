from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_char import TokenizerChar
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from cvmk.validation.fallback import bleu

ALPHABET = st.sampled_from("abZ ß  .,,-:;!?'\"&<>()[]{}$%/\\_`~^@#*+=|0123456789é中、。Ａ国かカไ한—\u00a0\u2028\tⅣ٣")


def corpus(hypotheses: list[str], reference_sets: list[list[str]]) -> float:
    return float(bleu.value(bleu.statistics(hypotheses, reference_sets).sum(axis=0)))


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        ("Hello, world!", "Hello , world !"),
        ("It costs 1,000.50 dollars.", "It costs 1,000.50 dollars ."),
        ("The years 1999-2001 were e-mail years", "The years 1999 - 2001 were e-mail years"),
        ("don't &quot;quote&quot; &amp;lt; me", "don't \" quote \" < me"),
        ("a<skipped>b (c)/d", "ab ( c ) / d"),
        ("", ""),
        (" \t ", ""),
    ],
)
def test_tokenize_13a_by_hand(line, tokens):
    assert bleu.tokenize_13a(line) == tokens.split()


@given(st.one_of(st.text(ALPHABET, max_size=40), st.text(max_size=40)))
def test_tokenize_13a_equals_sacrebleu(line):
    assert bleu.tokenize_13a(line) == Tokenizer13a()(line.rstrip()).split()


@given(st.one_of(st.text(ALPHABET, max_size=40), st.text(max_size=40)))
def test_tokenisers_for_text_without_spaces_equal_sacrebleu(line):
    assert bleu.tokenize_zh(line) == TokenizerZh()(line.rstrip()).split()
    assert bleu.tokenize_char(line) == TokenizerChar()(line.rstrip()).split()


def test_chinese_characters_are_those_of_sacrebleu():
    theirs = TokenizerZh._is_chinese_char
    assert [code for code in range(0x110000) if bool(bleu._CHINESE.match(chr(code))) != theirs(chr(code))] == []


def test_by_hand():
    # Unigrams 3/4, bigrams 2/3, trigrams 1/2, 4-grams 0/1 smoothed to 1/2; 4 words against 5.
    precisions = np.array([3 / 4, 2 / 3, 1 / 2, 1 / 2])
    expected = 100 * np.exp(1 - 5 / 4) * np.exp(np.log(precisions).mean())
    assert corpus(["the cat sat x"], [["the cat sat down there"]]) == pytest.approx(expected, abs=1e-12)


def test_equals_sacrebleu(hypotheses, worse_hypotheses, references):
    for system in (hypotheses, worse_hypotheses, references):
        assert corpus(system, [references]) == pytest.approx(BLEU().corpus_score(system, [references]).score, abs=1e-9)


def test_equals_sacrebleu_with_several_references(hypotheses, references, damaged):
    sets = [references, damaged(references, seed=9, strength=0.6), damaged(references, seed=10, strength=0.3)]
    assert corpus(hypotheses, sets) == pytest.approx(BLEU().corpus_score(hypotheses, sets).score, abs=1e-9)


@pytest.mark.data
def test_equals_sacrebleu_on_multi30k(multi30k):
    hypotheses, references = multi30k
    assert corpus(hypotheses, [references]) == pytest.approx(BLEU().corpus_score(hypotheses, [references]).score, abs=1e-9)


@given(st.lists(st.tuples(st.text("ab ., 1", max_size=14), st.text("ab ., 1", max_size=14)), min_size=1, max_size=5))
def test_equals_sacrebleu_on_degenerate_corpora(pairs):
    hypotheses, references = [list(side) for side in zip(*pairs, strict=True)]
    assert corpus(hypotheses, [references]) == pytest.approx(BLEU().corpus_score(hypotheses, [references]).score, abs=1e-9)


def test_value_of_many_sums_at_once():
    sums = np.array([[[10, 10, 8, 6, 4, 2, 10, 9, 8, 7], [0] * 10]], dtype=float)
    values = bleu.value(sums)
    assert values.shape == (1, 2)
    assert values[0, 1] == 0
    assert values[0, 0] == pytest.approx(float(bleu.value(sums[0, 0])))
