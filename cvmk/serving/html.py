"""HTML that is translated between its tags, and kept whole.

Tags, attributes, comments, and what stands in scripts, code and the like (`KEPT`, translate="no", class="notranslate") stay as they are, and so does every
text whose translation is the text itself, to the byte. White space in a sentence is one space, as a browser shows it.

A sentence may have tags within it ("a <b>red</b> car"). It is translated whole, and so is what each of its elements holds ("red"); where the
translation of the element is found in that of the sentence, as it is or with other endings, there the tags go. An element that is not found goes around as many
words, at the place that it had in the sentence. What is kept within a sentence (`<code>`) is found as it is; where it is not, or a sentence has very many
tags, the pieces between the tags are translated each by itself: that is worse text, but nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from os.path import commonprefix
from typing import NamedTuple

from cvmk.serving.html_tokens import Kind, Token, characters, tokens
from cvmk.serving.passages import Piece, pieces, space_between
from cvmk.streaming import Sentences

KEPT = frozenset("script style pre code kbd samp var tt textarea template svg math canvas object iframe noembed noframes xmp plaintext listing".split())
"""Elements that hold no text to be translated."""
_INLINE = frozenset(
    "a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label mark math q ruby s samp small span strike strong sub sup svg time tt u"
    " var wbr".split()
)
"""Elements that a sentence goes through; all others end it."""
_VOID = frozenset("area base basefont bgsound br col embed frame hr img input keygen link meta param source track wbr".split())
_MOST_TAGS = 32
"""In a sentence; one with more is translated in the pieces between them."""
_MOST_WORDS = 6
"""Of an element that is looked for word by word."""
_SPACE = " \t\n\f\r"
_FILLER = "\ufffc"
"""A character, no letter, that ends no sentence, in the place of those that are kept."""


class _Cell(NamedTuple):
    """A character, an element that is kept, or a tag, which has no text."""

    text: str
    raw: str
    token: Token | None = None


@dataclass
class _Node:
    """An element of a sentence; without `opening` it began before the sentence, without `closing` it goes on behind."""

    opening: str | None = None
    closing: str | None = None
    children: list[_Cell | _Node] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child.text for child in self.children)

    @property
    def raw(self) -> str:
        return (self.opening or "") + "".join(child.raw for child in self.children) + (self.closing or "")

    def elements(self) -> list[_Node]:
        return [child for child in self.children if isinstance(child, _Node)]


class _NotFound(Exception):
    """What is to be kept is not in the translation of its sentence."""


class Document:
    """An HTML document or a part of one."""

    def __init__(self, document: str, sentences: Sentences | None = None) -> None:
        self._parts: list[str | _Sentence] = []
        self._sentences = sentences or Sentences()
        run: list[_Cell] = []
        for cell in _cells(document):
            if cell.token is not None and cell.token.kind is not Kind.OTHER and cell.token.tag not in _INLINE:
                self._end(run)
                self._parts.append(cell.raw)
                run = []
            else:
                run.append(cell)
        self._end(run)

    @property
    def text(self) -> str:
        """What there is to be translated, a sentence a line."""
        return "\n".join(part.text for part in self._parts if isinstance(part, _Sentence))

    def wanted(self, known: Mapping[str, str]) -> Iterator[str]:
        """Texts whose translations are not `known` and are needed next; none where `render` has all that it needs."""
        return (text for part in self._parts if isinstance(part, _Sentence) for text in part.wanted(known))

    def render(self, known: Mapping[str, str]) -> str:
        """The translated document."""
        said: list[str] = []
        for place, part in enumerate(self._parts):
            said.append(part if isinstance(part, str) else part.render(known))
            if isinstance(part, _Sentence) and isinstance(self._parts[min(place + 1, len(self._parts) - 1)], _Sentence):
                said.append(space_between(part.text, known.get(part.text, "")))
        return "".join(said)

    def _end(self, run: list[_Cell]) -> None:
        """A run of text and inline tags is over: its sentences, and what stands between them."""
        text = "".join(cell.text if cell.token is None else _FILLER * len(cell.text) for cell in run)
        place = offset = 0
        for piece in (Piece(0, 0, False), *pieces(text, self._sentences)):
            begin = place
            while place < len(run) and (offset < piece.end or not piece.is_sentence and _is_between(run[place])):
                offset += len(run[place].text)
                place += 1
            cells = run[begin:place]
            self._parts.append(_Sentence(cells) if piece.is_sentence else "".join(cell.raw for cell in cells))
        self._parts.append("".join(cell.raw for cell in run[place:]))


def _is_between(cell: _Cell) -> bool:
    """Whether it stands between sentences where it touches one: white space that is not shown, and the end of an element."""
    return not cell.text and (cell.token is None or cell.token.kind is Kind.CLOSE)


def _cells(document: str) -> Iterator[_Cell]:
    """The document's characters and tags. White space that a browser does not show has no text."""
    kept: list[Token] = []
    depth = 0
    spaced = True
    for token in tokens(document):
        if kept:
            kept.append(token)
            depth += (token.tag == kept[0].tag) * ((token.kind is Kind.OPEN) - (token.kind is Kind.CLOSE))
            if depth == 0:
                cell = _kept_cell(kept)
                yield cell
                kept, spaced = [], spaced and not cell.text
        elif token.kind is Kind.OPEN and _is_kept(token):
            kept, depth = [token], 1
        elif token.kind is Kind.TEXT:
            for char, raw in characters(token.raw):
                blank = char in _SPACE
                yield _Cell("" if blank and spaced else " " if blank else char, raw)
                spaced = blank
        else:
            yield _Cell("", token.raw, token)
            spaced = spaced or (token.kind is not Kind.OTHER and token.tag not in _INLINE)
    if kept:  # an element that never ends
        yield _Cell("", "".join(token.raw for token in kept), Token(Kind.OTHER, ""))


