"""Numbers in bounded memory, and windows on them: what was least and greatest is never lost."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cvmk.dashboard import numbers
from cvmk.dashboard.numbers import Segments, Table, extent, window

ONE = Segments(np.zeros(1), np.array([np.inf]))


def filled(values: list[float], name: str = "loss", segment: int = 0) -> Table:
    table = Table([name])
    for step, value in enumerate(values):
        table.add(step, 10.0 * step, segment, {name: value})
    return table


def test_few_numbers_are_kept_as_they_are() -> None:
    shown = window(filled([3.0, math.nan, 2.0, math.inf, 1.0]), "step", ONE, None, None, 100)
    assert shown.x.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(shown.mean[:, 0], [3, np.nan, 2, np.nan, 1])
    np.testing.assert_array_equal(shown.least, shown.greatest)
    assert window(filled([1.0, 2.0]), "time", Segments(np.array([-5.0]), np.array([np.inf])), None, None, 100).x.tolist() == [5.0, 15.0]


def test_many_are_merged_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "CAPACITY", 1000)
    values = np.random.default_rng(0).normal(size=100_000)
    values[[7, 54_321, 99_999]] = [-50, 70, 60]  # a spike of one event
    table = filled(values.tolist())
    rows = table.rows()
    assert 500 <= len(rows) <= 1000 and table._rows.nbytes <= (1000 + 8192) * 10 * 8
    shown = window(table, "step", ONE, None, None, 200)
    assert 190 <= len(shown.x) <= 202
    assert (shown.least.min(), shown.greatest.max()) == (-50, 70) and shown.greatest[-1, 0] == 60
    assert abs(shown.x[np.argmax(shown.greatest)] - 54_321) < 500
    spans = np.linspace(0, 100_000, len(shown.x) + 1).astype(int)
    close = [abs(mean - values[low:high].mean()) < 0.3 for mean, low, high in zip(shown.mean[:, 0], spans, spans[1:], strict=False)]
    assert np.mean(close) > 0.95
    table.add(100_000, 1e6, 0, {"loss": 5.0})
    assert window(table, "step", ONE, 99_999, None, 10).greatest[-1, 0] >= 5.0 and extent(table, "step", ONE) == (0, 100_000)


def test_a_window_shows_more_of_less_and_its_lines_go_on_to_the_edge() -> None:
    table = filled([float(step % 7) for step in range(5000)])
    assert len(window(table, "step", ONE, None, None, 100).x) <= 102
    shown = window(table, "step", ONE, 1000, 1050, 100)
    assert shown.x.tolist() == list(range(999, 1052))
    assert shown.mean[:, 0].tolist() == [step % 7 for step in range(999, 1052)]
    assert window(table, "step", ONE, 1000.2, 1000.6, 100).x.tolist() == [1000, 1001]
    assert len(window(table, "step", ONE, 9000, 9999, 100).x) == 1
    assert len(window(Table(["loss"]), "step", ONE, None, None, 100).x) == 0


def test_stretches_that_were_done_again_are_told_and_never_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "CAPACITY", 64)
    table = Table(["loss"])
    for step in range(300):
        table.add(step, step, 0, {"loss": 1.0})
    for step in range(201, 500):
        table.add(step, step + 200, 1, {"loss": 2.0})
    segments = Segments(np.array([0.0, 50.0]), np.array([200.0, np.inf]))
    shown = window(table, "step", segments, None, None, 1000)
    np.testing.assert_array_equal(shown.least, shown.greatest)  # no row has of both
    assert shown.faint[(shown.segment == 0) & (shown.x > 208)].all() and not shown.faint[shown.x < 192].any() and not shown.faint[shown.segment == 1].any()
    assert window(table, "time", segments, None, None, 1000).x[-1] == pytest.approx(649, abs=16)


def test_stretches_without_end_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "CAPACITY", 64)
    table = Table(["loss"])
    for step in range(10_000):
        table.add(step, step, step, {"loss": float(step)})
    assert len(table.rows()) <= 64


def test_a_field_that_comes_later() -> None:
    table = filled([1.0, 2.0])
    table.rows()
    table.add(2, 20, 0, {"loss": 3.0, "bleu": 30.0})
    shown = window(table, "step", ONE, None, None, 10)
    assert shown.fields == ["loss", "bleu"]
    np.testing.assert_array_equal(shown.mean, [[1, np.nan], [2, np.nan], [3, 30]])
    np.testing.assert_array_equal(shown.greatest, shown.mean)
