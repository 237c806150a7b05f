"""Latency and erasure by hand and by the definitions, written out."""

from __future__ import annotations

import random

import pytest

from cvmk.validation.streaming import Shown, erasure, final_delays, first_delays, latency, normalized_erasure


def shown(*events: tuple[float, str]) -> list[Shown]:
    return [Shown(read, words.split()) for read, words in events]


def test_wait_k_lags_k_words() -> None:
    """The example of the paper: as many target words as source words, k behind."""
    for k in (1, 3, 5):
        found = latency([min(10, k + i) for i in range(10)], 10)
        assert found.al == found.laal == pytest.approx(k) and found.dal == pytest.approx(k)
        assert found.ap == pytest.approx(sum(min(10, k + i) for i in range(10)) / 100)


def test_all_at_the_end_lags_the_whole_source() -> None:
    found = latency([6.0] * 4, 6.0)
    assert (found.al, found.laal, found.ap) == (6.0, 6.0, 1.0)
    assert found.dal == pytest.approx(6.0)


def test_words_too_many_gain_nothing_by_laal() -> None:
    delays = [2, 2, 3, 3, 4, 4, 4, 4]
    by_reference = latency(delays, 4, reference=4)
    assert by_reference.al == pytest.approx((2 + 1 + 1 + 0 + 0) / 5)
    assert by_reference.laal == pytest.approx((2 + 1.5 + 2 + 1.5 + 2) / 5)
    assert latency([2, 4], 4, reference=4).laal == latency([2, 4], 4, reference=4).al


def test_the_definitions_written_out() -> None:
    for seed in range(200):
        generator = random.Random(seed)
        source, said, wanted = generator.randint(1, 12), generator.randint(1, 12), generator.randint(1, 12)
        delays = sorted(generator.uniform(0, source) for _ in range(said))
        if generator.random() < 0.5:
            delays[-1] = source
        found = latency(delays, source, wanted)
        full = [i for i in range(1, said + 1) if delays[i - 1] >= source]
        tau = min(full) if full else said
        for name, length in (("al", wanted), ("laal", max(wanted, said))):
            assert getattr(found, name) == pytest.approx(sum(delays[i - 1] - (i - 1) * source / length for i in range(1, tau + 1)) / tau)
        g = [delays[0]]
        for d in delays[1:]:
            g.append(max(d, g[-1] + source / said))
        assert found.dal == pytest.approx(sum(x - i * source / said for i, x in enumerate(g)) / said)


def test_nothing_lags_nothing() -> None:
    assert latency([], 5).al == latency([0.0], 0).dal == 0.0
    assert latency([1.0], 5, reference=0).al == 0.0
    assert normalized_erasure([]) == normalized_erasure([[], shown((1, ""))]) == 0.0 and final_delays([]) == first_delays([]) == []


@pytest.mark.parametrize("delays", [[2, 1], [-1, 2], [1, 6], [float("nan")]])
def test_wrong_delays_are_refused(delays: list[float]) -> None:
    with pytest.raises(ValueError, match="delays must rise"):
        latency(delays, 5)


def test_revisions() -> None:
    events = shown((1, "wir"), (2, "wir müssen"), (3, "wir brauchen ein"), (4, "wir brauchen einen Tisch"))
    assert final_delays(events) == [1, 3, 4, 4] and first_delays(events) == [1, 2, 3, 4]
    assert erasure(events) == 2 and normalized_erasure([events]) == 0.5 and normalized_erasure([events, shown((1, "ja gut"))]) == 2 / 6
    shorter = [*events, *shown((5, "wir"))]
    assert final_delays(shorter) == first_delays(shorter) == [1] and erasure(shorter) == 5
    assert final_delays(shown((1, "a b"), (2, "c b"), (3, "a b"))) == [3, 3]


def test_what_is_only_added_to_is_never_erased() -> None:
    events = shown((1, "a"), (2, "a b"), (2, "a b"), (5, "a b c"))
    assert normalized_erasure([events]) == 0 and final_delays(events) == first_delays(events) == [1, 2, 5]
