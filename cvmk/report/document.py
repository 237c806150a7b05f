"""What a report consists of, whatever it is written as: sections of texts, tables, charts and samples. `html` and `markdown` write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cvmk.report.differences import Sample
from cvmk.report.history import Bin


class Cell(NamedTuple):
    """A cell of a table; `tone` is "good", "bad" or nothing."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; a `warning` is one that nobody should miss, a `heading` stands above what follows."""

    text: str
    warning: bool = False
    heading: bool = False


@dataclass(frozen=True)
class Bullets:
    """Points, each with a term before it or an empty one."""

    points: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """`texts` says how many of the first columns are texts; the others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    texts: int = 1


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    name: str
    bins: Sequence[Bin]
    color: int
    """Its place among the lines of all charts."""
    joined: bool = True
    """Whether its points follow each other; else each is a dot of its own."""


@dataclass(frozen=True)
class Chart:
    """Lines over iterations, or whatever `axis` says."""

    title: str
    unit: str
    lines: Sequence[Line]
    band: str = ""
    """What lies between `low` and `high` of a bin; nothing where that is not drawn."""
    marks: Sequence[tuple[int, str]] = ()
    """Iterations at which something happened."""
    logarithmic: bool = False
    dots: bool = False
    """Whether the bins are few and shown one by one."""
    axis: str = "iteration"


@dataclass(frozen=True)
class Charts:
    """Charts of the same lines, whose names are told once."""

    charts: Sequence[Chart]
    names: Sequence[tuple[str, int]] = ()
    """The lines' names and colours; empty where one is there and needs no name."""


@dataclass(frozen=True)
class Samples:
    samples: Sequence[Sample]


@dataclass(frozen=True)
class Folded:
    """What few readers want: closed on a screen until it is asked for, open on paper."""

    title: str
    blocks: Sequence[Block]


Block = Text | Bullets | Table | Charts | Samples | Folded


@dataclass
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    sections: Sequence[Section]
