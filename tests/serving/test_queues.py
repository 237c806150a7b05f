"""Fair queues: shares go by cost and weight, nobody waits for ever, whoever asks seldom is served first."""

from __future__ import annotations

import random

from cvmk.serving.queues import FairQueue


def taken(queue: FairQueue[str], count: int) -> list[str]:
    return [item for _ in range(count) if (item := queue.pop()) is not None]


def test_one_flow_is_first_in_first_out() -> None:
    queue = FairQueue[int]()
    for index in range(20):
        queue.push("a", 1, 10, index)
    assert [queue.pop() for _ in range(21)] == [*range(20), None] and queue.cost == 0 and len(queue) == 0


def test_shares_go_by_cost_and_weight() -> None:
    queue = FairQueue[str](quantum=50)
    for _ in range(1000):
        queue.push("cheap", 1, 5, "cheap")
        queue.push("dear", 1, 50, "dear")
        queue.push("heavy", 4, 5, "heavy")
    spent = {"cheap": 0, "dear": 0, "heavy": 0}
    for name in taken(queue, 600):
        spent[name] += 50 if name == "dear" else 5
    assert abs(spent["cheap"] / spent["dear"] - 1) < 0.2 and abs(spent["heavy"] / spent["cheap"] / 4 - 1) < 0.2


def test_who_asks_seldom_does_not_wait_for_who_asks_much() -> None:
    queue = FairQueue[str](quantum=64)
    for _ in range(10_000):
        queue.push("much", 1, 20, "much")
    taken(queue, 100)
    for _ in range(50):
        queue.push("seldom", 1, 20, "seldom")
        assert "seldom" in taken(queue, 6)


def test_new_flows_do_not_starve_old_ones() -> None:
    queue = FairQueue[str](quantum=10)
    queue.push("old", 1, 10, "old")
    queue.push("old", 1, 10, "old")
    got = taken(queue, 1)
    for index in range(100):
        queue.push(f"new {index}", 1, 10, "new")
        queue.push(f"newer {index}", 1, 10, "new")
        got += taken(queue, 2)
        if got.count("old") == 2:
            return
    raise AssertionError("the old flow was never served")


def test_what_is_removed_is_not_handed_out() -> None:
    generator = random.Random(0)
    queue = FairQueue[int]()
    there: dict[int, object] = {}
    for index in range(2000):
        there[index] = queue.push(generator.randrange(5), generator.choice((1, 4)), generator.randrange(1, 300), index)
        if generator.random() < 0.3:
            gone = generator.choice(list(there))
            queue.remove(there[gone])  # type: ignore[arg-type]
            queue.remove(there.pop(gone))  # type: ignore[arg-type]
        if generator.random() < 0.4 and (item := queue.pop()) is not None:
            del there[item]
        assert queue.cost == sum(entry.cost for entry in there.values()) and len(queue) == len(there)  # type: ignore[attr-defined]
    assert sorted(taken(queue, 3000)) == sorted(there) and queue.cost == 0  # type: ignore[arg-type]
