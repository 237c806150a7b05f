"""What encoding a text is in, as far as its first bytes tell."""

from __future__ import annotations

import codecs
import unicodedata

ENOUGH = 4096  # bytes to look at
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_BINARY = 0.2  # share of control characters that no UTF-8 text has


def other_than_utf8(head: bytes) -> str | None:
    """The name of the encoding (as iconv knows it) of a text that begins with `head` and is not UTF-8; None where nothing says so.

    UTF-16 without a byte order mark is told by its NUL bytes, so only where the text has ASCII characters (line ends, blanks).
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if b"\0" not in head or not _unlikely_utf8(head):
        return None
    scores = {name: _ascii_of_text(head, name) for name in ("UTF-16LE", "UTF-16BE")}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] else None


def _unlikely_utf8(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return sum(not _textual(character) for character in text) >= _BINARY * len(text)


def _ascii_of_text(head: bytes, name: str) -> int:
    """How many ASCII characters `head` has in this encoding; 0 where it is no text in it."""
    try:
        text = codecs.getincrementaldecoder(name)().decode(head)
    except UnicodeDecodeError:
        return 0
    return sum(character.isascii() for character in text) if all(map(_textual, text)) else 0


def _textual(character: str) -> bool:
    return character in "\t\n\r" or unicodedata.category(character) not in ("Cc", "Cn", "Co", "Cs")
