"""The log is JSON with sessions, and nothing that a client wrote is in it."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from cvmk.serving import logs
from cvmk.serving.errors import ServiceError, Status

SECRET = "Geheimtext des Kunden"
LOG = logging.getLogger("cvmk.serving.test")


class Written(io.StringIO):
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def written() -> Iterator[Written]:
    stream = Written()
    handler = logs.start(stream)
    yield stream
    logs.stop(handler)
    logging.getLogger("cvmk").setLevel(logging.NOTSET)


def test_a_line_is_json(written: Written) -> None:
    LOG.info("the model %s is now version %s", "en-de", "ab\ncd", extra={"seconds": 1.5, "message_id": 7})
    LOG.debug("not written")
    (line,) = written.lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info", "logger": "cvmk.serving.test", "message": "the model en-de is now version ab\ncd", "session": None, "seconds": 1.5, "message_id": 7,
    }  # fmt: skip


def test_lines_have_their_session_through_tasks(written: Written) -> None:
    async def work(name: str) -> None:
        with logs.session(name):
            await asyncio.sleep(0)
            await asyncio.gather(*(asyncio.create_task(say(name)) for _ in range(2)))
            assert logs.current_session() == name
        assert logs.current_session() is None

    async def say(name: str) -> None:
        await asyncio.sleep(0)
        LOG.info("of %s", name)

    async def both() -> None:
        await asyncio.gather(work("a"), work('b"\n'))
        LOG.info("of %s", None)
        LOG.info("of %s", "c", extra={"session": "c"})

    asyncio.run(both())
    lines = written.lines()
    assert len(lines) == 6 and all(line["message"] == f"of {line['session']}" for line in lines)
    assert sorted(str(line["session"]) for line in lines) == ["None", "a", "a", 'b"\n', 'b"\n', "c"]


def fails() -> None:
    try:
        raise UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET)
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot translate {SECRET}") from error


def test_exceptions_are_types_and_places(written: Written) -> None:
    try:
        fails()
    except ValueError:
        LOG.exception("session %s failed (%s)", "s", "ab12")
    (line,) = written.lines()
    assert SECRET not in written.getvalue() and SECRET.split()[0] not in written.getvalue()
    assert line["message"] == "session s failed (ab12)" and line["error"] == "ValueError" and line["from"] == ["UnicodeDecodeError"]
    assert line["at"][-1].startswith("tests/serving/test_logs.py:") and line["at"][-1].endswith(" fails") and len(line["at"]) == 2


def test_exceptions_that_go_round_and_deep_ones_end(written: Written) -> None:
    one, other = ValueError(SECRET), KeyError(SECRET)
    one.__cause__, other.__cause__ = other, one
    LOG.error("round", exc_info=(ValueError, one, None))

    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        raise ServiceError(Status.INTERNAL, SECRET)

    try:
        deep(100)
    except ServiceError:
        LOG.exception("deep")
    assert len(written.lines()[0]["from"]) == len(written.lines()[1]["at"]) == 12 and SECRET not in written.getvalue()


def test_what_other_packages_say_is_their_template(written: Written) -> None:
    other = logging.getLogger("uvicorn.error")
    other.error("cannot read %s", SECRET)
    other.error("first line\n%s", SECRET)
    other.error("Task exception was never retrieved\nfuture: " + SECRET)
    other.error("with more", extra={"request": SECRET})
    other.error(f"Exception in callback work('{SECRET}')")
    logging.getLogger("uvicorn.access").info("GET /translate?q=%s", SECRET)
    logging.getLogger("cvmkfake").warning("no child of cvmk %s", SECRET)
    said = [line["message"] for line in written.lines()]
    assert said == ["cannot read %s", "first line", "Task exception was never retrieved", "with more", "Exception in callback work", "no child of cvmk %s"]
    assert SECRET not in written.getvalue()


def test_what_nobody_caught_in_the_loop(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    async def task() -> None:
        raise ValueError(SECRET)

    def callback(text: str) -> None:
        raise ValueError(text)

    async def check() -> None:
        loop = asyncio.get_running_loop()
        logs.watch(loop)
        lost = loop.create_task(task())
        await asyncio.sleep(0)
        del lost
        loop.call_soon(callback, SECRET)
        await asyncio.sleep(0.01)
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(check())
    lines = written.lines()
    assert len(lines) == 2 and {line["error"] for line in lines} == {"ValueError"} and all(line["message"].startswith("the event loop: ") for line in lines)
    assert SECRET not in written.getvalue() + "".join(capsys.readouterr())


def test_values_that_are_no_json_are_named_by_their_type(written: Written) -> None:
    LOG.info("x", extra={"bytes": SECRET.encode(), "set": {SECRET}})
    (line,) = written.lines()
    assert (line["bytes"], line["set"]) == ("bytes", "set")
