from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import CHRF

from cvmk.validation.fallback import chrf


def corpus(hypotheses: list[str], reference_sets: list[list[str]]) -> float:
    return float(chrf.value(chrf.statistics(hypotheses, reference_sets).sum(axis=0)))


def test_by_hand():
    # "ab" against "abc": order 1 has precision 2/2, recall 2/3; order 2 has 1/1 and 1/2; no longer n-gram exists on both sides.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert corpus(["a b"], [["ab c"]]) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall), abs=1e-12)


def test_equals_sacrebleu(hypotheses, worse_hypotheses, references):
    for system in (hypotheses, worse_hypotheses, references):
        assert corpus(system, [references]) == pytest.approx(CHRF().corpus_score(system, [references]).score, abs=1e-9)


def test_equals_sacrebleu_with_several_references(hypotheses, references, damaged):
    sets = [damaged(references, seed=9, strength=0.6), references]
    assert corpus(hypotheses, sets) == pytest.approx(CHRF().corpus_score(hypotheses, sets).score, abs=1e-9)


@pytest.mark.data
def test_equals_sacrebleu_on_multi30k(multi30k):
    hypotheses, references = multi30k
    assert corpus(hypotheses, [references]) == pytest.approx(CHRF().corpus_score(hypotheses, [references]).score, abs=1e-9)


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=4))
def test_equals_sacrebleu_on_any_text(pairs):
    hypotheses, references = [list(side) for side in zip(*pairs, strict=True)]
    assert corpus(hypotheses, [references]) == pytest.approx(CHRF().corpus_score(hypotheses, [references]).score, abs=1e-9)