def _is_kept(token: Token) -> bool:
    if token.tag in _VOID:
        return False
    is_marked = token.attributes.get("translate", "").lower() == "no" or "notranslate" in token.attributes.get("class", "").split()
    return is_marked or token.tag in KEPT and not (token.tag in ("svg", "math") and token.raw.endswith("/>"))


def _kept_cell(kept: list[Token]) -> _Cell:
    text = "".join(char for token in kept if token.kind is Kind.TEXT for char, _ in characters(token.raw)) if kept[0].tag in _INLINE else ""
    return _Cell(re.sub(rf"[{_SPACE}]+", " ", text), "".join(token.raw for token in kept), kept[0])


def _tree(cells: list[_Cell]) -> _Node:
    """The elements of a sentence. One that is closed out of turn closes those that it holds, as far as the sentence goes."""
    stack = [_Node()]
    for cell in cells:
        token = cell.token
        if token is None or token.kind is Kind.OTHER or token.tag in _VOID or cell.text or token.raw != cell.raw:
            stack[-1].children.append(cell)
        elif token.kind is Kind.OPEN:
            stack.append(_Node(cell.raw))
            stack[-2].children.append(stack[-1])
        elif len(stack) > 1:
            stack.pop().closing = cell.raw
        else:
            stack[0] = _Node(children=[_Node(None, cell.raw, stack[0].children)])
    return stack[0]


class _Sentence:
    def __init__(self, cells: list[_Cell]) -> None:
        self.text = "".join(cell.text for cell in cells)
        self._cells = cells
        self._root = _tree(cells) if sum(cell.token is not None for cell in cells) <= _MOST_TAGS else None

    def wanted(self, known: Mapping[str, str]) -> Iterator[str]:
        if self._root is not None and (missing := {self.text, *filter(_has_letters, _element_texts(self._root))} - known.keys()):
            yield from sorted(missing)
        elif self._placed(known) is None:
            yield from sorted({text for _, text in self._runs() if _has_letters(text)} - known.keys())

    def render(self, known: Mapping[str, str]) -> str:
        placed = self._placed(known)
        return "".join(_with_spaces(raw, text, known) for raw, text in self._runs()) if placed is None else placed

    def _placed(self, known: Mapping[str, str]) -> str | None:
        try:
            return None if self._root is None else _place(self._root, known[self.text], known)
        except _NotFound:
            return None

    def _runs(self) -> Iterator[tuple[str, str]]:
        """Tags and what is between them, as the document has it, and the text of it, "" for a tag."""
        for is_text, cells in groupby(self._cells, lambda cell: cell.token is None):
            run = list(cells)
            yield "".join(cell.raw for cell in run), "".join(cell.text for cell in run).strip(_SPACE) if is_text else ""


def _with_spaces(raw: str, text: str, known: Mapping[str, str]) -> str:
    """The translation of a piece, with the white space that is around it in the document."""
    translation = known.get(text, text)
    if translation == text:
        return raw
    return raw[: len(raw) - len(raw.lstrip(_SPACE))] + escape(translation, quote=False) + raw[len(raw.rstrip(_SPACE)) :]


def _has_letters(text: str) -> bool:
    return any(map(str.isalpha, text))


def _element_texts(node: _Node) -> Iterator[str]:
    for element in node.elements():
        yield element.text.strip()
        yield from _element_texts(element)


