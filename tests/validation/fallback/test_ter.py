from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import TER
from sacrebleu.tokenizers.tokenizer_ter import TercomTokenizer

from cvmk.validation.fallback import ter


def corpus(hypotheses: list[str], reference_sets: list[list[str]]) -> float:
    return float(ter.value(ter.statistics(hypotheses, reference_sets).sum(axis=0)))


def levenshtein(first: list[str], second: list[str]) -> int:
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            previous, row[j] = row[j], min(previous + (word != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@pytest.mark.parametrize(
    ("hypothesis", "reference", "edits"),
    [
        ("a b c d", "a b c d", 0),
        ("c d a b", "a b c d", 1),  # one block shift; without shifts it would be 4 edits
        ("a x c", "a b c", 1),
        ("a c", "a b c", 1),
        ("a b b c", "a b c", 1),
        ("", "a b c", 3),
        ("a b", "", 2),
        ("", "", 0),
        # The example of Snover et al. 2006: one shift, one insertion, two substitutions.
        (
            "this week the saudis denied information published in the new york times",
            "saudi arabia denied this week information published in the american new york times",
            4,
        ),
    ],
)
def test_edits_by_hand(hypothesis, reference, edits):
    assert ter.edits(hypothesis.split(), reference.split()) == edits


def test_case_and_spacing_do_not_count():
    assert corpus(["  Ein   HUND\u00a0bellt "], [["ein hund bellt"]]) == 0


ALPHABET = st.sampled_from("abZ ß.,,-:;!?'s\"&<>()[]{}$%/\\_`~^@#*+=|0123456789é中国漢かなカナ。、「」！？・ｱ〇㈱\u00a0\u2028\t\nไ한")


@settings(max_examples=500)
@given(st.one_of(st.text(ALPHABET, max_size=40), st.text(max_size=40)))
def test_asian_words_equal_sacrebleu(line):
    assert ter.tokenize_asian(line.rstrip()) == TercomTokenizer(normalized=True, asian_support=True)(line.rstrip()).split()


def test_ideographs_and_marks_are_those_of_sacrebleu():
    split = TercomTokenizer(normalized=True, asian_support=True)
    characters = [chr(code) for code in range(0x80, 0x30000) if not 0xD800 <= code < 0xE000]
    assert [ascii(c) for c in characters if ter.tokenize_asian(f"x{c}x") != split(f"x{c}x").split()] == []


def test_equals_sacrebleu(hypotheses, worse_hypotheses, references):
    for system in (hypotheses, worse_hypotheses, references):
        assert corpus(system, [references]) == pytest.approx(TER().corpus_score(system, [references]).score, abs=1e-9)


def test_equals_sacrebleu_with_several_references(hypotheses, references, damaged):
    sets = [damaged(references, seed=9, strength=0.6), references]
    assert corpus(hypotheses, sets) == pytest.approx(TER().corpus_score(hypotheses, sets).score, abs=1e-9)


@pytest.mark.data
def test_equals_sacrebleu_on_multi30k(multi30k):
    hypotheses, references = multi30k
    assert corpus(hypotheses, [references]) == pytest.approx(TER().corpus_score(hypotheses, [references]).score, abs=1e-9)


WORDS = st.lists(st.sampled_from("abcdefgh"), max_size=16)


@settings(deadline=None, max_examples=300)
@given(WORDS, WORDS)
def test_shifts_equal_sacrebleu_on_repeated_words(hypothesis, reference):
    theirs = TER().corpus_score([" ".join(hypothesis)], [[" ".join(reference)]])
    assert ter.edits(hypothesis, reference) == theirs.num_edits


@pytest.mark.parametrize("lengths", [(30, 30), (50, 35), (30, 60), (200, 3), (3, 200), (24, 25), (25, 24), (1, 60)])
def test_long_sentences_equal_sacrebleu_band_and_all(lengths):
    generator = random.Random(sum(lengths))
    for vocabulary in (5, 60):
        words = [f"w{number}" for number in range(vocabulary)]
        hypothesis, reference = ([generator.choice(words) for _ in range(length)] for length in lengths)
        theirs = TER().corpus_score([" ".join(hypothesis)], [[" ".join(reference)]])
        assert ter.edits(hypothesis, reference) == theirs.num_edits


def test_matches_outside_the_band_do_not_count():
    """The hypothesis lacks the first 27 words: the cheapest edit path lies outside the band, and is not found."""
    reference = [f"w{number}" for number in range(58)]
    hypothesis = reference[27:] + ["x"] * 27
    theirs = TER().corpus_score([" ".join(hypothesis)], [[" ".join(reference)]])
    assert ter._Table(reference, 58).rows(hypothesis)[-1][-1] > levenshtein(hypothesis, reference) == 54
    assert ter.edits(hypothesis, reference) == theirs.num_edits


@pytest.mark.parametrize(("block", "edits"), [(10, 1), (11, 2)])
def test_longest_block(block, edits):
    """Eleven words need two shifts. The rest is longer than the block, so that moving the rest is no way out."""
    words, rest = [f"b{number}" for number in range(block)], [f"r{number}" for number in range(13)]
    theirs = TER().corpus_score([" ".join(words + rest)], [[" ".join(rest + words)]])
    assert ter.edits(words + rest, rest + words) == theirs.num_edits == edits


def test_many_candidates_end_as_in_sacrebleu():
    """A stuttering model: the search meets its limit of candidates."""
    generator = random.Random(6)
    hypothesis, reference = ([generator.choice(words) for _ in range(45)] for words in ("abc", "abcd"))
    theirs = TER().corpus_score([" ".join(hypothesis)], [[" ".join(reference)]])
    search = ter._Search(hypothesis, reference)
    assert search.edits(hypothesis) == theirs.num_edits
    assert search.tried >= ter.MOST_CANDIDATES


@given(WORDS, WORDS.filter(bool))
def test_bit_parallel_distance_is_the_edit_distance(hypothesis, reference):
    bits = ter._Bits(reference)
    states = bits.states(hypothesis)
    assert [state[2] for state in states] == [levenshtein(hypothesis[:end], reference) for end in range(len(hypothesis) + 1)]


def test_empty_references():
    assert corpus(["a b", ""], [["", ""]]) == TER().corpus_score(["a b", ""], [["", ""]]).score == 100
    assert corpus([""], [[""]]) == 0
