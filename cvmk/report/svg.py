"""A chart as SVG: no script, colours from the page's style, readable on paper and where colours are not told apart (lines differ in their dashes, too)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from cvmk.report.document import Chart, Line
from cvmk.report.history import Bin

COLORS = 8
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "12 3", "1 4", "6 2 1 2 1 2")
WIDTH, HEIGHT = 520, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 34


def swatch(color: int, *, joined: bool = True) -> str:
    """A piece of a line, or a dot, for a legend."""
    dot = f'<circle class="dot c{color % COLORS}" cx="14" cy="4" r="3"/>'
    line = dot if not joined else f'<path class="line c{color % COLORS}"{_dash(color)} d="M1 4H27"/>'
    return f'<svg class="swatch" viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">{line}</svg>'


def svg(chart: Chart) -> str:
    """The chart, and for who cannot see it what its lines begin and end with."""
    bins = [one for line in chart.lines for one in line.bins]
    x = _Axis([one.first for one in bins] + [one.last for one in bins], _LEFT, WIDTH - _RIGHT, whole=True)
    bounds = [bound for one in bins for bound in ((one.low, one.high) if chart.band else (one.mean,))]
    y = _Axis(bounds, HEIGHT - _BOTTOM, _TOP, logarithmic=chart.logarithmic and min(bounds) > 0)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_described(chart))}">']
    parts += _grid(x, y, chart.axis)
    for step, what in chart.marks:
        if x.low <= step <= x.high:
            parts.append(f'<path class="mark" d="M{x(step):.1f} {_TOP}V{HEIGHT - _BOTTOM}"><title>iteration {step}: {escape(what)}</title></path>')
    if chart.band:
        parts += [_band(line, x, y) for line in chart.lines]
    for line in chart.lines:
        if line.joined:
            parts += _line(line, x, y)
        if not line.joined or (chart.dots and len(line.bins) <= 60):
            parts += [_dot(one, line, x, y, chart.axis) for one in line.bins]
    return "".join([*parts, "</svg>"])


def _described(chart: Chart) -> str:
    lines = "; ".join(f"{line.name} from {_short(line.bins[0].mean)} to {_short(line.bins[-1].mean)}" for line in chart.lines[:10])
    return f"{chart.title} over {chart.axis}s {min(line.bins[0].first for line in chart.lines)} to {max(line.bins[-1].last for line in chart.lines)}: {lines}"


def _line(line: Line, x: _Axis, y: _Axis) -> Iterator[str]:
    """A path a pass over the iterations; a single value is a dot."""
    for _, group in groupby(line.bins, lambda one: one.pass_):
        bins = list(group)
        if len(bins) == 1:
            yield _dot(bins[0], line, x, y)
        else:
            yield f'<path class="line c{line.color % COLORS}"{_dash(line.color)} d="{_path((x(_middle(one)), y(one.mean)) for one in bins)}"/>'


def _band(line: Line, x: _Axis, y: _Axis) -> str:
    found = []
    for _, group in groupby(line.bins, lambda one: one.pass_):
        bins = list(group)
        if len(bins) > 1:
            there = [(x(_middle(one)), y(one.high)) for one in bins]
            back = [(x(_middle(one)), y(one.low)) for one in reversed(bins)]
            found.append(_path([*there, *back]) + "Z")
    return f'<path class="band c{line.color % COLORS}" d="{"".join(found)}"/>' if found else ""


def _dot(one: Bin, line: Line, x: _Axis, y: _Axis, axis: str = "iteration") -> str:
    span = "" if one.low == one.high else f" [{_short(one.low)}, {_short(one.high)}]"
    told = f"{line.name}, {axis} {one.last}: {_short(one.mean)}{span}"
    return f'<circle class="dot c{line.color % COLORS}" cx="{x(_middle(one)):.1f}" cy="{y(one.mean):.1f}" r="3"><title>{escape(told)}</title></circle>'


def _middle(one: Bin) -> float:
    return (one.first + one.last) / 2


def _path(places: Sequence[tuple[float, float]] | Iterator[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in places)


def _dash(color: int) -> str:
    dash = DASHES[(color + color // COLORS) % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _grid(x: _Axis, y: _Axis, axis: str) -> Iterator[str]:
    for value in y.ticks(7):
        yield f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{WIDTH - _RIGHT}"/>'
        yield f'<text class="tick" x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_short(value)}</text>'
    for value in x.ticks(6):
        yield f'<text class="tick" x="{x(value):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_short(value)}</text>'
    yield f'<path class="axis" d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>'
    yield f'<text class="tick" x="{(WIDTH + _LEFT - _RIGHT) / 2:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{axis}</text>'


def _short(value: float) -> str:
    """A number in few characters: 1.5k, 2M, 0.05, 3e-06."""
    size = abs(value)
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.4g}{suffix}"
    return f"{value:.4g}" if size >= 1e-4 or not size else f"{value:.1e}".replace("e-0", "e-")


class _Axis:
    """Values to places on one side of the picture."""

    def __init__(self, values: Sequence[float], begin: float, end: float, *, whole: bool = False, logarithmic: bool = False) -> None:
        self.low, self.high = min(values), max(values)
        self._log, self._whole = logarithmic, whole
        low, high = self._scaled(self.low), self._scaled(self.high)
        if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
            room = 1.0 if whole else abs(high) * 0.1 or 1.0
            low, high = low - room, high + room
        elif not whole:
            low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
        self._low, self._high, self._begin, self._end = low, high, begin, end

    def __call__(self, value: float) -> float:
        return self._begin + (self._end - self._begin) * (self._scaled(value) - self._low) / (self._high - self._low)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def ticks(self, most: int) -> list[float]:
        """Round values between the ends."""
        if self._log:
            powers = range(math.ceil(self._low), math.floor(self._high) + 1)
            if len(powers) >= 2:
                return [10.0**power for power in powers[:: -(-len(powers) // most)]]
            return [10**value for value in self._linear(most)]
        return self._linear(most)

    def _linear(self, most: int) -> list[float]:
        rough = (self._high - self._low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
        if self._whole:
            step = max(1.0, round(step))
        first = math.ceil(self._low / step - 1e-9)
        last = math.floor(self._high / step + 1e-9)
        return [at * step for at in range(first, last + 1)]
