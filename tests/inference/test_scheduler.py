"""The scheduler against a model of it: random submits, cancels and steps over decodings that only count."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from cvmk.inference.engine import Finished, Partial, Request
from cvmk.inference.options import Hypothesis, SearchOptions
from cvmk.inference.scheduler import Entry, Scheduler


class Boom(Exception):
    pass


class Counting:
    """Says the source's pieces one by one, then ends; a source that begins with 666 breaks its decoding after two pieces."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        if any(entry.request.source[:1] == (13,) for entry in entries):
            raise Boom("begin")
        self.said = dict.fromkeys(entries, 0)
        self.drops = 0

    def advance(self) -> list[tuple[Entry, list[Hypothesis]]]:
        ended = []
        for entry in list(self.said):
            self.said[entry] += 1
            if entry.request.source[:1] == (666,) and self.said[entry] == 2:
                raise Boom("advance")
            if self.said[entry] > len(entry.request.source):
                del self.said[entry]
                ended.append((entry, [Hypothesis(list(entry.request.source))]))
        return ended

    def partial(self, entry: Entry) -> list[int]:
        return list(entry.request.source[: self.said[entry]])

    def drop(self, entries: Sequence[Entry]) -> None:
        assert 0 < len(entries) < len(self.said)
        for entry in entries:
            del self.said[entry]
        self.drops += 1

    def join(self, other: Counting) -> None:
        assert not self.said.keys() & other.said.keys()
        self.said |= other.said


def request(id: object, *source: int, beam_size: int = 1, partial: bool = False) -> Request:
    return Request(id, source, SearchOptions(beam_size), partial=partial)


def test_a_request_from_submit_to_its_end() -> None:
    scheduler = Scheduler(Counting, 100)
    assert scheduler.step() == []
    scheduler.submit(request("a", 5, 6, partial=True))
    scheduler.submit(request("b", 7))
    assert scheduler.step() == [Partial("a", [5])]
    assert scheduler.step() == [Finished("b", [Hypothesis([7])]), Partial("a", [5, 6])]
    scheduler.submit(request("b", 8, partial=True))  # joins, and its id was free again
    assert scheduler.step() == [Finished("a", [Hypothesis([5, 6])]), Partial("b", [8])]
    assert scheduler.step() == [Finished("b", [Hypothesis([8])])] and scheduler.step() == []


def test_an_id_is_used_once_at_a_time() -> None:
    scheduler = Scheduler(Counting, 100)
    scheduler.submit(request(1, 5))
    with pytest.raises(ValueError, match="the id 1 is in use"):
        scheduler.submit(request(1, 6))
    scheduler.step()
    with pytest.raises(ValueError, match="in use"):
        scheduler.submit(request(1, 6))
    assert scheduler.step() == [Finished(1, [Hypothesis([5])])]
    scheduler.submit(request(1, 6))


def test_cancel_before_during_and_after() -> None:
    scheduler = Scheduler(Counting, 100)
    assert not scheduler.cancel("never there")
    for id in ("before", "during", "stays"):
        scheduler.submit(request(id, 5, 6))
    assert scheduler.cancel("before") and not scheduler.cancel("before")
    scheduler.submit(request("before", 9))
    scheduler.step()
    assert scheduler.cancel("during")
    assert scheduler.step() == [Finished("before", [Hypothesis([9])])]
    assert scheduler.step() == [Finished("stays", [Hypothesis([5, 6])])]
    assert not scheduler.cancel("stays") and scheduler.step() == [] and not scheduler._entries and not scheduler._running


def test_the_budget_lets_requests_wait_in_order() -> None:
    scheduler = Scheduler(Counting, 8)
    for id, source in (("a", [4, 4, 4]), ("b", [5, 5, 5]), ("c", [6]), ("d", [7])):  # 4 positions, 4, 2, 2
        scheduler.submit(request(id, *source, partial=True))
    assert [event.id for event in scheduler.step()] == ["a", "b"]
    scheduler.cancel("a")
    assert [event.id for event in scheduler.step()] == ["b", "c", "d"]
    huge = request("huge", *[4] * 50)
    scheduler.submit(huge)
    while scheduler.step() != [Finished("huge", [Hypothesis([4] * 50)])]:
        pass


def test_other_options_run_beside() -> None:
    scheduler = Scheduler(Counting, 100)
    scheduler.submit(request("a", 5, partial=True))
    scheduler.submit(request("b", 6, beam_size=2, partial=True))
    scheduler.submit(request("c", 7, partial=True))
    assert {event.id for event in scheduler.step()} == {"a", "b", "c"} and len(scheduler._running) == 2


@pytest.mark.parametrize("source", [13, 666])
def test_where_a_step_fails_the_others_go_on(source: int) -> None:
    scheduler = Scheduler(Counting, 100)
    scheduler.submit(request("well", 5, 6, 7))
    scheduler.submit(request("ends", 5))
    scheduler.submit(request("ill", source, 6, 7, beam_size=2))
    with pytest.raises(Boom):
        for _ in range(2):
            scheduler.step()
    assert not scheduler.cancel("ill")
    found = []
    for _ in range(5):
        found += scheduler.step()
    assert found == [Finished("ends", [Hypothesis([5])]), Finished("well", [Hypothesis([5, 6, 7])])]
    scheduler.submit(request("ill", 5))
    assert not scheduler._told and len(scheduler._entries) == 1


