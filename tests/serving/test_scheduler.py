"""The scheduler: bounded, fair, quick to let go of what nobody waits for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cvmk.inference.engine import Finished
from cvmk.inference.options import SearchOptions
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.scheduler import Scheduler, Searched


class _Slow:
    """An engine that ends searches when it is told to, in the order that they came."""

    def __init__(self) -> None:
        self.running: list[tuple[Any, asyncio.Event]] = []
        self.begun: list[Any] = []

    async def search(self, source: Any, options: SearchOptions, **fields: Any) -> Finished:
        event = asyncio.Event()
        self.begun.append(source[0])
        self.running.append((source[0], event))
        try:
            await event.wait()
        finally:
            self.running.remove((source[0], event))
        return Finished(source[0], [], "expired" if fields["timeout"] == 1e-6 else "finished")

    async def end_one(self) -> None:
        self.running[0][1].set()
        await asyncio.sleep(0.001)


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def search(scheduler: Scheduler, id: int, client: str = "a", priority: str = "normal", length: int = 9, **fields: Any) -> asyncio.Task[Searched]:
    return asyncio.create_task(scheduler.search(client, priority, [id] * length, SearchOptions(), **fields))


def test_no_more_than_allowed_runs_and_waits() -> None:
    async def go() -> None:
        engine = _Slow()
        scheduler = Scheduler(engine, running=30, waiting=60, waiting_per_client=40)  # type: ignore[arg-type]
        tasks = [search(scheduler, index) for index in range(7)]
        await asyncio.sleep(0.001)
        assert engine.begun == [0, 1, 2] and scheduler.running == 30 and scheduler.waiting == 40
        with pytest.raises(ServiceError, match="too much waits") as error:
            await search(scheduler, 7)
        assert error.value.status is Status.RESOURCE_EXHAUSTED and 0.05 <= (error.value.retry_after or 0) <= 10
        other = [search(scheduler, 10 + index, "b") for index in range(2)]
        await asyncio.sleep(0.001)
        with pytest.raises(ServiceError):
            await search(scheduler, 12, "c")  # all of them together
        while engine.running:
            await engine.end_one()
        assert all(task.result().found.id >= 0 for task in (*tasks, *other)) and scheduler.running == scheduler.waiting == 0
        await scheduler_takes_one(scheduler, engine)

    run(go())


def test_who_asks_seldom_is_next() -> None:
    async def go() -> None:
        engine = _Slow()
        scheduler = Scheduler(engine, running=100, waiting=10_000, waiting_per_client=10_000)  # type: ignore[arg-type]
        tasks = [search(scheduler, index, "much", length=99) for index in range(20)]
        await asyncio.sleep(0.001)
        for _ in range(4):
            await engine.end_one()
        tasks.append(search(scheduler, 100, "seldom", length=99))
        tasks.append(search(scheduler, 101, "seldom", "low", length=99))
        await asyncio.sleep(0)
        for _ in range(3):
            await engine.end_one()
        assert {100, 101} <= set(engine.begun[-4:])
        while engine.running:
            await engine.end_one()
        await asyncio.gather(*tasks)

    run(go())


def test_what_runs_is_shared_by_clients_too() -> None:
    """Whoever asks for much has all of it while nobody else asks, and an equal share of it afterwards, with two left free, down to the least."""

    async def go() -> None:
        now, engine = [0.0], _Slow()
        scheduler = Scheduler(engine, running=400, waiting=10**6, waiting_per_client=10**6, clock=lambda: now[0])  # type: ignore[arg-type]
        tasks = [search(scheduler, index, "much") for index in range(200)]
        await asyncio.sleep(0.001)
        assert scheduler.running == 400
        tasks.append(search(scheduler, 1000, "seldom"))
        await asyncio.sleep(0.001)
        while len(engine.running) > 1 and 1000 not in [id for id, _ in engine.running]:
            await engine.end_one()
        assert engine.begun[-1] == 1000  # as soon as something had ended
        for _ in range(60):
            await engine.end_one()
            assert scheduler.running <= 400
        assert scheduler.running == 100  # what else there is, is for whoever asked in the last second, and who comes next
        now[0] = 1.5
        await engine.end_one()
        assert scheduler.running == 400
        while engine.running:
            await engine.end_one()
        await asyncio.gather(*tasks)
        assert scheduler.running == scheduler.waiting == 0 and not scheduler._running_of

    run(go())


def test_a_request_of_ten_thousand_holds_nobody_up() -> None:
    async def go() -> None:
        engine, most = _Slow(), 10**5
        scheduler = Scheduler(engine, running=400, waiting=most, waiting_per_client=most)  # type: ignore[arg-type]

        def all_of(count: int) -> asyncio.Task[list[Any]]:
            sources = [[index] * 7 for index in range(count)]
            return asyncio.create_task(scheduler.search_all("much", "normal", sources, SearchOptions(), told=lambda one: one.found.id))

        tasks, passed = all_of(10_000), 0
        while scheduler.running < 400:
            await asyncio.sleep(0)
            passed += 1
        assert passed > 5  # the event loop goes round meanwhile
        assert len(asyncio.all_tasks()) < 100 and len(engine.running) == 50
        assert scheduler.waiting == 80_000 - 400 and scheduler.running == 400
        with pytest.raises(ServiceError, match="too much waits"):  # together, or not at all
            await all_of(3000)
        assert scheduler.waiting == 80_000 - 400
        tasks.cancel()
        await asyncio.wait({tasks})
        assert scheduler.waiting == scheduler.running == 0 and not engine.running and not scheduler._waiting_of
        tasks = all_of(120)
        while not tasks.done():
            await asyncio.sleep(0)
            for _, event in engine.running[::-1]:  # the last ones first
                event.set()
        assert await tasks == list(range(120)) and engine.begun[-120:] == list(range(120))
        assert scheduler.waiting == scheduler.running == 0 and not scheduler._waiting_of

    run(go())


def test_what_runs_at_once_does_not_count_as_waiting() -> None:
    """A request that an idle server can take is taken, and says of its last search how long that waited."""

    async def go() -> None:
        now = 0.0
        engine = _Slow()
        scheduler = Scheduler(engine, running=200, waiting=100, waiting_per_client=50, clock=lambda: now)  # type: ignore[arg-type]
        waits: list[int] = []

        def all_of(count: int) -> asyncio.Task[list[Any]]:
            return asyncio.create_task(
                scheduler.search_all("a", "normal", [[index] * 9 for index in range(count)], SearchOptions(), told=lambda one: waits.append(one.queue_us))
            )

        with pytest.raises(ServiceError, match="too much waits"):
            await all_of(26)
        tasks = all_of(25)  # 250 tokens: 200 run
        while scheduler.running < 200:
            await asyncio.sleep(0)
        with pytest.raises(ServiceError, match="too much waits"):
            await search(scheduler, 99)
        now = 3.0
        while not tasks.done():
            await engine.end_one()
        await tasks
        assert sum(wait == 0 for wait in waits) == 20 and sum(wait == 3_000_000 for wait in waits) == 5

    run(go())


async def scheduler_takes_one(scheduler: Scheduler, engine: _Slow) -> None:
    task = search(scheduler, 99)
    await asyncio.sleep(0.001)
    await engine.end_one()
    assert (await task).found.id == 99


@pytest.mark.parametrize("when", ["waiting", "turn", "running"])
def test_cancelled(when: str) -> None:
    async def go() -> None:
        engine = _Slow()
        scheduler = Scheduler(engine, running=10, waiting=100, waiting_per_client=100)  # type: ignore[arg-type]
        first, second = search(scheduler, 0), search(scheduler, 1)
        await asyncio.sleep(0.001)
        if when == "turn":
            engine.running[0][1].set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        (first if when == "running" else second).cancel()
        await asyncio.sleep(0.001)
        if when == "running":
            assert engine.begun == [0, 1]  # its place was given to the next at once
        while engine.running:
            await engine.end_one()
        await asyncio.gather(first, second, return_exceptions=True)
        assert scheduler.running == scheduler.waiting == 0
        await scheduler_takes_one(scheduler, engine)

    run(go())


def test_late() -> None:
    async def go() -> None:
        engine = _Slow()
        scheduler = Scheduler(engine, running=10, waiting=100, waiting_per_client=100)  # type: ignore[arg-type]
        first = search(scheduler, 0)
        with pytest.raises(ServiceError, match="not ready in time") as error:
            await search(scheduler, 1, timeout=0.01)
        assert error.value.status is Status.DEADLINE_EXCEEDED and scheduler.waiting == 0
        await engine.end_one()
        await first
        late = search(scheduler, 2, timeout=0.0)
        await asyncio.sleep(0.001)
        if engine.running:
            await engine.end_one()
        with pytest.raises(ServiceError, match="not ready in time"):
            await late
        assert scheduler.running == 0

    run(go())


def test_one_that_is_larger_than_all_that_may_run_runs_alone() -> None:
    async def go() -> None:
        engine = _Slow()
        scheduler = Scheduler(engine, running=10, waiting=100, waiting_per_client=100)  # type: ignore[arg-type]
        tasks = [search(scheduler, 0, length=50), search(scheduler, 1)]
        await asyncio.sleep(0.001)
        assert engine.begun == [0]
        while engine.running:
            await engine.end_one()
        assert [task.result().found.id for task in tasks] == [0, 1]

    run(go())


def test_whole_texts_leave_a_sixteenth_of_the_queue_to_streams() -> None:
    async def go() -> None:
        engine = _Slow()
        scheduler = Scheduler(engine, running=10, waiting=160, waiting_per_client=1600)  # type: ignore[arg-type]
        tasks = []
        for index in range(16):
            scheduler.check_room("a")
            tasks.append(search(scheduler, index))
            await asyncio.sleep(0)
        tasks.append(search(scheduler, 16))
        await asyncio.sleep(0.001)
        assert scheduler.waiting == 160
        with pytest.raises(ServiceError, match="too much waits") as error:
            scheduler.check_room("b")
        assert error.value.reason == "queue" and error.value.retry_after
        await engine.end_one()
        scheduler.check_room("b")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(go())
