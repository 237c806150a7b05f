"""The phrasebook: sizes, disjoint splits, and its grammar against forms from a German grammar book."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest

from cvmk.errors import ConfigError
from cvmk.text.phrasebook import lexicon, numbers, phrasebook
from cvmk.text.phrasebook.choice import Choice
from cvmk.text.phrasebook.grammar import after, noun_phrase
from cvmk.text.phrasebook.pairs import TEMPLATES
from cvmk.text.phrasebook.verbs import VERBS

BOOK = phrasebook(20_000)
SPLITS = (BOOK.train, BOOK.valid, BOOK.test)


def test_sizes_and_shape() -> None:
    assert [len(split) for split in SPLITS] == [20_000, 500, 500]
    words = [len(text.split()) for split in SPLITS for side in (split.sources, split.targets) for text in side]
    assert min(words) >= 3 and max(words) <= 16 and 7 < sum(words) / len(words) < 10
    for split in SPLITS:
        for text in (*split.sources, *split.targets):
            assert re.fullmatch(r"[A-ZÄÖÜ][A-Za-zÄÖÜäöüßé' ,-]*[.?]", text), text
            assert "  " not in text and " ," not in text


def test_a_source_has_one_target_and_splits_share_nothing() -> None:
    everything = [text for split in SPLITS for text in split.sources]
    assert len(set(everything)) == len(everything)
    for side in ("sources", "targets"):
        train, valid, test = (set(getattr(split, side)) for split in SPLITS)
        assert not train & valid and not train & test and not valid & test
        assert len(valid) == len(test) == 500


def test_templates_never_contradict_each_other() -> None:
    choice = Choice(11)
    seen: dict[str, str] = {}
    for template in TEMPLATES:
        for _ in range(1500):
            en, de = template.say(choice)
            assert seen.setdefault(en, de) == de


def test_held_out_words_occur_in_training() -> None:
    compounds = {numbers.german(value) for value in range(10_000)}
    for side in ("sources", "targets"):
        counts = Counter(word for text in getattr(BOOK.train, side) for word in set(re.findall(r"[^\s.,?]+", text.lower())))
        for split in (BOOK.valid, BOOK.test):
            for text in getattr(split, side):
                assert all(counts[word] >= 3 or word in compounds for word in re.findall(r"[^\s.,?]+", text.lower())), text


def test_deterministic_and_seeded() -> None:
    again, other = phrasebook(1000, seed=0), phrasebook(1000, seed=1)
    assert again.train.sources == phrasebook(1000, seed=0).train.sources
    assert again.train.targets[:50] != other.train.targets[:50]


@pytest.mark.parametrize("pairs", [0, 999, 200_001])
def test_impossible_sizes(pairs: int) -> None:
    with pytest.raises(ConfigError, match=r"data\.phrasebook_pairs"):
        phrasebook(pairs)


def test_fast() -> None:
    start = time.perf_counter()
    phrasebook(20_000, seed=8)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("value", "en", "de"),
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (7, "seven", "sieben"),
        (12, "twelve", "zwölf"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (66, "sixty-six", "sechsundsechzig"),
        (70, "seventy", "siebzig"),
        (99, "ninety-nine", "neunundneunzig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred and one", "einhunderteins"),
        (117, "one hundred and seventeen", "einhundertsiebzehn"),
        (999, "nine hundred and ninety-nine", "neunhundertneunundneunzig"),
        (1000, "one thousand", "eintausend"),
        (1001, "one thousand and one", "eintausendeins"),
        (1234, "one thousand two hundred and thirty-four", "eintausendzweihundertvierunddreißig"),
        (2021, "two thousand and twenty-one", "zweitausendeinundzwanzig"),
        (9999, "nine thousand nine hundred and ninety-nine", "neuntausendneunhundertneunundneunzig"),
    ],
)
def test_numbers(value: int, en: str, de: str) -> None:
    assert numbers.number(value) == (en, de)


def test_numbers_are_all_different() -> None:
    for language in (numbers.english, numbers.german):
        assert len({language(value) for value in range(10_000)}) == 10_000


@pytest.mark.parametrize(
    ("value", "en", "de"),
    [
        (1, "first", "erst"),
        (2, "second", "zweit"),
        (3, "third", "dritt"),
        (5, "fifth", "fünft"),
        (7, "seventh", "siebt"),
        (8, "eighth", "acht"),
        (9, "ninth", "neunt"),
        (12, "twelfth", "zwölft"),
        (19, "nineteenth", "neunzehnt"),
        (20, "twentieth", "zwanzigst"),
        (21, "twenty-first", "einundzwanzigst"),
        (23, "twenty-third", "dreiundzwanzigst"),
        (30, "thirtieth", "dreißigst"),
        (31, "thirty-first", "einunddreißigst"),
    ],
)
def test_ordinals(value: int, en: str, de: str) -> None:
    assert numbers.ordinal(value) == (en, de)


@pytest.mark.parametrize(
    ("hour", "minute", "en", "de"),
    [
        (3, 30, "half past three", "halb vier"),
        (12, 30, "half past twelve", "halb eins"),
        (6, 45, "quarter to seven", "Viertel vor sieben"),
        (1, 15, "quarter past one", "Viertel nach eins"),
        (12, 45, "quarter to one", "Viertel vor eins"),
        (2, 25, "twenty-five past two", "fünf vor halb drei"),
        (2, 35, "twenty-five to three", "fünf nach halb drei"),
        (11, 55, "five to twelve", "fünf vor zwölf"),
        (1, 0, "one o'clock", "ein Uhr"),
        (4, 20, "twenty past four", "zwanzig nach vier"),
    ],
)
def test_colloquial_times(hour: int, minute: int, en: str, de: str) -> None:
    assert numbers.colloquial(hour, minute) == (en, de)


def test_official_times_prices_years() -> None:
    assert numbers.clock(1, 15) == ("one fifteen", "ein Uhr fünfzehn")
    assert numbers.clock(7, 0) == ("seven o'clock", "sieben Uhr")
    assert numbers.price(1) == ("one euro", "ein Euro")
    assert numbers.price(3, 50) == ("three euros fifty", "drei Euro fünfzig")
    assert numbers.year(1984) == ("nineteen eighty-four", "neunzehnhundertvierundachtzig")


def noun(name: str):  # type: ignore[no-untyped-def]
    return next(noun for noun in (*lexicon.WARES, *lexicon.PLACES, *lexicon.PRODUCE, *lexicon.DRINKS) if noun.en == name)


RED = next(adjective for adjective in lexicon.COLOURS if adjective.en == "red")
EXPENSIVE = next(adjective for adjective in lexicon.ANY_SIZE if adjective.en == "expensive")


@pytest.mark.parametrize(
    ("determiner", "name", "case", "plural", "expected"),
    [
        ("the", "coat", "nom", False, "der rote Mantel"),
        ("the", "coat", "acc", False, "den roten Mantel"),
        ("the", "coat", "dat", False, "dem roten Mantel"),
        ("the", "bag", "nom", False, "die rote Tasche"),
        ("the", "bag", "acc", False, "die rote Tasche"),
        ("the", "bag", "dat", False, "der roten Tasche"),
        ("the", "dress", "nom", False, "das rote Kleid"),
        ("the", "dress", "acc", False, "das rote Kleid"),
        ("the", "dress", "dat", False, "dem roten Kleid"),
        ("a", "coat", "nom", False, "ein roter Mantel"),
        ("a", "coat", "acc", False, "einen roten Mantel"),
        ("a", "coat", "dat", False, "einem roten Mantel"),
        ("no", "bag", "nom", False, "keine rote Tasche"),
        ("my", "bag", "dat", False, "meiner roten Tasche"),
        ("your", "dress", "acc", False, "Ihr rotes Kleid"),
        ("our", "coat", "acc", False, "unseren roten Mantel"),
        ("their", "dress", "dat", False, "ihrem roten Kleid"),
        ("this", "coat", "nom", False, "dieser rote Mantel"),
        ("this", "dress", "nom", False, "dieses rote Kleid"),
        ("this", "bag", "dat", False, "dieser roten Tasche"),
        ("", "red wine", "acc", False, "roten Rotwein"),
        ("", "milk", "dat", False, "roter Milch"),
        ("", "water", "acc", False, "rotes Wasser"),
        ("", "apple", "acc", True, "rote Äpfel"),
        ("", "apple", "dat", True, "roten Äpfeln"),
        ("the", "book", "dat", True, "den roten Büchern"),
        ("the", "car", "dat", True, "den roten Autos"),
        ("my", "bag", "nom", True, "meine roten Taschen"),
        ("this", "coat", "acc", True, "diese roten Mäntel"),
    ],
)
def test_declension(determiner: str, name: str, case: str, plural: bool, expected: str) -> None:
    assert noun_phrase(determiner, noun(name), case, RED, plural)[1] == expected  # type: ignore[arg-type]


def test_english_phrases() -> None:
    assert noun_phrase("a", noun("umbrella"), "acc")[0] == "an umbrella"
    assert noun_phrase("a", noun("university"), "acc")[0] == "a university"
    assert noun_phrase("a", noun("university"), "acc", EXPENSIVE) == ("an expensive university", "eine teure Universität")
    assert noun_phrase("this", noun("scarf"), "acc", plural=True)[0] == "these scarves"


def test_contractions() -> None:
    pairs = {
        ("zu", "dem Bahnhof"): "zum Bahnhof",
        ("zu", "der Brücke"): "zur Brücke",
        ("in", "das Museum"): "ins Museum",
        ("in", "dem alten Park"): "im alten Park",
        ("in", "den Park"): "in den Park",
        ("auf", "dem Tisch"): "auf dem Tisch",
        ("an", "dem Brunnen"): "am Brunnen",
        ("in", "einem Hotel"): "in einem Hotel",
    }
    assert {pair: after(*pair) for pair in pairs} == pairs


def test_verbs() -> None:
    call, travel = VERBS["call"], VERBS["travel"]
    assert (call.present("3"), call.present("p"), call.joined("1"), call.joined("p"), call.zu()) == ("ruft", "rufen", "anrufe", "anrufen", "anzurufen")
    assert (travel.present("3"), travel.zu(), travel.auxiliary) == ("fährt", "zu fahren", "sein")


def test_word_order_in_generated_sentences() -> None:
    """Participles and infinitives stand at the end, the finite verb at the end of a subordinate clause."""
    targets = BOOK.train.targets
    because = [text for text in targets if ", weil " in text]
    assert because and all(text.rstrip(".").split()[-1] in ("habe", "hat", "haben", "bin", "ist", "sind") for text in because)
    purpose = [text for text in targets if ", um " in text and not text.startswith("Nehmen")]
    assert purpose and all(re.search(r"\bzu \w+\.$|\b\w+zu\w+en\.$", text) for text in purpose)
    turning = [text for text in targets if text.startswith("Biegen Sie")]
    assert turning and all(text.endswith(" ab.") for text in turning)


def test_prepositions_take_their_case() -> None:
    """Motion takes the accusative and rest the dative; no sentence has the other one."""
    for text in BOOK.train.targets:
        assert not re.search(r"\b(mit|aus|von|zu|bei|seit|nach) (den|einen|meinen|das|ein|die) (?!\w+n\b)", text), text
        assert not re.search(r"\b(für|ohne|um) (dem|einem|meinem)\b", text), text
        if " liegt " in text or " steht " in text and not text.endswith(" auf."):
            assert not re.search(r"\b(auf|unter|neben|hinter|vor) (den|das|die)\b", text), text
        if text.startswith(("Bitte legen", "Bitte stellen")):
            assert not re.search(r"\b(auf|unter|neben|hinter|vor) (dem|der)\b", text), text
