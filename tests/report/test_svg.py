"""Charts: every value in its place, and numbers that a person can read."""

from __future__ import annotations

import re

import pytest

from cvmk.report.document import Chart, Line
from cvmk.report.history import Bin
from cvmk.report.svg import HEIGHT, WIDTH, svg


def line(*values: float, pass_: int = 0) -> Line:
    return Line("run", [Bin(at, at, value, value, value, pass_=pass_) for at, value in enumerate(values, 1)], 0)


def ticks(text: str) -> list[str]:
    return re.findall(r'text-anchor="end">([^<]+)<', text)


def places(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for path in re.findall(r'class="line[^>]* d="([^"]+)"', text) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ((0, 0.003), ["0", "0.0005", "0.001", "0.0015", "0.002", "0.0025", "0.003"]),
        ((4e8, 4.7e8), ["400M", "420M", "440M", "460M"]),
        ((-30, 1000), ["0", "200", "400", "600", "800", "1k"]),
    ],
)
def test_ticks_are_round_numbers(values: tuple[float, ...], shown: list[str]) -> None:
    assert ticks(svg(Chart("Loss", "", [line(*values)]))) == shown


@pytest.mark.parametrize("values", [(3.0, 3.0), (0.0, 0.0), (1e-30, 2e-30), (-1e300, 1e300), (1e9, 1e9 + 1)])
def test_any_values_are_inside_of_the_picture(values: tuple[float, ...]) -> None:
    text = svg(Chart("Loss", "", [line(*values)]))
    assert "nan" not in text and "inf" not in text and len(ticks(text)) < 12
    assert len(places(text)) == 2 and all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places(text))


def test_a_logarithmic_axis_has_powers_of_ten() -> None:
    text = svg(Chart("Gradient norm", "", [line(0.1, 1, 10, 100)], logarithmic=True))
    assert ticks(text) == ["0.1", "1", "10", "100"]
    heights = [y for _, y in places(text)]
    assert len({round(a - b, 0) for a, b in zip(heights, heights[1:], strict=False)}) == 1


def test_one_value_is_a_dot_and_a_rollback_breaks_the_line() -> None:
    assert svg(Chart("Loss", "", [line(3.0)])).count("<circle") == 1
    twice = Line("run", [*line(1, 2, 3).bins, *line(2, 1, pass_=1).bins], 0)
    text = svg(Chart("Loss", "", [twice], marks=[(3, "went <back>")]))
    assert text.count('class="line') == 2 and "iteration 3: went &lt;back&gt;" in text


def test_a_band_is_drawn_where_it_means_something() -> None:
    wide = Line("run", [Bin(at, at, 10.0, 9.0, 11.0) for at in (1, 2, 3)], 0)
    assert 'class="band' in svg(Chart("BLEU", "", [wide], band="interval")) and 'class="band' not in svg(Chart("BLEU", "", [wide]))
