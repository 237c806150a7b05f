"""Where sentences end, whatever way the text arrives."""

from __future__ import annotations

import random

import pytest

from cvmk.streaming import Sentences


def split(text: str, language: str = "") -> list[str]:
    found, sentences = [], Sentences(language)
    while (place := sentences.end(text)) is not None:
        found.append(text[: place[0]])
        text = text[place[1] :]
    return [*found, text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good morning. We need a table", ["Good morning.", "We need a table"]),
        ("Good morning. ", ["Good morning. "]),  # "we" could follow
        ("Good morning.", ["Good morning."]),
        ("Really?! Yes… No", ["Really?!", "Yes…", "No"]),
        ('He said "stop." Then he left', ['He said "stop."', "Then he left"]),
        ("“Why?” he asked. “Go.” She went", ["“Why?” he asked.", "“Go.”", "She went"]),
        ("Dr. Smith and J. R. Jones met at 3.30 p.m. on Monday. Fine", ["Dr. Smith and J. R. Jones met at 3.30 p.m. on Monday.", "Fine"]),
        ("No. I do not. See e.g. this", ["No.", "I do not.", "See e.g. this"]),
        ("a line\nanother\n\nthird", ["a line", "another", "third"]),
        ("\n\n a", ["\n\n a"]),
        ("a.\nb", ["a.", "b"]),
        ("今日は。明日は？「はい。」そう", ["今日は。", "明日は？", "「はい。」", "そう"]),
        ("We saw 12. Then 13 came", ["We saw 12.", "Then 13 came"]),
        ("v1.2.3 and example.com/a?b=c are fine", ["v1.2.3 and example.com/a?b=c are fine"]),
        ("", [""]),
        (" ... ", [" ... "]),
    ],
)
def test_ends(text: str, expected: list[str]) -> None:
    assert split(text) == expected


def test_ordinals_end_none_where_the_language_has_them() -> None:
    text = "Am 3. Mai kam er. Dann ging er"
    assert split(text, "de") == ["Am 3. Mai kam er.", "Dann ging er"]
    assert split(text, "en") == ["Am 3.", "Mai kam er.", "Dann ging er"]


def test_ends_never_move_when_more_is_written() -> None:
    alphabet = ["a", "B", "Dr", "3", ".", "!", "?", "…", '"', ")", " ", " ", "\n", "。", "你", "e.g."]
    for seed in range(400):
        generator = random.Random(seed)
        text = "".join(generator.choice(alphabet) for _ in range(30))
        whole = split(text, "de")
        found, rest, sentences = [], "", Sentences("de")
        for character in text:
            rest += character
            while (place := sentences.end(rest)) is not None:
                found.append(rest[: place[0]])
                rest = rest[place[1] :]
        assert [part.strip() for part in (*found, rest)] == [part.strip() for part in whole], repr(text)


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("one two, three four five", 20, "one two, three four"),
        ("one two three, four", 16, "one two three, "),
        ("1,000,000 men", 11, "1,000,000"),
        ("abcdefgh", 5, "abcde"),
        (" abcdefgh", 5, " abcd"),
        ("你好，世界很大", 5, "你好，"),
    ],
)
def test_a_clause_or_a_word_ends_within_the_limit(text: str, limit: int, expected: str) -> None:
    assert text[: Sentences().clause(text, limit)] == expected