def test_where_a_beginning_fails_the_others_wait_on() -> None:
    scheduler = Scheduler(Counting, 100)
    scheduler.submit(request("ill", 13))
    scheduler.submit(request("gone", 6, beam_size=2))
    scheduler.submit(request("well", 5, beam_size=2))
    scheduler.cancel("gone")
    with pytest.raises(Boom):
        scheduler.step()
    assert scheduler.step() == [] and scheduler.step() == [Finished("well", [Hypothesis([5])])]


def test_what_ended_before_a_step_failed_is_told_in_the_next() -> None:
    class Mute(Counting):
        def partial(self, entry: Entry) -> list[int]:
            if self.said[entry] == 2:
                raise Boom("partial")
            return super().partial(entry)

    scheduler = Scheduler(Mute, 100)
    scheduler.submit(request("ends", 5))
    scheduler.submit(request("ill", 5, 6, partial=True))
    assert scheduler.step() == [Partial("ill", [5])]
    with pytest.raises(Boom):
        scheduler.step()
    with pytest.raises(ValueError, match="in use"):
        scheduler.submit(request("ends", 5))
    assert scheduler.step() == [Finished("ends", [Hypothesis([5])])] and not scheduler._entries


def test_nothing_is_told_of_a_request_that_failed_before_it_could_be() -> None:
    scheduler = Scheduler(Counting, 100)
    scheduler.submit(request("first", 666, 5, 6, partial=True))
    scheduler.submit(request("second", 666, 5, 6, beam_size=2))
    scheduler._admit()
    scheduler._advance(SearchOptions(2), scheduler._running[SearchOptions(2)])  # one piece ahead of the other
    with pytest.raises(Boom):
        scheduler.step()
    assert [type(event) for _, event in scheduler._told] == [Partial] and set(scheduler._entries) == {"first"}
    with pytest.raises(Boom):
        scheduler.step()
    assert scheduler.step() == [] and not scheduler._entries


def test_one_thread_steps_and_another_may_cancel() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Counting):
        def advance(self) -> list[tuple[Entry, list[Hypothesis]]]:
            inside.set()
            assert go_on.wait(20)
            return super().advance()

    scheduler, told = Scheduler(Slow, 100), []
    scheduler.submit(request("a", 5, partial=True))
    scheduler.submit(request("ends meanwhile"))
    scheduler.submit(request("stays", 5, 6, 7))
    thread = threading.Thread(target=lambda: told.extend(scheduler.step()))
    thread.start()
    assert inside.wait(20)
    with pytest.raises(RuntimeError, match="another thread is in step"):
        scheduler.step()
    assert scheduler.cancel("a") and scheduler.cancel("ends meanwhile")
    scheduler.submit(request("a", 6))
    go_on.set()
    thread.join()
    assert told == []  # nothing of the cancelled ones
    assert scheduler.step() == [] and scheduler.step() == [Finished("a", [Hypothesis([6])])]
    assert scheduler.step() == [Finished("stays", [Hypothesis([5, 6, 7])])] and not scheduler._running


class Machine(RuleBasedStateMachine):
    """What is told of each request is what it says by itself, in order, and nothing after its end or cancellation."""

    ids = Bundle("ids")

    @initialize(budget=st.integers(1, 20))
    def start(self, budget: int) -> None:
        self.scheduler, self.budget = Scheduler(Counting, budget), budget
        self.said: dict[int, int] = {}
        self.sources: dict[int, list[int]] = {}
        self.costs: dict[int, int] = {}
        self.count = 0

    @rule(target=ids, source=st.lists(st.integers(1, 5), min_size=1, max_size=6), beam_size=st.integers(1, 2))
    def submit(self, source: list[int], beam_size: int) -> int:
        self.count += 1
        self.scheduler.submit(request(self.count, *source, beam_size=beam_size, partial=True))
        self.sources[self.count], self.said[self.count], self.costs[self.count] = source, 0, (len(source) + 1) * beam_size
        return self.count

    @rule(id=consumes(ids))
    def cancel(self, id: int) -> None:
        assert self.scheduler.cancel(id) == (id in self.sources)
        self.sources.pop(id, None)

    @rule(id=ids)
    def submit_again(self, id: int) -> None:
        if id in self.sources:
            with pytest.raises(ValueError):
                self.scheduler.submit(request(id, 1))

    @rule()
    def step(self) -> None:
        waiting = [id for id in self.sources if not self.said[id]]
        told = {event.id: event for event in self.scheduler.step()}
        for id, event in told.items():
            source = self.sources[id]
            self.said[id] += 1
            if isinstance(event, Partial):
                assert event.tokens == source[: self.said[id]]
            else:
                assert event.hypotheses == [Hypothesis(source)] and self.said[id] == len(source) + 1
                del self.sources[id]
        running = [id for id in self.sources if self.said[id]]
        assert all(id in told for id in running), "one that runs was left out of a step"
        assert len(running) < 2 or sum(self.costs[id] for id in running) <= self.budget
        begun = [id for id in waiting if id in told]
        assert begun == waiting[: len(begun)], "a later one began before an earlier one"
        assert told or not self.sources, "nothing went on although there is something to do"

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "scheduler"):
            assert set(self.scheduler._entries) == set(self.sources)
            running = {entry: group for group in self.scheduler._running.values() for entry in group.entries}
            assert not self.scheduler._told and all(group.entries and group.decoding.said.keys() == group.entries.keys() for group in running.values())
            assert sum(not entry.cancelled for entry in running) + len(self.scheduler._waiting) == len(self.sources)


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_any_order_of_calls = Machine.TestCase
