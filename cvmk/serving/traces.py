"""Spans for OpenTelemetry, where `server.traces` asks for them and it is installed; else nothing, at the cost of a call.

Attributes are names, numbers and statuses, never a client's text, and of an exception only its type.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from cvmk.serving.errors import ServiceError

_LOG = logging.getLogger(__name__)
_SERVICE = "cvmk"


class Span:
    """What is being traced. This one is nobody's: it takes everything and keeps nothing."""

    def set(self, **attributes: str | int | float | bool) -> None:
        """Attributes that are known only now."""


class Traces:
    """Makes spans, which are nested as their contexts are, across tasks too.

    enabled    as `server.traces` says. Where it is and OpenTelemetry is missing, the log says so once, and nothing is traced.
    processor  an OpenTelemetry SpanProcessor instead of the one that sends spans to a collector (OTEL_EXPORTER_OTLP_ENDPOINT and its like); for tests.
    """

    def __init__(self, enabled: bool, processor: Any = None) -> None:
        self._provider = _provider(processor) if enabled else None
        self._tracer = None if self._provider is None else self._provider.get_tracer(_SERVICE)

    @property
    def active(self) -> bool:
        return self._tracer is not None

    @contextlib.contextmanager
    def span(self, name: str, headers: Mapping[str, str] | None = None, **attributes: str | int | float | bool) -> Iterator[Span]:
        """A span as long as the context; a child of the one that it stands in, or of the one that `headers` (`traceparent`, in lower case) tell of."""
        if self._tracer is None:
            yield _NOBODYS
            return
        from opentelemetry.trace import Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(headers)) if headers and "traceparent" in headers else None
        with self._tracer.start_as_current_span(
            name, context=parent, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:  # an exception's text may quote a client
            try:
                yield _Recorded(span)
            except ServiceError as error:
                span.set_attribute("status", error.status.name)
                raise
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(Status(StatusCode.ERROR))
                raise

    def close(self) -> None:
        """Send what is still to be sent. It may take seconds: for a thread beside the event loop."""
        if self._provider is not None:
            self._provider.shutdown()


class _Recorded(Span):
    def __init__(self, span: Any) -> None:
        self._span = span

    def set(self, **attributes: str | int | float | bool) -> None:
        self._span.set_attributes(attributes)


_NOBODYS = Span()


def _provider(processor: Any) -> Any:
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        if processor is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            processor = BatchSpanProcessor(OTLPSpanExporter())
    except ImportError:
        _LOG.warning("server.traces is set, and OpenTelemetry is not installed: nothing is traced until you run pip install 'cvmk[traces]'")
        return None
    provider = TracerProvider(resource=Resource.create({"service.name": _SERVICE}), shutdown_on_exit=False)
    provider.add_span_processor(processor)
    return provider
