"""What the service writes down of itself: counts and times, nothing of its clients."""

from __future__ import annotations

import asyncio
import logging
import resource
from pathlib import Path
from typing import Any

import pytest
from served import ask, serving, until

from cvmk.errors import ConfigError
from cvmk.serving import messages
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.metrics import LIVE, TEXT, Load, Metrics
from cvmk.serving.recording import ServiceLog
from cvmk.telemetry import RunLog, read_events
from cvmk.telemetry.schema import Event, Resources, Serving, ServingEnded, ServingStarted


def events(folder: Path) -> list[Event]:
    records, problems = read_events(folder / "events.jsonl")
    assert problems == []
    return [record.event for record in records]


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_each_period_has_what_happened_in_it(tmp_path: Path) -> None:
    metrics = Metrics(["en-de", "de-en"], lambda: Load(3, {"en-de": 70}, {"en-de": 20}))
    metrics.request("Translate", 0.03)

    async def go() -> None:
        async with ServiceLog(tmp_path, 3600.0, metrics) as log:
            await log.started({"en-de": {"engine": "native"}}, {"gRPC": "127.0.0.1:1"})
            metrics.request("Translate", 0.01)
            metrics.request("TranslateStream", 0.01, ServiceError(Status.RESOURCE_EXHAUSTED, "no", reason="queue"))
            metrics.translated("en-de", TEXT, 2000, 40_000)
            metrics.translated("en-de", LIVE, 4000, 20_000)
            metrics.said("en-de", 30, 4)
            await log._write(log._period())

    run(go())
    started, period, last, ended = events(tmp_path)
    assert isinstance(started, ServingStarted) and started.text() == "serving en-de, gRPC at 127.0.0.1:1" and isinstance(ended, ServingEnded)
    assert isinstance(period, Serving) and period.sessions == 3 and period.requests == {"OK": 1, "RESOURCE_EXHAUSTED": 1} and period.rejections == {"queue": 1}
    assert period.models["en-de"] == {
        "translations": 2, "queue_seconds": 0.003, "decode_seconds": 0.03, "first_text_seconds": None, "waiting_tokens": 70, "running_tokens": 20,
        "committed_characters": 30, "deleted_characters": 4,
    }  # fmt: skip
    assert isinstance(last, Serving) and last.requests == {} and last.models["en-de"]["translations"] == 0 and last.models["en-de"]["decode_seconds"] is None


def test_a_disk_that_is_full_ends_the_log_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def go() -> None:
        async with ServiceLog(tmp_path, 0.01, Metrics(["en-de"])) as log:
            assert log._task is not None
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
            await asyncio.wait_for(log._task, 20)

    with caplog.at_level(logging.ERROR):
        try:
            run(go())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "goes on without its log" in caplog.text


def test_a_server_writes_its_log(tmp_path: Path, serve_config: Any) -> None:
    config = serve_config(server={"log": str(tmp_path / "log"), "log_every": 1.0})

    async def go() -> None:
        async with serving(config) as (server, channel):
            await ask(channel, "Translate", messages.TranslateRequest(texts=[b"a man rides"]))
            await until(lambda: sum(isinstance(event, Resources) for event in events(tmp_path / "log")) >= 1)

    run(go())
    found = events(tmp_path / "log")
    assert isinstance(found[0], ServingStarted) and list(found[0].models) == ["en-de"] and "gRPC" in found[0].addresses
    periods = [event for event in found if isinstance(event, Serving)]
    assert sum(event.requests.get("OK", 0) for event in periods) == 1 == sum(event.models["en-de"]["translations"] for event in periods)
    assert isinstance(found[-1], ServingEnded) and "man" not in (tmp_path / "log" / "events.jsonl").read_text()


def test_two_servers_do_not_share_a_log(tmp_path: Path, serve_config: Any) -> None:
    config = serve_config(server={"log": str(tmp_path / "log")})
    log = RunLog(tmp_path / "log")

    async def go() -> None:
        async with serving(config):
            pass

    with pytest.raises(ConfigError, match="another process writes the logs in"):
        run(go())
    log.close()
