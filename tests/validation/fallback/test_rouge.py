from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvmk.validation.fallback import rouge


@pytest.fixture(scope="module")
def scorer():
    return pytest.importorskip("rouge_score.rouge_scorer", reason="the package rouge-score is not installed").RougeScorer(["rougeL"])


def test_by_hand():
    # "the x mat sat" and "the cat sat": the common subsequence is "the sat".
    assert rouge.sentence_f1("the x mat sat".split(), "the cat sat".split()) == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))


@pytest.mark.parametrize(("line", "words"), [("Hello, World-wide 42!", ["hello", "world", "wide", "42"]), ("Käse", ["k", "se"]), ("", []), ("…", [])])
def test_tokenize(line, words):
    assert rouge.tokenize(line) == words


def test_sentences_equal_rouge_score(scorer, hypotheses, worse_hypotheses, references):
    for system in (hypotheses, worse_hypotheses, references):
        ours = rouge.statistics(system, [references])[:, 0]
        assert ours == pytest.approx([scorer.score(reference, text)["rougeL"].fmeasure for text, reference in zip(system, references, strict=True)], abs=1e-12)


@pytest.mark.data
def test_corpus_equals_rouge_score_on_multi30k(scorer, multi30k):
    hypotheses, references = (side[:300] for side in multi30k)
    theirs = [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in zip(hypotheses, references, strict=True)]
    assert float(rouge.value(rouge.statistics(hypotheses, [references]).sum(axis=0))) == pytest.approx(100 * sum(theirs) / len(theirs), abs=1e-9)


def test_best_of_several_references_counts():
    assert rouge.statistics(["a b"], [["x y"], ["a b"]])[0, 0] == 1


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_equals_rouge_score(scorer, first, second):
    assert rouge.statistics([first], [[second]])[0, 0] == pytest.approx(scorer.score(second, first)["rougeL"].fmeasure, abs=1e-12)


@given(st.text("abcde", max_size=40), st.text("abcde", max_size=40))
def test_longest_common_subsequence_by_the_textbook_table(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert rouge.longest_common_subsequence(first, second) == table[-1][-1]


@pytest.mark.parametrize("text", ["朝に私は歌を買います。", "Доброе утро", "صباح الخير", "สวัสดี", "शुभ प्रभात", "안녕하세요"])
def test_scripts_beyond_latin_have_words(text):
    """Identical text scored 0."""
    assert rouge.tokenizer_for([[text]]) == "unicode"
    assert rouge.statistics([text], [[text]], rouge.TOKENIZERS["unicode"])[0, 0] == 1
    assert "tok:unicode" in rouge.signature(1, "unicode")


def test_latin_corpora_keep_the_tokeniser_of_the_package(references):
    assert rouge.tokenizer_for([references, references]) == "default" and "tok:" not in rouge.signature(1)
    assert rouge.tokenizer_for([["Ein Mann."], ["Человек."]]) == "unicode"


def test_order_counts_in_text_without_spaces():
    assert rouge.statistics(["今日は本を買う"], [["本を今日は買う"]], rouge.TOKENIZERS["unicode"])[0, 0] == pytest.approx(5 / 7)
