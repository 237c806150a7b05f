"""Numbers over a run, in bounded memory: neighbours are merged where they become too many, and what was least and greatest among them is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CAPACITY = 1 << 15
"""Rows that are kept; more are merged two by two."""
_WAITING = 1 << 13
_LARGEST = 1e300
"""What is larger, whose sums may not be finite, counts as missing."""
Floats = NDArray[np.float64]

_FIXED = 6
_STEP, _STEP_LAST, _TIME, _TIME_LAST, _SEGMENT, _EVENTS = range(_FIXED)
_LEAST, _GREATEST, _SUM, _COUNT = range(4)


class Table:
    """Rows [rows, 6 + 4 * fields] of float64: first and last step and time, segment, events; then least, greatest, sum and count of every field.

    A row stands for `width` events of one segment (the last of a segment for fewer). Numbers that are not finite count as missing.
    """

    def __init__(self, fields: Sequence[str] = ()) -> None:
        self.fields = list(fields)
        self._rows: Floats = np.empty((256, _FIXED + 4 * len(self.fields)))
        self._length = 0
        self._width = 1
        self._waiting: list[tuple[float, float, int, Mapping[str, float]]] = []

    def add(self, step: float, time: float, segment: int, values: Mapping[str, float]) -> None:
        """One event, after all others. A field that is new is a new column."""
        self._waiting.append((step, time, segment, values))
        if len(self._waiting) >= _WAITING:
            self._settle()

    def rows(self) -> Floats:
        self._settle()
        return self._rows[: self._length]

    def _settle(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        self._widen({name for *_, values in waiting for name in values} - set(self.fields))
        steps, times, segments = (np.array([row[place] for row in waiting], dtype=np.float64) for place in range(3))
        found = np.array([[values.get(name, np.nan) for name in self.fields] for *_, values in waiting], dtype=np.float64).reshape(len(waiting), -1)
        found[~(np.abs(found) < _LARGEST)] = np.nan
        missing = np.isnan(found)
        new = np.column_stack((steps, steps, times, times, segments, np.ones(len(waiting)), found, found, np.where(missing, 0, found), ~missing))
        if self._width > 1 and self._length:
            self._length -= 1  # the last row may not be full
            new = self._merged(np.concatenate((self._rows[self._length : self._length + 1], new)))
        self._append(new)
        while self._length > CAPACITY:
            self._width *= 2
            shorter = self._merged(self._rows[: self._length])
            if len(shorter) > 0.75 * self._length:  # segments without end: they are merged too
                shorter = self._merged(self._rows[: self._length], across=True)
            self._rows[: len(shorter)] = shorter
            self._length = len(shorter)

    def _widen(self, names: set[str]) -> None:
        if not names:
            return
        old, count = self._rows[: self._length], len(self.fields)
        parts = [old[:, :_FIXED]]
        for part, empty in ((_LEAST, np.nan), (_GREATEST, np.nan), (_SUM, 0.0), (_COUNT, 0.0)):
            parts += [old[:, _FIXED + part * count : _FIXED + (part + 1) * count], np.full((len(old), len(names)), empty)]
        self.fields += sorted(names)
        self._rows = np.concatenate(parts, axis=1)

    def _append(self, new: Floats) -> None:
        if (needed := self._length + len(new)) > len(self._rows):
            grown = np.empty((max(needed, min(2 * len(self._rows), CAPACITY + _WAITING)), self._rows.shape[1]))
            grown[: self._length] = self._rows[: self._length]
            self._rows = grown
        self._rows[self._length : needed] = new
        self._length = needed

    def _merged(self, rows: Floats, across: bool = False) -> Floats:
        """Neighbours of a segment together, `width` events to a row."""
        segments = np.zeros(len(rows)) if across else rows[:, _SEGMENT]
        begins = np.flatnonzero(np.diff(segments, prepend=np.nan) != 0)
        before = np.cumsum(rows[:, _EVENTS]) - rows[:, _EVENTS]
        before -= np.repeat(before[begins], np.diff(begins, append=len(rows)))
        return grouped(rows, np.floor(before / self._width), segments)


def grouped(rows: Floats, *keys: NDArray[Any]) -> Floats:
    """Rows of a table with neighbours that agree in all keys made one."""
    if not len(rows):
        return rows
    changes = np.zeros(len(rows), dtype=bool)
    changes[0] = True
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    at = np.flatnonzero(changes)
    if len(at) == len(rows):
        return rows
    last = np.append(at[1:], len(rows)) - 1
    fields = (rows.shape[1] - _FIXED) // 4
    least, greatest, sums = (slice(_FIXED + part * fields, _FIXED + (part + 1) * fields) for part in (_LEAST, _GREATEST, _SUM))
    made = np.empty((len(at), rows.shape[1]))
    for column, source in ((_STEP, at), (_TIME, at), (_STEP_LAST, last), (_TIME_LAST, last), (_SEGMENT, last)):
        made[:, column] = rows[source, column]
    made[:, _EVENTS] = np.add.reduceat(rows[:, _EVENTS], at)
    made[:, least] = np.fmin.reduceat(rows[:, least], at, axis=0)
    made[:, greatest] = np.fmax.reduceat(rows[:, greatest], at, axis=0)
    made[:, sums.start :] = np.add.reduceat(rows[:, sums.start :], at, axis=0)
    return made


class Window(NamedTuple):
    """What a table holds between two places of an axis: places [rows], and mean, least and greatest [rows, fields], NaN where there is none."""

    fields: list[str]
    x: Floats
    segment: NDArray[np.intp]
    faint: NDArray[np.bool_]
    """Whether training went back behind the row later, and did it again."""
    mean: Floats
    least: Floats
    greatest: Floats


class Segments(NamedTuple):
    """Stretches of a run between which it began again or went back, as arrays [segments]."""

    offset: Floats
    """What to take from the time of a row to get the seconds of training before it."""
    superseded: Floats
    """The iteration that a later stretch went back to; rows beyond it were done again."""


def window(table: Table, axis: str, segments: Segments, low: float | None, high: float | None, points: int) -> Window:
    """About `points` rows of `table` at most, those just outside the window with them, so that lines go on to its edge. The axis is "step" or "time"."""
    rows = table.rows()
    x, first, last = _places(rows, axis, segments)
    if len(rows):
        low, high = (first.min() if low is None else low), (last.max() if high is None else high)
        inside = np.flatnonzero((last >= low) & (first <= high))
        if len(inside):
            chosen = slice(max(0, inside[0] - 1), inside[-1] + 2)
        else:  # the two around it, whose line goes through the window
            place = int(np.searchsorted(x, low))
            chosen = slice(max(0, place - 1), place + 1)
        rows, x = rows[chosen], x[chosen]
        if len(rows) > points + 2:
            bins = np.clip(np.floor((x - low) / max(high - low, 1e-12) * points), -1, points)
            rows = grouped(rows, bins, rows[:, _SEGMENT], _faint(rows, segments))
            x = _places(rows, axis, segments)[0]
    count = len(table.fields)
    least, greatest, total, number = (rows[:, _FIXED + place * count : _FIXED + (place + 1) * count] for place in range(4))
    mean = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return Window(table.fields, x, rows[:, _SEGMENT].astype(np.intp), _faint(rows, segments), mean, least, greatest)


def _places(rows: Floats, axis: str, segments: Segments) -> tuple[Floats, Floats, Floats]:
    """Middle, begin and end of rows on an axis."""
    if axis == "step":
        first, last = rows[:, _STEP], rows[:, _STEP_LAST]
    else:
        shift = segments.offset[rows[:, _SEGMENT].astype(np.intp)]
        first, last = rows[:, _TIME] - shift, rows[:, _TIME_LAST] - shift
    return (first + last) / 2, first, last


def _faint(rows: Floats, segments: Segments) -> NDArray[np.bool_]:
    return rows[:, _STEP] > segments.superseded[rows[:, _SEGMENT].astype(np.intp)]


def extent(table: Table, axis: str, segments: Segments) -> tuple[float, float] | None:
    """The first and the last place of a table on an axis; None where it has no rows."""
    _, first, last = _places(table.rows(), axis, segments)
    return (float(first.min()), float(last.max())) if len(first) else None
