"""A report as Markdown (GitHub's, with tables): the same as the page, with the curves as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import singledispatch

from cvmk.report.charts import spread
from cvmk.report.differences import Part, Sample
from cvmk.report.document import Block, Bullets, Cell, Charts, Document, Folded, Samples, Section, Table, Text
from cvmk.report.history import Bin

_SPECIAL = re.compile(r"([\\`*{}\[\]#|~!$]|(?<![^\W_])_|_(?![^\W_]))")  # of _ those that are not within a word
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BEGINNING = re.compile(r"^(\d+)([.)])(?=\s|$)|^([-+=:])(?=[-+=:\s]|$)")
_ROWS = 10


def escape(text: str) -> str:
    """Text that is not ours, on one line, with nothing in it that Markdown or HTML would read."""
    text = _SPECIAL.sub(r"\\\1", _UNPRINTABLE.sub(" ", text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _BEGINNING.sub(lambda found: f"{found[1]}\\{found[2]}" if found[1] else f"\\{found[3]}", text)


def markdown(document: Document) -> str:
    parts = [f"# {escape(document.title)}", escape(document.subtitle), *map(_section, document.sections)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> str:
    return "\n\n".join([f"## {escape(section.title)}", *filter(None, map(_block, section.blocks))])


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(type(block))


@_block.register
def _(block: Text) -> str:
    if block.heading:
        return f"### {escape(block.text)}"
    return f"> **Note:** {escape(block.text)}" if block.warning else escape(block.text)


@_block.register
def _(block: Bullets) -> str:
    return "\n".join(f"- **{escape(term)}**: {escape(text)}" if term else f"- {escape(text)}" for term, text in block.points)


@_block.register
def _(block: Table) -> str:
    rule = [":---" if at < block.texts else "---:" for at in range(len(block.header))]
    rows = [[escape(name) for name in block.header], rule, *([_cell(cell) for cell in row] for row in block.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(cell: str | Cell) -> str:
    text, tone = (cell, "") if isinstance(cell, str) else cell
    return f"**{escape(text)}**" if tone else escape(text)


@_block.register
def _(block: Charts) -> str:
    """Of every curve its beginning, some places between, and its end."""
    parts = []
    for chart in block.charts:
        if not all(line.joined for line in chart.lines):
            continue  # dots have no value between them, and stand in a table of their own
        title = f"**{escape(chart.title)}**" + (f" ({escape(chart.unit)})" if chart.unit else "")
        steps = spread(sorted({one.last for line in chart.lines for one in line.bins}), _ROWS)
        rows = [[str(step), *(_at(line.bins, step) for line in chart.lines)] for step in steps]
        parts.append(f"{title}\n\n{_block(Table([chart.axis, *(line.name for line in chart.lines)], rows, texts=0))}")
    return "\n\n".join(parts)


def _at(bins: Sequence[Bin], step: int) -> str:
    """The value at an iteration: of the last bin that reaches to it."""
    found = [one for one in bins if one.first <= step <= one.last] or [one for one in bins if one.last <= step][-1:]
    return f"{found[-1].mean:.4g}" if found else "–"


@_block.register
def _(block: Folded) -> str:
    return "\n\n".join([f"### {escape(block.title)}", *filter(None, map(_block, block.blocks))])


@_block.register
def _(block: Samples) -> str:
    several = any(len(sample.translations) > 1 for sample in block.samples)
    other = " _slanted_ where the first system says something else," if several else ""
    return "\n\n".join([f"**Bold** words are not in the reference,{other} ~~struck~~ ones are in the reference alone.", *map(_sample, block.samples)])


def _sample(sample: Sample) -> str:
    rows = [("source", escape(sample.source)), ("reference", escape(sample.reference))]
    rows += [(escape(one.system), "".join(_parts(one.parts)).strip() or "(empty)") for one in sample.translations]
    return "\n".join([f"{escape(sample.set)}, sentence {sample.line}: {escape(sample.why)}", "", *(f"- {name}: {text}" for name, text in rows)])


def _parts(parts: Sequence[Part]) -> Iterator[str]:
    """Marks stand close to the words that they are about, or Markdown does not take them for marks."""
    for part in parts:
        text = part.text.rstrip()
        inner = escape(text)
        if inner and part.missing:
            inner = f"~~{inner}~~"
        if inner and part.changed:
            inner = f"_{inner}_"
        if inner and part.extra:
            inner = f"**{inner}**"
        yield inner + part.text[len(text) :]
