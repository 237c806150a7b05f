"""What a reader is sent: committed text whole and in order, tentative text fresh, however slowly it reads."""

from __future__ import annotations

import random

import pytest

from cvmk.serving.errors import ServiceError
from cvmk.serving.outbox import Outbox, Refused, SessionUpdate


def test_credit() -> None:
    box = Outbox(2)
    for index in range(1, 6):
        box.put(SessionUpdate(0, tentative="a" * index, source_read=index))
        if index <= 2:
            sent = box.take()
            assert sent is not None and sent.revision == index
    assert box.take() is None and box.held() >= 0
    box.acknowledge(1)
    sent = box.take()
    assert sent is not None and sent.tentative == "aaaaa" and sent.revision == 3 and sent.deleted == 0 and box.conflated == 2
    assert box.take() is None and box.empty
    box.put(SessionUpdate(0, committed="b", tentative="c"))
    assert box.take() is None
    box.put(SessionUpdate(0, committed="d", final=True))
    sent = box.take()
    assert sent is not None and sent.committed == "bd" and sent.final and sent.deleted == 5


def test_what_changes_nothing_is_not_sent() -> None:
    box = Outbox(2)
    box.put(SessionUpdate(0, tentative="a"))
    assert box.take() is not None
    box.put(SessionUpdate(0, tentative="ab"))
    box.put(SessionUpdate(0, tentative="a"))
    assert box.take() is None and box.empty


def test_refusals_are_kept_apart() -> None:
    box = Outbox(1)
    box.put(SessionUpdate(0, tentative="a"))
    box.put(SessionUpdate(0, refused=Refused(3, "late")))
    box.put(SessionUpdate(0, tentative="ab"))
    found = [box.take(), box.take(), box.take()]
    assert found[0] is not None and found[0].tentative == "a" and found[1] is not None and found[1].refused == Refused(3, "late") and found[2] is None
    box.acknowledge(2)
    last = box.take()
    assert last is not None and last.tentative == "ab" and last.deleted == 0


def test_revisions_that_were_not_sent() -> None:
    with pytest.raises(ServiceError, match="ack_revision is 1, and the last one sent is 0"):
        Outbox(2).acknowledge(1)


@pytest.mark.parametrize("seed", range(20))
def test_any_reader_sees_what_a_fast_one_sees(seed: int) -> None:
    """A reader that deletes and writes as it is told ends with the same text, and never sees more revisions behind than its credit."""
    generator = random.Random(seed)
    credit = generator.choice((1, 2, 5))
    box = Outbox(credit)
    said: list[str] = []
    seen: list[str] = []
    committed: list[str] = []
    unread: list[SessionUpdate] = []

    def read(update: SessionUpdate) -> None:
        while len(seen) <= update.segment:
            seen.append("")
            committed.append("")
        kept = seen[update.segment][: len(seen[update.segment]) - update.deleted]
        committed[update.segment] += update.committed
        now = committed[update.segment] + update.tentative
        assert now.startswith(kept)
        seen[update.segment] = now
        box.acknowledge(update.revision)

    for segment in range(6):
        text = ""
        for _ in range(generator.randrange(6)):
            delta = "".join(generator.choices("ab ", k=generator.randrange(3)))
            text += delta
            box.put(SessionUpdate(segment, committed=delta, tentative="".join(generator.choices("ab ", k=generator.randrange(4)))))
            while (update := box.take()) is not None:
                unread.append(update)
            assert sum(not one.final for one in unread) <= credit
            while unread and generator.random() < 0.4:
                read(unread.pop(0))
        box.put(SessionUpdate(segment, committed="!", final=True))
        said.append(text + "!")
    while unread or not box.empty:
        while (update := box.take()) is not None:
            unread.append(update)
        read(unread.pop(0))
    assert seen == said == committed
