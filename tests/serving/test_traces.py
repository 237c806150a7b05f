"""Spans where they are asked for, nothing where they are not, and no client's text in them."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from typing import Any

import pytest

from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.traces import Traces

SECRET = "Geheimtext"


class Kept:
    """A processor that keeps spans."""

    def __new__(cls) -> Any:
        sdk = pytest.importorskip("opentelemetry.sdk.trace")

        class Processor(sdk.SpanProcessor):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                self.spans: list[Any] = []

            def on_end(self, span: Any) -> None:
                self.spans.append(span)

        return Processor()


def test_spans_are_nested_through_tasks() -> None:
    kept = Kept()
    traces = Traces(True, kept)
    assert traces.active

    async def decode(number: int) -> None:
        with traces.span("decode", number=number) as span:
            await asyncio.sleep(0)
            span.set(steps=number * 10)

    async def request() -> None:
        with traces.span("Translate", texts=2):
            await asyncio.gather(*(asyncio.create_task(decode(number)) for number in range(2)))
        with traces.span("Detect"):
            pass

    asyncio.run(request())
    spans = {(span.name, span.attributes.get("number")): span for span in kept.spans}
    whole = spans["Translate", None]
    assert len(spans) == 4 and dict(whole.attributes) == {"texts": 2} and whole.parent is None and spans["Detect", None].parent is None
    for number in range(2):
        one = spans["decode", number]
        assert one.parent.span_id == whole.context.span_id and one.attributes["steps"] == number * 10
    assert whole.resource.attributes["service.name"] == "cvmk"


def test_a_clients_span_goes_on() -> None:
    kept = Kept()
    traces = Traces(True, kept)
    for headers in ({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, {"traceparent": "nonsense"}, {"other": "x"}):
        with traces.span("Translate", headers):
            pass
    one, *others = kept.spans
    assert f"{one.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c" and f"{one.parent.span_id:016x}" == "b7ad6b7169203331"
    assert all(span.parent is None for span in others)


def test_errors_are_told_without_their_text() -> None:
    kept = Kept()
    traces = Traces(True, kept)
    for error in (ServiceError(Status.RESOURCE_EXHAUSTED, SECRET), ValueError(SECRET)):
        with pytest.raises(type(error)), traces.span("Translate"):
            raise error
    rejected, failed = kept.spans
    assert rejected.attributes["status"] == "RESOURCE_EXHAUSTED" and rejected.status.is_ok and not rejected.events
    assert failed.attributes["error.type"] == "ValueError" and not failed.status.is_ok and not failed.events
    assert SECRET not in "".join(span.to_json() for span in kept.spans)


def test_where_nobody_asks_for_traces_nothing_is_imported() -> None:
    code = """if True:
        import sys
        from cvmk.serving.traces import Traces
        traces = Traces(False)
        with traces.span("x", {"traceparent": "y"}, a=1) as span:
            span.set(b=2)
        traces.close()
        assert not traces.active and not [name for name in sys.modules if name.startswith("opentelemetry")]
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_package_the_log_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with caplog.at_level(logging.WARNING):
        traces = Traces(True)
    assert not traces.active and "pip install 'cvmk[traces]'" in caplog.text and len(caplog.records) == 1
    with traces.span("x"):
        pass
    traces.close()


def test_spans_are_sent_to_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    received = []

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        received.append((head, await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async def check() -> None:
        async with await asyncio.start_server(collect, "127.0.0.1", 0) as server:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            traces = Traces(True)
            with traces.span("TranslateStream", model="en-de"):
                pass
            await asyncio.to_thread(traces.close)

    asyncio.run(check())
    ((head, body),) = received
    assert head.startswith(b"POST /v1/traces ") and b"TranslateStream" in body and b"en-de" in body
