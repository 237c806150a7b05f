"""A report as one HTML file: style and charts inside, no script, nothing fetched, for light and dark screens of any width and for paper."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import singledispatch
from html import escape as _escape
from pathlib import Path

from cvmk.report.differences import Part, Sample
from cvmk.report.document import Block, Bullets, Cell, Chart, Charts, Document, Folded, Samples, Section, Table, Text
from cvmk.report.svg import svg, swatch

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""What turns the direction of everything after it, beyond the text that it stands in."""


def escape(text: str) -> str:
    """Text that is not ours, such as a sentence, as HTML: nothing in it is markup, and characters that HTML cannot hold are replaced."""
    return _escape(_BIDI.sub("", _UNPRINTABLE.sub("\ufffd", text)))


def html(document: Document) -> str:
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{_anchor(at)}">{escape(section.title)}</a>' for at, section in enumerate(document.sections))
    sections = "".join(_section(at, section) for at, section in enumerate(document.sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(document.title)} – cvmk report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(document.title)}</h1>\n<p>{escape(document.subtitle)}</p>\n</header>\n<nav aria-label=\"Sections\">{links}</nav>\n"
        f"<main>\n{sections}</main>\n</body>\n</html>\n"
    )


def _anchor(at: int) -> str:
    return f"section-{at + 1}"


def _section(at: int, section: Section) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return f'<section id="{_anchor(at)}">\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>\n'


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(type(block))


@_block.register
def _(block: Text) -> str:
    if block.heading:
        return f"<h3>{escape(block.text)}</h3>"
    return f'<p class="warning">{escape(block.text)}</p>' if block.warning else f"<p>{escape(block.text)}</p>"


@_block.register
def _(block: Bullets) -> str:
    points = (f"<b>{escape(term)}</b>: {escape(text)}" if term else escape(text) for term, text in block.points)
    return f"<ul>{''.join(f'<li>{point}</li>' for point in points)}</ul>"


@_block.register
def _(block: Table) -> str:
    head = "".join(f'<th scope="col"{_number(at, block)}>{escape(name)}</th>' for at, name in enumerate(block.header))
    body = "".join(f"<tr>{''.join(_cell(at, cell, block) for at, cell in enumerate(row))}</tr>" for row in block.rows)
    label = escape(f"Table: {', '.join(name for name in block.header[:3] if name)}")
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(at: int, table: Table) -> str:
    return "" if at < table.texts else ' class="n"'


_SHORT = 28
"""A text of so many characters is not broken over lines in a table."""


def _cell(at: int, cell: str | Cell, table: Table) -> str:
    text, tone = (cell, "") if isinstance(cell, str) else cell
    inner = f'<span class="{tone}">{escape(text)}</span>' if tone else escape(text)
    short = ' class="short"' if at < table.texts and len(text) <= _SHORT else ""
    if at == 0 and table.texts:
        return f'<th scope="row"{short}>{inner}</th>'
    return f"<td{_number(at, table)}{short}{_direction(text)}>{inner}</td>"


def _direction(text: str) -> str:
    return "" if text.isascii() else ' dir="auto"'


@_block.register
def _(block: Charts) -> str:
    names = "".join(f"<li>{swatch(color)}{escape(name)}</li>" for name, color in block.names)
    legend = f'<ul class="legend">{names}</ul>' if names else ""
    return f'{legend}<div class="charts">{"".join(_figure(chart, own=not block.names) for chart in block.charts)}</div>'


def _figure(chart: Chart, *, own: bool) -> str:
    told = ", ".join(part for part in (chart.unit, f"shaded: {chart.band}" if chart.band else "", "logarithmic" if chart.logarithmic else "") if part)
    unit = f" <span>{escape(told)}</span>" if told else ""
    names = "".join(f"<li>{swatch(line.color, joined=line.joined)}{escape(line.name)}</li>" for line in chart.lines) if own and len(chart.lines) > 1 else ""
    legend = f'<ul class="legend">{names}</ul>' if names else ""
    return f"<figure><figcaption>{escape(chart.title)}{unit}</figcaption>{legend}{svg(chart)}</figure>"


@_block.register
def _(block: Folded) -> str:
    return f"<details><summary>{escape(block.title)}</summary>\n{''.join(map(_block, block.blocks))}\n</details>"


@_block.register
def _(block: Samples) -> str:
    several = any(len(sample.translations) > 1 for sample in block.samples)
    other = " <u>dotted</u> where the first system says something else;" if several else ""
    key = f'<p class="key"><mark>marked</mark> words are not in the reference;{other} <del>struck</del> ones are in the reference alone</p>'
    return key + "".join(map(_sample, block.samples))


def _sample(sample: Sample) -> str:
    rows = [("source", escape(sample.source)), ("reference", escape(sample.reference))]
    rows += [(escape(one.system), "".join(_parts(one.parts)) or "(empty)") for one in sample.translations]
    lines = "".join(f'<dt>{name}</dt><dd dir="auto">{text}</dd>' for name, text in rows)
    return f'<div class="sample"><h3>{escape(sample.set)}, sentence {sample.line}: {escape(sample.why)}</h3><dl>{lines}</dl></div>'


def _parts(parts: Sequence[Part]) -> Iterator[str]:
    """The space behind a part stays outside of its mark."""
    for part in parts:
        text = part.text.rstrip()
        inner = escape(text)
        if part.missing:
            inner = f"<del>{inner}</del>"
        if part.changed:
            inner = f"<u>{inner}</u>"
        if part.extra:
            inner = f"<mark>{inner}</mark>"
        yield inner + part.text[len(text) :]
