"""What metrics and streams need to know of writing systems: which are written without spaces, and where the words of any text are."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache

_CHINESE, _JAPANESE, _OTHER = "zh", "ja", "other"
_UNSPACED = (
    # first and last character, and the languages: Chinese, Japanese, or others
    (0x0E00, 0x0E7F, _OTHER),  # Thai
    (0x0E80, 0x0EFF, _OTHER),  # Lao
    (0x0F00, 0x0FFF, _OTHER),  # Tibetan
    (0x1000, 0x109F, _OTHER),  # Burmese
    (0x1780, 0x17FF, _OTHER),  # Khmer
    (0x1950, 0x19DF, _OTHER),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF, _OTHER),  # Tai Tham
    (0x1B00, 0x1B7F, _OTHER),  # Balinese
    (0x2E80, 0x2FDF, _CHINESE),  # radicals
    (0x3005, 0x3007, _CHINESE),
    (0x3040, 0x30FF, _JAPANESE),  # hiragana, katakana
    (0x3100, 0x312F, _CHINESE),  # bopomofo
    (0x31A0, 0x31BF, _CHINESE),
    (0x31F0, 0x31FF, _JAPANESE),
    (0x3400, 0x4DBF, _CHINESE),
    (0x4E00, 0x9FFF, _CHINESE),
    (0xA000, 0xA4CF, _OTHER),  # Yi
    (0xA980, 0xA9FF, _OTHER),  # Javanese, more of Burmese
    (0xAA60, 0xAA7F, _OTHER),
    (0xF900, 0xFAFF, _CHINESE),
    (0xFF66, 0xFF9F, _JAPANESE),
    (0x20000, 0x323AF, _CHINESE),
)
_TIBETAN = range(0x0F00, 0x1000)
_NO_SCRIPT = ("LATIN", "MICRO", "FEMININE", "MASCULINE", "KELVIN", "ANGSTROM", "MATHEMATICAL", "DOUBLE-STRUCK", "BLACK-LETTER", "SCRIPT ")
"""How the names of letters begin that are Latin, or symbols in the shape of a letter."""
_JOINERS = "\u00ad\u200c\u200d"
_WORD = re.compile("a+|w[wm]*|cm*")
_WRITTEN = re.compile("m*cm*|m*w[wm]*|m+")


def unspaced_language(references: Iterable[str]) -> str | None:
    """The language that most letters speak for, where it is written without spaces: "zh", "ja" (which has ideographs too), or "other"."""
    counts = {_CHINESE: 0, _JAPANESE: 0, _OTHER: 0}
    letters = 0
    for text in references:
        for character in text:
            if character.isalpha():
                letters += 1
                if (family := _unspaced(character)) is not None:
                    counts[family] += 1
    if 2 * sum(counts.values()) <= letters:
        return None
    if counts[_OTHER] > counts[_CHINESE] + counts[_JAPANESE]:
        return _OTHER
    # Kana are half of a Japanese text, and a quotation in a Chinese one.
    return _JAPANESE if counts[_JAPANESE] * 4 > counts[_CHINESE] else _CHINESE


def is_latin(text: str) -> bool:
    """Whether at least half of the letters of a text are Latin; so it is where there are none."""
    kinds = [_kind(character) for character in text.lower() if character.isalpha()]
    return 2 * sum(kind in "wc" for kind in kinds) <= len(kinds)


def words(line: str) -> list[str]:
    """The lower-cased words of a text in any script, without punctuation marks and symbols.

    Latin text is split as ROUGE's script does: runs of a-z and 0-9. Other words are runs of letters, digits, and the marks on them, and where a
    script is written without spaces every character with its marks is a word. Words come in Unicode's composed form, without invisible joiners.
    """
    found = spans(line.lower(), _kind, _WORD)
    return [word if word.isascii() else unicodedata.normalize("NFC", word.translate(dict.fromkeys(map(ord, _JOINERS)))) for word in found]


def written_words(text: str) -> list[tuple[int, int]]:
    """Begin and end of every word as it is written, with its punctuation marks: what stands between spaces, and where a script is written without them
    every character with the marks around it."""
    return [match.span() for match in _WRITTEN.finditer("".join(map(_written_kind, text)))]


def complete_words(text: str) -> int:
    """Where the last word ends that nothing written behind the text can change: one with white space behind it, or of a script without spaces."""
    places = written_words(text)
    if places and places[-1][1] == len(text) and not any(_written_kind(character) == "c" for character in text[slice(*places[-1])]):
        places.pop()
    return places[-1][1] if places else 0


def spans(line: str, kind: Callable[[str], str], pattern: re.Pattern[str]) -> list[str]:
    """The parts of a line whose characters' kinds, one letter each, match the pattern."""
    return [line[match.start() : match.end()] for match in pattern.finditer("".join(map(kind, line)))]


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """a: a-z and 0-9; w: a letter or digit beyond Latin; c: one of a script without spaces; m: a mark, which continues such a word; blank: others."""
    if character.isascii():
        return "a" if character.isalnum() else " "
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Lm" and _unspaced(character) is None or character in _JOINERS:
        return "m"
    if category[0] != "L" and category != "Nd" and character != "〇" or unicodedata.name(character, "").startswith(_NO_SCRIPT):
        return " "
    # Tibetan has no spaces, but a mark after each syllable.
    return "c" if _unspaced(character) is not None and ord(character) not in _TIBETAN else "w"


@lru_cache(maxsize=1 << 16)
def _written_kind(character: str) -> str:
    """c and w as of `_kind`, with Latin among w; m: marks and punctuation; blank: white space."""
    if character.isspace():
        return " "
    if not character.isalnum():
        return "m"
    return "c" if _unspaced(character) is not None and ord(character) not in _TIBETAN else "w"


@lru_cache(maxsize=1 << 16)
def _unspaced(character: str) -> str | None:
    code = ord(character)
    return next((language for first, last, language in _UNSPACED if first <= code <= last), None)
