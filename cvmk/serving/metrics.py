"""What the service does, in numbers for Prometheus.

Every label has few values: names of serve.toml's models, methods, statuses, kinds. No caller, address, session or text is ever one of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cvmk.errors import ConfigError
from cvmk.serving.errors import REASONS, ServiceError, Status

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigError("the service needs prometheus_client: pip install 'cvmk[serve]'") from error

TEXT, LIVE = "text", "live"
"""The kinds of translations: of whole texts, and of what grows."""
METHODS = {
    "Translate": TEXT, "TranslateStream": LIVE, "Detect": "other", "ListModels": "other", "GetStats": "other", "Load": "other", "Unload": "other",
    "Drain": "other", "/translate": TEXT, "/detect": "other", "/languages": "other", "/health": "other", "/frontend/settings": "other", "websocket": LIVE,
}  # fmt: skip
"""Of gRPC by their names, of HTTP by their paths; each with the kind of its work."""
CANCELLED = ("client", "deadline", "replaced", "server")
"""Who did not want a translation any more: its client, its deadline, a newer text of its session, the server."""
OTHER = "other"
_REJECTIONS = {
    Status.RESOURCE_EXHAUSTED: OTHER,
    Status.UNAUTHENTICATED: "unauthenticated",
    Status.PERMISSION_DENIED: "forbidden",
    Status.UNAVAILABLE: "draining",
}  # with the reason where the error has none

_WAITS = (0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
_DECODES = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_FIRST_TEXTS = (0.005, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 2.0)
_REQUESTS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
_LAGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.5)


@dataclass(frozen=True)
class Load:
    """What there is at this moment: open sessions, and of each model the tokens that wait and that are worked on."""

    sessions: int = 0
    waiting: Mapping[str, int] = field(default_factory=dict)
    running: Mapping[str, int] = field(default_factory=dict)


class _Model(NamedTuple):
    """One model's series, found once."""

    queue: Histogram
    decode: Histogram
    first_text: Histogram
    translations: Mapping[str, Counter]
    committed: Counter
    deleted: Counter


