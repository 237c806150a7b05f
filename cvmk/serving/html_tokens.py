"""HTML cut into tags, text and the rest as browsers cut it (WHATWG HTML, 13.2.5), without losing a character.

Python's html.parser takes seconds for a few kilobytes of tags that never end, and keeps no place of what it reads; this takes time linear in the text.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from html import unescape
from html.entities import html5
from types import MappingProxyType
from typing import NamedTuple

_OPENING = re.compile(r"<([A-Za-z][^\s/>]*)")
_CLOSING = re.compile(r"</([A-Za-z][^\s/>]*)")
_ATTRIBUTE = re.compile(r"[\s/]*(?:(?P<end>>)|(?P<name>[^\s/>][^\s/>=]*)(?:\s*=\s*(?P<value>\"[^\"]*\"?|'[^']*'?|[^\s>\"'][^\s>]*)?)?)")
_RAW_TEXT = frozenset("script style xmp iframe noembed noframes plaintext".split())
_RAW_WITH_REFERENCES = frozenset(("textarea", "title"))
_REFERENCE = re.compile(r"&(?:#[xX][0-9A-Fa-f]+;?|#[0-9]+;?|(?P<name>[A-Za-z][A-Za-z0-9]{0,40};?))")
_NO_ATTRIBUTES: Mapping[str, str] = MappingProxyType({})


class Kind(enum.Enum):
    TEXT = enum.auto()
    OPEN = enum.auto()
    CLOSE = enum.auto()
    OTHER = enum.auto()
    """Comments, declarations, what stands in a script or style, and a tag that never ends."""


class Token(NamedTuple):
    kind: Kind
    raw: str
    tag: str = ""
    """In lower case, of OPEN and CLOSE."""
    attributes: Mapping[str, str] = _NO_ATTRIBUTES
    """Of OPEN: names in lower case, values without quotation marks and character references."""


def tokens(document: str) -> Iterator[Token]:
    """The document's tokens; their `raw`, one behind the other, are the document."""
    place = begin = 0  # text goes from `begin` to `place`
    while (place := document.find("<", place)) >= 0:
        token = _markup(document, place)
        if token is None:
            place += 1
            continue
        if begin < place:
            yield Token(Kind.TEXT, document[begin:place])
        yield token
        begin = place = place + len(token.raw)
        if token.kind is Kind.OPEN and token.tag in _RAW_TEXT | _RAW_WITH_REFERENCES:
            place = _end_of_raw(document, place, token.tag)
            if begin < place:
                yield Token(Kind.OTHER if token.tag in _RAW_TEXT else Kind.TEXT, document[begin:place])
            begin = place
    if begin < len(document):
        yield Token(Kind.TEXT, document[begin:])


def _markup(document: str, place: int) -> Token | None:
    """The token that the "<" at `place` begins, or None where it is text."""
    if (match := _OPENING.match(document, place)) is not None:
        return _tag(document, Kind.OPEN, match)
    if (match := _CLOSING.match(document, place)) is not None:
        return _tag(document, Kind.CLOSE, match)
    for begin, end in (("<!-->", ""), ("<!--->", ""), ("<!--", "-->"), ("<![CDATA[", "]]>"), ("<!", ">"), ("<?", ">"), ("</", ">")):
        if document.startswith(begin, place):
            last = document.find(end, place + len(begin))
            return Token(Kind.OTHER, document[place : last + len(end)] if last >= 0 else document[place:])
    return None


def _tag(document: str, kind: Kind, match: re.Match[str]) -> Token:
    attributes: dict[str, str] = {}
    place = match.end()
    while (part := _ATTRIBUTE.match(document, place)) is not None and part["end"] is None:
        value = part["value"] or ""
        if value[:1] in ("'", '"') and value:
            value = value[1:].removesuffix(value[0])
        attributes.setdefault(part["name"].lower(), unescape(value))
        place = part.end()
    if part is None:
        return Token(Kind.OTHER, document[match.start() :])
    return Token(kind, document[match.start() : part.end()], match[1].lower(), attributes if kind is Kind.OPEN else _NO_ATTRIBUTES)


def _end_of_raw(document: str, place: int, tag: str) -> int:
    if tag == "plaintext":
        return len(document)
    end = re.compile(rf"</{tag}(?=[\s/>])", re.IGNORECASE).search(document, place)
    return end.start() if end else len(document)


def characters(raw: str) -> Iterator[tuple[str, str]]:
    """Each character of a text with what the document has for it: itself, or a character reference (for the first, where it stands for several)."""
    place = 0
    for match in _REFERENCE.finditer(raw):
        if match.start() < place:
            continue
        end = match.end()
        if (name := match["name"]) is not None and name not in html5:
            known = next((length for length in range(len(name) - 1, 1, -1) if name[:length] in html5), None)
            if known is None:
                continue
            end = match.start("name") + known
        yield from ((char, char) for char in raw[place : match.start()])
        reference = raw[match.start() : end]
        meant = unescape(reference) or "\ufffd"
        yield meant[0], reference
        yield from ((char, "") for char in meant[1:])
        place = end
    yield from ((char, char) for char in raw[place:])
