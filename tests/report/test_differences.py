"""Marks of words, and the choice of sentences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import sentences

from cvmk.report.differences import LONGEST, Part, chosen, marked, recorded_samples, shortened
from cvmk.report.evaluations import Evaluation


def shown(parts: tuple[Part, ...]) -> str:
    """[+extra+], [-missing-], and {} around what the baseline says otherwise."""
    texts = []
    for part in parts:
        text = part.text.rstrip()
        text = f"[-{text}-]" if part.missing else f"[+{text}+]" if part.extra else text
        texts.append((f"{{{text}}}" if part.changed else text) + part.text[len(part.text.rstrip()) :])
    return "".join(texts).strip()


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("a b c", "a b c", "a b c"),
        ("a x c", "a b c", "a [+x+] [-b-] c"),
        ("a c", "a b c", "a [-b-] c"),
        ("a b x c", "a b c", "a b [+x+] c"),
        ("the end", "the end.", "the [+end+] [-end.-]"),
        ("the", "the very end", "the [-very end-]"),
        ("", "a b", "[-a b-]"),
        ("a b", "", "[+a b+]"),
        ("", "", ""),
        ("我们需要一张桌子。", "我们要两张桌子。", "我们[+需+]要[+一+][-两-]张桌子。"),
        ("  a   b ", "a b", "a b"),
    ],
)
def test_words_that_differ_from_the_reference(text: str, reference: str, expected: str) -> None:
    assert shown(marked(text, reference)) == expected


def test_words_that_differ_from_the_baseline() -> None:
    assert shown(marked("a big red house", "a big house", "a red house")) == "a {big} [+red+] house"


@given(*(st.text("ab c\u00e9桌 .", max_size=30) for _ in range(3)))
def test_nothing_is_lost_or_made_up(text: str, reference: str, baseline: str) -> None:
    parts = marked(text, reference, baseline)
    ours = "".join(part.text for part in parts if not part.missing)
    theirs = "".join(part.text for part in parts if not part.extra)
    assert "".join(ours.split()) == "".join(text.split()) and "".join(theirs.split()) == "".join(reference.split())


def evaluation(hypotheses: list[str]) -> Evaluation:
    sources, references = sentences(len(hypotheses))
    return Evaluation(tuple(sources), tuple(references), tuple(hypotheses), None, len(hypotheses))


def test_of_one_run_the_worst_sentences_and_the_first_are_shown() -> None:
    _, references = sentences(30)
    texts = list(references)
    texts[17] = "nothing alike"
    found = chosen(evaluation(texts), "test", [("run", texts)], None, 4)
    assert [(sample.line, sample.why) for sample in found][:2] == [(18, "least like its reference"), (1, "one of the first")]
    assert len(found) == 4 and found[-1].why == "one of the first" and found[0].set == "test"


def test_of_two_runs_the_largest_gains_and_losses_are_shown() -> None:
    _, references = sentences(30)
    base, ours = list(references), list(references)
    base[3], ours[11] = "nothing alike", "nothing alike"
    found = chosen(evaluation(base), "test", [("base", base), ("ours", ours)], None, 4)
    assert [(sample.line, sample.why) for sample in found][:2] == [(4, "gains most against base"), (12, "loses most against base")]
    assert all([one.system for one in sample.translations] == ["base", "ours"] for sample in found)


def test_recorded_samples_of_any_shape() -> None:
    good = {"source": "a", "hypothesis": "b", "reference": "c"}
    found = recorded_samples("run", "test", {"samples": [good, {"source": 1}, "x", None]})
    assert [(sample.source, sample.reference) for sample in found] == [("a", "c")]
    assert recorded_samples("run", "test", {}) == [] == recorded_samples("run", "test", {"samples": 7})


def test_long_sentences_are_cut() -> None:
    assert len(shortened("a" * 5000)) == LONGEST and shortened("abc") == "abc"
