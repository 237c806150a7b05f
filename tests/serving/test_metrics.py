"""What is counted, that labels stay few, who may ask for it, and the dashboard that shows it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cvmk.errors import DataError
from cvmk.serving import messages
from cvmk.serving.errors import REASONS, ServiceError, Status
from cvmk.serving.exporter import Exporter
from cvmk.serving.metrics import CANCELLED, LIVE, METHODS, TEXT, Load, Metrics

DASHBOARD = Path(__file__).parents[2] / "docs" / "deploy" / "grafana.json"
DOCUMENT = DASHBOARD.with_name("operating.md")
documented = pytest.mark.skipif(not DASHBOARD.parents[1].is_dir(), reason="a source distribution has no documents")


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = metrics.exposition()[0].decode()
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in text_string_to_metric_families(text) for one in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def test_requests_and_why_they_were_rejected() -> None:
    metrics = Metrics(["en-de"])
    metrics.request("Translate", 0.03)
    metrics.request("Translate", 0.01, ServiceError(Status.INVALID_ARGUMENT, "no"))
    metrics.request("TranslateStream", 70, ServiceError(Status.RESOURCE_EXHAUSTED, "no", reason="stuck"))
    metrics.request("/translate", 0.01, ServiceError(Status.RESOURCE_EXHAUSTED, "no", reason="queue"))
    metrics.request("Translate", 0.01, ServiceError(Status.UNAUTHENTICATED, "no"))
    assert value(metrics, "cvmk_requests_total", method="Translate", status="OK") == 1
    assert value(metrics, "cvmk_requests_total", method="Translate", status="INVALID_ARGUMENT") == 1
    assert value(metrics, "cvmk_request_seconds_count", kind="text") == 4 and value(metrics, "cvmk_request_seconds_sum", kind="live") == 70
    assert value(metrics, "cvmk_request_seconds_bucket", kind="text", le="0.02") == 3
    reasons = {key[1][0][1]: found for key, found in samples(metrics).items() if key[0] == "cvmk_rejections_total"}
    assert {reason: found for reason, found in reasons.items() if found} == {"stuck": 1, "queue": 1, "unauthenticated": 1}
    assert set(REASONS) < set(reasons)


def test_translations_and_what_streams_show() -> None:
    metrics = Metrics(["en-de", "de-en"])
    metrics.translated("en-de", TEXT, 2000, 40_000)
    metrics.translated("en-de", LIVE, 3000, 10_000)
    metrics.first_text("en-de", 0.012)
    metrics.said("de-en", 30, 4)
    metrics.said("de-en", 5, 0)
    metrics.conflated()
    metrics.conflated(3)
    metrics.cancelled("client", 17)
    metrics.cancelled("deadline")
    assert value(metrics, "cvmk_translations_total", model="en-de", kind="text") == value(metrics, "cvmk_translations_total", model="en-de", kind="live") == 1
    assert value(metrics, "cvmk_queue_seconds_sum", model="en-de") == pytest.approx(0.005)
    assert value(metrics, "cvmk_decode_seconds_sum", model="en-de") == pytest.approx(0.05)
    assert value(metrics, "cvmk_first_text_seconds_bucket", model="en-de", le="0.015") == 1
    assert value(metrics, "cvmk_committed_characters_total", model="de-en") == 35 and value(metrics, "cvmk_deleted_characters_total", model="de-en") == 4
    assert value(metrics, "cvmk_tentative_conflated_total") == 4
    assert value(metrics, "cvmk_cancelled_total", kind="client") == 1 and value(metrics, "cvmk_cancelled_steps_saved_total") == 17


def test_gauges_are_what_there_is_when_somebody_looks() -> None:
    load = Load()
    metrics = Metrics(["en-de", "de-en"], lambda: load, "1.2.3")
    assert value(metrics, "cvmk_sessions_active") == 0 and value(metrics, "cvmk_waiting_tokens", model="en-de") == 0
    load = Load(3, {"en-de": 40}, {"en-de": 7, "de-en": 9, "secret": 1})
    assert value(metrics, "cvmk_sessions_active") == 3 and value(metrics, "cvmk_waiting_tokens", model="en-de") == 40
    assert value(metrics, "cvmk_running_tokens", model="de-en") == 9 and "secret" not in metrics.exposition()[0].decode()
    assert value(metrics, "cvmk_build_info", version="1.2.3") == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the client reads /proc")
def test_the_process() -> None:
    found = Metrics([])
    assert value(found, "process_resident_memory_bytes") > 1e7 and value(found, "process_open_fds") > 2


def test_two_do_not_share_a_registry() -> None:
    one, other = Metrics(["a"]), Metrics(["a"])
    one.conflated()
    assert value(other, "cvmk_tentative_conflated_total") == 0


def test_series_stay_few_whatever_clients_send() -> None:
    metrics = Metrics(["en-de", "de-en"])
    for name in (*METHODS, *(f"/{number}" for number in range(2000))):
        for error in (None, ServiceError(Status.RESOURCE_EXHAUSTED, name, reason=name)):
            metrics.request(name, 0.1, error)
        metrics.translated(name, TEXT, 1, 1)
        metrics.first_text(name, 1)
        metrics.said(name, 1, 1)
        metrics.cancelled(name)
    found = samples(metrics)
    assert len(found) <= 230 and not any("_created" in name for name, _ in found)
    known = {*METHODS, *REASONS, *CANCELLED, "en-de", "de-en", "other", "OK", TEXT, LIVE, "unauthenticated", "forbidden", "", *(one.name for one in Status)}
    assert {text for _, labels in found for key, text in labels if key != "le"} <= known
    ordinary = Metrics(["en-de", "de-en"])
    for method in ("Translate", "TranslateStream", "Detect", "/translate", "/languages"):
        for error in (None, ServiceError(Status.RESOURCE_EXHAUSTED, ""), ServiceError(Status.INVALID_ARGUMENT, "")):
            ordinary.request(method, 0.1, error)
    assert len(samples(ordinary)) <= 200


def test_every_method_of_the_protocol_is_one() -> None:
    assert {method for service in messages.services().values() for method in service} <= set(METHODS)


def test_the_loop_that_is_held_up() -> None:
    metrics = Metrics([])

    async def check() -> None:
        watching = asyncio.create_task(metrics.watch_loop(0.01))
        await asyncio.sleep(0.005)
        time.sleep(0.1)
        await asyncio.sleep(0.03)
        watching.cancel()

    asyncio.run(check())
    assert value(metrics, "cvmk_event_loop_lag_seconds_count") >= 1 and value(metrics, "cvmk_event_loop_lag_seconds_sum") > 0.05


# over HTTP


async def ask(port: int, request: bytes) -> tuple[str, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    return status, {name.lower(): text for name, _, text in (field.partition(": ") for field in fields)}, body


def test_prometheus_asks() -> None:
    metrics = Metrics(["en-de"])
    metrics.translated("en-de", TEXT, 1, 1)

    async def check() -> None:
        async with Exporter(metrics, "127.0.0.1", 0) as exporter:
            status, fields, body = await ask(exporter.port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status == "HTTP/1.1 200 OK" and fields["content-type"].startswith("text/plain; version=") and int(fields["content-length"]) == len(body)
            assert b'cvmk_translations_total{kind="text",model="en-de"} 1.0' in body
            accept = b"Accept: application/openmetrics-text; version=1.0.0;q=0.8,text/plain;q=0.2\r\n"
            _, fields, body = await ask(exporter.port, b"GET /metrics?x=1 HTTP/1.1\r\n" + accept + b"\r\n")
            assert fields["content-type"].startswith("application/openmetrics-text") and body.endswith(b"# EOF\n")
            status, fields, body = await ask(exporter.port, b"HEAD /metrics HTTP/1.1\r\n\r\n")
            assert status.endswith("200 OK") and not body and int(fields["content-length"]) > 1000

    asyncio.run(check())


def test_whoever_asks_often_is_given_the_same_again() -> None:
    async def check() -> None:
        sessions = [1]
        metrics = Metrics(["en-de"], lambda: Load(sessions[0]))
        for fresh, expected in ((100.0, "1.0"), (0.0, "2.0")):
            async with Exporter(metrics, "127.0.0.1", 0, fresh=fresh) as exporter:
                sessions[0] = 1
                assert b"cvmk_sessions_active 1.0" in (await ask(exporter.port, b"GET /metrics HTTP/1.1\r\n\r\n"))[2]
                sessions[0] = 2
                assert f"cvmk_sessions_active {expected}".encode() in (await ask(exporter.port, b"GET /metrics HTTP/1.1\r\n\r\n"))[2]

    asyncio.run(check())


def test_others_ask(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with Exporter(Metrics(["en-de"]), "127.0.0.1", 0) as exporter:
            for request, status in (
                (b"GET /secret HTTP/1.1\r\n\r\n", "404"),
                (b"POST /metrics HTTP/1.1\r\nContent-Length: 1\r\n\r\n", "405"),
                (b"nonsense\r\n\r\n", "400"),
                (b"\xff\x00 / HTTP/2\r\n\r\n", "400"),
                (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 9000, "431"),
            ):
                answer, _, body = await ask(exporter.port, request)
                assert answer.split(" ")[1] == status and b"secret" not in body
            with contextlib.suppress(ConnectionError):  # hung up on while it writes
                await ask(exporter.port, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 10**7)
            silent = [await asyncio.open_connection("127.0.0.1", exporter.port) for _ in range(16)]
            answer, _, _ = await ask(exporter.port, b"GET /metrics HTTP/1.1\r\n\r\n")
            assert answer.split(" ")[1] == "503"
            for _, writer in silent:
                writer.close()
            await asyncio.sleep(0.05)
            answer, _, _ = await ask(exporter.port, b"GET /metrics HTTP/1.1\r\n\r\n")
            assert answer.split(" ")[1] == "200"
            taken = exporter.port
            with pytest.raises(DataError, match=f"server.metrics_port: cannot listen at 127.0.0.1:{taken}"):
                await Exporter(Metrics([]), "127.0.0.1", taken).__aenter__()
            await asyncio.open_connection("127.0.0.1", exporter.port)  # says nothing, and holds up no end
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", taken)

    begin = time.monotonic()
    asyncio.run(check())
    assert time.monotonic() - begin < 4.5 and not caplog.records


def test_a_silent_client_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvmk.serving.exporter._SECONDS", 0.1)

    async def check() -> None:
        async with Exporter(Metrics([]), "127.0.0.1", 0) as exporter:
            reader, _ = await asyncio.open_connection("127.0.0.1", exporter.port)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 5)

    asyncio.run(check())


def test_it_needs_no_torch() -> None:
    code = "import sys, cvmk.serving.exporter, cvmk.serving.logs, cvmk.serving.traces; assert not {'torch', 'opentelemetry', 'grpc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# the dashboard


def expressions(dashboard: Any) -> list[str]:
    if isinstance(dashboard, dict):
        own = [text for key, text in dashboard.items() if key in ("expr", "definition") and isinstance(text, str)]
        return own + [text for part in dashboard.values() for text in expressions(part)]
    return [text for part in dashboard for text in expressions(part)] if isinstance(dashboard, list) else []


@documented
def test_every_expression_of_the_dashboard_names_metrics_and_labels_that_there_are() -> None:
    metrics = Metrics(["en-de"])
    metrics.request("Translate", 0.1)
    found = samples(metrics)
    names, labels = {name for name, _ in found}, {key for _, pairs in found for key, _ in pairs}
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    said = expressions(dashboard)
    assert len(said) > 25
    shown = set()
    for text in said:
        named = set(re.findall(r"\b(?:cvmk|process)_\w+", text))
        assert named and named <= names, text
        assert set(re.findall(r"(\w+)=~?\"", text)) <= labels | {"instance"}, text
        for by in re.findall(r"by \(([^)]*)\)", text):
            assert set(by.split(", ")) <= labels | {"instance"}, text
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}")
        shown |= named
    ours = {re.sub("_(bucket|count|sum)$", "", name) for name in names if name.startswith("cvmk_")}
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in shown if name.startswith("cvmk_")} == ours  # and it shows all of them


@documented
def test_the_document_names_every_metric() -> None:
    metrics = Metrics(["en-de"])
    metrics.request("Translate", 0.1)
    families = {family.name: family.type for family in text_string_to_metric_families(metrics.exposition()[0].decode()) if family.name.startswith("cvmk_")}
    ours = {name + "_total" if kind == "counter" else name: kind for name, kind in families.items()}
    rows = re.findall(r"^\| `(cvmk_\w+)`[^|]*\| (\w+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == ours


@documented
def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