def _place(node: _Node, translation: str, known: Mapping[str, str]) -> str:
    """The translation of what an element holds, with the tags within it. Raises _NotFound."""
    if translation.strip() == node.text.strip():
        return "".join(child.raw for child in node.children)
    inner = [child for child in node.children if isinstance(child, _Node) or child.token is not None]
    taken: list[tuple[int, int, str]] = []
    for child in sorted((child for child in inner if child.text.strip()), key=lambda child: -len(child.text)):
        begin, end = _span(node, child, translation, known, taken)
        if isinstance(child, _Node):
            taken.append((begin, end, (child.opening or "") + _place(child, translation[begin:end], known) + (child.closing or "")))
        else:
            taken.append((begin, end, child.raw))
    for child in inner:
        if not child.text.strip():
            place = _nearest_gap(translation, _share(node, child) * len(translation), taken)
            taken.append((place, place, child.raw))
    said, done = "", 0
    for begin, end, raw in sorted(taken, key=lambda span: span[:2]):
        said += escape(translation[done:begin], quote=False) + raw
        done = end
    return said + escape(translation[done:], quote=False)


_Span = tuple[int, int]


def _span(node: _Node, child: _Node | _Cell, translation: str, known: Mapping[str, str], taken: list[tuple[int, int, str]]) -> _Span:
    """Where an element is in the translation of what is around it: of several places the one that is nearest to where it was. Raises _NotFound."""

    def is_free(span: _Span) -> bool:
        return all(span[1] <= first or last <= span[0] for first, last, _ in taken)

    text, begin = child.text.strip(), _share(node, child) * len(translation)
    if isinstance(child, _Cell):
        spans = [span for span in _occurrences(text, translation) if is_free(span)]
        if not spans:
            raise _NotFound
        return min(spans, key=lambda span: abs(span[0] - begin))
    said = known.get(text, text)
    spans = [span for find in (_occurrences, _word_runs) for span in find(said, translation) if is_free(span)]
    if child.opening is None:
        spans = [(0, last) for first, last in spans if not translation[:first].strip()]
    if child.closing is None:
        spans = [(first, len(translation)) for first, last in spans if not _has_letters(translation[last:])]
    if spans:
        longest = max(last - first for first, last in spans)
        return min((span for span in spans if span[1] - span[0] == longest), key=lambda span: abs(span[0] - begin))
    return _by_share(child, translation, begin, begin + len(child.text) / max(1, len(node.text)) * len(translation), is_free)


def _occurrences(said: str, translation: str) -> list[_Span]:
    """Where a text is in another, as whole words where there are words; without a full stop at its end, which what stands alone is often given."""
    said = said.strip().rstrip(".。")
    if not said:
        return []
    pattern = re.escape(said) if " " not in translation else rf"(?<!\w){re.escape(said)}(?!\w)"
    return [match.span() for match in re.finditer(pattern, translation, re.IGNORECASE)]


def _word_runs(said: str, translation: str) -> list[_Span]:
    """The longest runs of words that are in both but for their endings, and more than half of what is looked for: "blaues Hemd" in "im blauen Hemd"."""
    wanted, words = re.findall(r"\w+", said.casefold()), list(re.finditer(r"\w+", translation))
    if not 0 < len(wanted) <= _MOST_WORDS:
        return []
    alike = [[_are_alike(one, word[0].casefold()) for word in words] for one in wanted]
    for length in range(len(wanted), 0, -1):
        found = [
            (words[place].start(), words[place + length - 1].end())
            for first in range(len(wanted) - length + 1)
            if 2 * sum(map(len, wanted[first : first + length])) > sum(map(len, wanted))
            for place in range(len(words) - length + 1)
            if all(alike[first + step][place + step] for step in range(length))
        ]
        if found:
            return found
    return []


def _are_alike(one: str, other: str) -> bool:
    common = len(commonprefix((one, other)))
    return one == other or (common >= 3 and common >= 0.6 * max(len(one), len(other)))


def _by_share(child: _Node, translation: str, begin: float, end: float, is_free: Callable[[_Span], bool]) -> _Span:
    """As many words as the element had its share of, where it had it; none where others have them."""
    words = [match.span() for match in re.finditer(r"\w+", translation) if is_free(match.span())]
    first = 0 if child.opening is None else min((span[0] for span in words), key=lambda place: abs(place - begin), default=None)
    last = len(translation) if child.closing is None else min((span[1] for span in words), key=lambda place: abs(place - end), default=None)
    if first is None or last is None or last <= first:
        first, last = next((span for span in words if span[0] == first), (-1, -1))
    if first >= 0 and is_free((first, last)):
        return first, last
    place = min((span[0] for span in words), key=lambda place: abs(place - begin), default=len(translation))
    return place, place


def _share(node: _Node, child: _Node | _Cell) -> float:
    """How much of the text of an element stands before a part of it, from 0 to 1."""
    before = 0
    for other in node.children:
        if other is child:
            break
        before += len(other.text)
    return before / max(1, len(node.text))


def _nearest_gap(translation: str, wanted: float, taken: list[tuple[int, int, str]]) -> int:
    """The beginning of a word nearest to a place, outside of what is taken."""
    gaps = [0, len(translation), *(match.end() for match in re.finditer(r"\s", translation))]
    return min((gap for gap in gaps if not any(begin < gap < end for begin, end, _ in taken)), key=lambda gap: abs(gap - wanted))