class Metrics:
    """Counts in a registry of its own.

    models   names of serve.toml's models; what belongs to another counts as "other".
    load     asked for the present load whenever somebody looks.
    version  of cvmk, shown beside the numbers.
    """

    def __init__(self, models: Collection[str], load: Callable[[], Load] = Load, version: str = "") -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._make(version)
        self._models = {name: self._model(name) for name in models}
        self._of_requests: dict[tuple[str, str], tuple[Counter, Histogram]] = {}  # series found once, by method and status
        self.registry.register(_Present(load, tuple(models)))
        ProcessCollector(registry=self.registry)  # resident memory, processor time, open files

    def _make(self, version: str) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

        self._requests = counter("cvmk_requests", "Requests that have been answered, streams when they end.", "method", "status")
        self._seconds = histogram("cvmk_request_seconds", "From a request to the end of its answer.", _REQUESTS, "kind")
        self._rejections = counter("cvmk_rejections", "Requests and streams that were not taken, or given up.", "reason")
        self._cancelled = counter("cvmk_cancelled", "Translations that were not finished, by who did not want them any more.", "kind")
        self._saved = counter("cvmk_cancelled_steps_saved", "Steps of decoding that these might still have taken.")
        self._conflated = counter("cvmk_tentative_conflated", "Tentative updates that newer ones replaced before they were sent.")
        self._lag = histogram("cvmk_event_loop_lag_seconds", "How late the event loop comes to what is due.", _LAGS)
        self._queue = histogram("cvmk_queue_seconds", "How long a translation waits for its model.", _WAITS, "model")
        self._decode = histogram("cvmk_decode_seconds", "How long a translation takes from then on.", _DECODES, "model")
        self._first = histogram("cvmk_first_text_seconds", "From a word to the first text that takes it into account.", _FIRST_TEXTS, "model")
        self._translations = counter("cvmk_translations", "Translations that were finished: of whole texts, and of what grows.", "model", "kind")
        self._committed = counter("cvmk_committed_characters", "Characters that streams have said for good.", "model")
        self._deleted = counter("cvmk_deleted_characters", "Characters that streams had shown and took back.", "model")
        Info("cvmk_build", "What runs here.", registry=self.registry).info({"version": version})
        for reason in (*REASONS, *_REJECTIONS.values()):
            self._rejections.labels(reason)  # there from the beginning, so that a first one is a rise
        for kind in CANCELLED:
            self._cancelled.labels(kind)

    def _model(self, name: str) -> _Model:
        translations = {kind: self._translations.labels(name, kind) for kind in (TEXT, LIVE)}
        histograms = self._queue.labels(name), self._decode.labels(name), self._first.labels(name)
        return _Model(*histograms, translations, self._committed.labels(name), self._deleted.labels(name))

    def _of(self, model: str) -> _Model:
        found = self._models.get(model) or self._models.get(OTHER)
        if found is None:
            found = self._models[OTHER] = self._model(OTHER)
        return found

    # what happens

    def request(self, method: str, seconds: float, error: ServiceError | None = None) -> None:
        """A request has been answered, or a stream has ended; `error` is what it ended with. `method` is one of METHODS."""
        series = method if method in METHODS else OTHER, "OK" if error is None else error.status.name
        if (found := self._of_requests.get(series)) is None:
            found = self._of_requests[series] = self._requests.labels(*series), self._seconds.labels(METHODS.get(method, OTHER))
        found[0].inc()
        found[1].observe(seconds)
        if error is not None and error.status in _REJECTIONS:
            self._rejections.labels(error.reason if error.reason in REASONS else _REJECTIONS[error.status]).inc()

    def translated(self, model: str, kind: str, queue_us: int, decode_us: int) -> None:
        """A translation is finished; `kind` is TEXT or LIVE."""
        of = self._of(model)
        of.translations[kind].inc()
        of.queue.observe(queue_us * 1e-6)
        of.decode.observe(decode_us * 1e-6)

    def first_text(self, model: str, seconds: float) -> None:
        """A stream's reader is sent the first text that takes a new word into account."""
        self._of(model).first_text.observe(seconds)

    def said(self, model: str, committed: int, deleted: int) -> None:
        """A stream's reader is sent so many characters for good, and so many of what it saw are taken back."""
        of = self._of(model)
        of.committed.inc(committed)
        of.deleted.inc(deleted)

    def conflated(self, updates: int = 1) -> None:
        """Tentative updates were replaced by a newer one before their reader was sent them."""
        self._conflated.inc(updates)

    def cancelled(self, kind: str, steps_saved: int = 0) -> None:
        """A translation was not finished; `kind` is one of CANCELLED."""
        self._cancelled.labels(kind if kind in CANCELLED else OTHER).inc()
        self._saved.inc(steps_saved)

    async def watch_loop(self, every: float = 0.5) -> None:
        """Measure how late the running event loop is, until this is cancelled."""
        while True:
            due = time.perf_counter() + every
            await asyncio.sleep(every)
            self._lag.observe(max(time.perf_counter() - due, 0.0))

    # who looks

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The numbers as text, and its media type: what of Prometheus' formats a header Accept asks for. A few milliseconds."""
        encoder, media_type = choose_encoder(accept)
        return encoder(_WithoutTimes(self.registry)), media_type


class _Present(Collector):
    """Gauges of what there is when somebody looks, so that nothing has to be told, or can be forgotten, in between."""

    def __init__(self, load: Callable[[], Load], models: tuple[str, ...]) -> None:
        self._load, self._models = load, models

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        yield GaugeMetricFamily("cvmk_sessions_active", "Streams that are open.", load.sessions)
        for name, tokens, text in (
            ("cvmk_waiting_tokens", load.waiting, "Source pieces times beam size that wait for a model."),
            ("cvmk_running_tokens", load.running, "Source pieces times beam size that a model works on."),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model in self._models:
                gauge.add_metric([model], tokens.get(model, 0))
            yield gauge


class _WithoutTimes(Collector):
    """A registry without the times at which series began: they would be a third of all series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
