"""What policies say of translations that follow one another."""

from __future__ import annotations

import pytest

from cvmk.errors import ConfigError
from cvmk.streaming import LocalAgreement, Policy, Retranslation, View, WaitK, Write


def view(words: str, *earlier: str, source_words: int = 3, committed: int = 0) -> View:
    return View(source_words, committed, tuple(words.split()), tuple(tuple(text.split()) for text in earlier))


def test_retranslation_commits_nothing_and_hides_the_last_words() -> None:
    assert Retranslation(2).writes(view("wir brauchen einen Tisch")) == Write(0, 2)
    assert Retranslation(0).writes(view("wir brauchen", "wir")) == Write(0, 2)
    assert not Retranslation().reads(view("", source_words=0))


@pytest.mark.parametrize(
    ("agreeing", "earlier", "commit"),
    [
        (1, [], 4),
        (2, [], 0),
        (2, ["wir brauchen den"], 2),
        (2, ["ich brauche"], 0),
        (3, ["wir"], 0),
        (3, ["wir haben", "wir brauchen"], 1),
        (3, ["wir brauchen einen", "wir brauchen einen Stuhl"], 3),
    ],
)
def test_local_agreement_commits_what_the_last_translations_begin_with(agreeing: int, earlier: list[str], commit: int) -> None:
    policy = LocalAgreement(agreeing, mask=1)
    assert policy.memory == agreeing - 1
    assert policy.writes(view("wir brauchen einen Tisch", *earlier)) == Write(commit, 3)


def test_wait_k_says_a_word_for_every_word_beyond_k() -> None:
    policy = WaitK(3)
    assert [policy.reads(view("", source_words=n)) for n in range(5)] == [True, True, True, False, False]
    assert policy.reads(view("", source_words=4, committed=2)) and not policy.reads(view("", source_words=5, committed=2))
    assert policy.writes(view("a b c d", source_words=4)) == Write(2, 2)


@pytest.mark.parametrize(
    ("policy", "values", "name"),
    [
        (Retranslation, (-1,), "mask"),
        (LocalAgreement, (0,), "agreeing"),
        (LocalAgreement, (2, -1), "mask"),
        (WaitK, (0,), "k"),
        (WaitK, (True,), "k"),
        (WaitK, ("3",), "k"),
    ],
)
def test_wrong_numbers_are_named(policy: type[Policy], values: tuple[object, ...], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is .* whole number of at least"):
        policy(*values)


def test_policies_are_values() -> None:
    assert LocalAgreement() == LocalAgreement(2, 0) != LocalAgreement(3) and hash(WaitK(3)) == hash(WaitK(3))
    assert issubclass(WaitK, Policy)
