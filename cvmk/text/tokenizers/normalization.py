"""How text is normalised before it becomes pieces: one letter may be written in several ways that look the same.

The rules are stored with a tokenizer by name, and are the same for every kind of it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

# SentencePiece's rule nmt_nfkc is NFKC (of Unicode) after these, but for U+FF5E, which stays as it is.
_REMOVED = (*range(0x01, 0x09), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F)
_SPACES = (0x09, 0x0A, 0x0C, 0x0D, 0x61C, 0x1680, 0x200B, 0x200C, 0x200E, 0x200F, 0x2028, 0x2029, 0x2581, 0xFEFF, 0xFFFD)
_NMT = {**dict.fromkeys(_REMOVED), **dict.fromkeys(_SPACES, " ")}
_FULLWIDTH_TILDE = "\uff5e"


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _nmt_nfkc(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    parts = text.translate(_NMT).split(_FULLWIDTH_TILDE)
    return _FULLWIDTH_TILDE.join([unicodedata.normalize("NFKC", part) for part in parts])


def _identity(text: str) -> str:
    return text


IDENTITY = "identity"
RULES: dict[str, Callable[[str], str]] = {"nfc": _nfc, "nmt_nfkc": _nmt_nfkc, IDENTITY: _identity}
"""By their names in `tokenizer.normalization`. Each gives what it is given again where that is normalised."""
