from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvmk.validation.fallback import embedding_score


def corpus(hypotheses: list[str], references: list[str]) -> float:
    return float(embedding_score.value(embedding_score.statistics(hypotheses, [references]).sum(axis=0)))


def test_identity_is_100(references):
    assert corpus(references, references) == pytest.approx(100, abs=1e-9)


@given(st.text(max_size=20), st.text(max_size=20))
def test_symmetric_and_bounded(first, second):
    forwards, backwards = corpus([first], [second]), corpus([second], [first])
    assert forwards == pytest.approx(backwards, abs=1e-9)
    assert 0 <= forwards <= 100 + 1e-9


def test_falls_as_damage_grows(references, damaged):
    values = [np.mean([corpus(damaged(references, seed, strength), references) for seed in range(3)]) for strength in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 10


def test_spelling_variants_are_nearer_than_other_words():
    assert corpus(["die Häuser"], ["das Haus"]) < corpus(["das Hauses"], ["das Haus"])
    assert corpus(["der Tisch"], ["das Haus"]) < corpus(["die Häuser"], ["das Haus"])


def test_unrelated_text_scores_low(references):
    assert corpus(["qqq xxxxx zzz"] * len(references), references) < 35


def test_long_words_weigh_more():
    vectors, weights = embedding_score.hashed_ngrams("der Hundert.")
    assert vectors.shape == (3, embedding_score.DIMENSIONS)
    assert weights.tolist() == [2, 3, 1]
    dropped_long = corpus(["der blaue"], ["der blaue Schmetterling"])
    dropped_short = corpus(["blaue Schmetterling"], ["der blaue Schmetterling"])
    assert dropped_long < dropped_short


def test_empty_sentences():
    assert corpus([""], [""]) == 100
    assert corpus([""], ["Wort"]) == 0
    assert corpus(["Wort"], [" "]) == 0


def test_greedy_matching_by_hand_with_another_embedder():
    """Vectors at 0, 60 and 90 degrees; weights 1 and 3."""
    angles = {"a": 0.0, "b": np.pi / 3, "c": np.pi / 2}
    weights = {"a": 1.0, "b": 3.0, "c": 1.0}

    def embed(sentence):
        words = sentence.split()
        return np.array([[5 * np.cos(angles[word]), 5 * np.sin(angles[word])] for word in words]), np.array([weights[word] for word in words])

    rows = embedding_score.statistics(["a c"], [["a b"]], embed)
    precision = (1.0 + np.cos(np.pi / 6)) / 2
    recall = (1 * 1.0 + 3 * np.cos(np.pi / 6)) / 4
    assert rows[0, 0] == pytest.approx(2 * precision * recall / (precision + recall))


def test_best_of_several_references_counts():
    assert embedding_score.statistics(["ein Hund"], [["zwei Katzen"], ["ein Hund"]])[0, 0] == pytest.approx(1)


def test_signature_says_what_it_is():
    assert embedding_score.signature(1).startswith("bertscore-fallback|")
    assert "not comparable with BERTScore" in embedding_score.signature(1)


def test_marks_belong_to_the_letter_before_them():
    """Vowel signs stood as words of their own, and any two words with the same sign were alike."""
    assert len(embedding_score.hashed_ngrams("हिन्दी में पाठ।")[0]) == 4
    assert len(embedding_score.hashed_ngrams("Größe: 4.5 e\u0301")[0]) == 6
