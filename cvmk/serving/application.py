"""The service, whatever the transport: who may ask for what, which model answers, what runs, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from cvmk import __version__
from cvmk.config.serve import PRIORITIES, ServeConfig
from cvmk.errors import ConfigError
from cvmk.inference.options import SearchOptions
from cvmk.serving.answers import Language, ModelInfo, ServedLanguage, Stats, Translated
from cvmk.serving.auth import Caller
from cvmk.serving.detection import AUTO, Detector, Sticky, found_for_each, tag_of
from cvmk.serving.errors import ServiceError, Status, internal, invalid
from cvmk.serving.events import MOST_CREDIT, Opening
from cvmk.serving.limits import Limits
from cvmk.serving.metrics import TEXT, Load, Metrics
from cvmk.serving.models import Models, Served, answers
from cvmk.serving.passages import Cut, cut
from cvmk.serving.scheduler import Searched
from cvmk.serving.sessions import LiveSession, Rules
from cvmk.serving.tasks import in_pieces, together
from cvmk.serving.traces import Traces

_Said = tuple[tuple[str, ...], float, int, int]
"""Of a sentence: its candidates, the score of the first, and microseconds in the queue and in the engine."""
_ADMITTED: ContextVar[bool] = ContextVar("cvmk_admitted", default=False)
_LONGEST_NAME = 64
_PIECE = 8
"""Texts that are made ready before the event loop turns to others."""
_LONG = 1000
"""Characters of a text that is cut into sentences beside the event loop."""


@dataclass(frozen=True)
class _Search:
    """How each sentence of a request is searched for."""

    client: str
    priority: str
    beam_size: int
    alternatives: int
    timeout: float


class Application:
    """Under gRPC, HTTP and WebSockets alike. Everything runs in one event loop; `start` first, `stop` last."""

    def __init__(self, config: ServeConfig) -> None:
        self.config, self.limits = config, Limits(config.limits)
        self.metrics, self.traces = Metrics(config.models, self._load, __version__), Traces(config.server.traces)
        self.catalogue = Models(config, self.metrics.cancelled)
        self.draining = False
        self._sessions: set[LiveSession] = set()
        self._requests = 0  # that run
        self._idle = asyncio.Event()
        self._translations = self._rejected = self._cancelled = 0
        self._started = time.monotonic()
        self._detectors: dict[tuple[str, ...], Detector] = {}
        self._background: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the models. Raises what is wrong with them."""
        await self.catalogue.start()
        self._background = asyncio.create_task(asyncio.to_thread(self._detector("", "").load))  # half a second that nobody waits for

    async def stop(self) -> None:
        """Close the models, once nothing uses them."""
        if self._background is not None:
            await asyncio.wait({self._background})
        await asyncio.to_thread(self.traces.close)
        await self.catalogue.stop()

    # -- whole texts -------------------------------------------------------------------------------------------------------------------
    async def translate(
        self,
        caller: Caller,
        texts: Sequence[str],
        *,
        source: str = AUTO,
        target: str = "",
        model: str = "",
        beam_size: int = 0,
        alternatives: int = 0,
        priority: str = "normal",
        timeout: float | None = None,
    ) -> list[Translated]:
        """The translation of each text, however many sentences and lines it has. `timeout` in seconds. Raises ServiceError."""
        with self._counted():
            self.limits.check_search(beam_size, alternatives)
            self.limits.admit_request(caller, sum(map(len, texts)))
            priority = _priority(priority)
            source, target = self._pair(source, target, model)
            longest = self.config.limits.request_seconds
            timeout = longest if timeout is None else min(timeout, longest)
            if source != AUTO:
                self.catalogue.find(source, target, model).scheduler.check_room(caller.id)
            found = self._languages_of(texts, source, target, model)
            search = _Search(caller.id, priority, beam_size, alternatives, timeout)
            translated = await self._translated(texts, [source if one is None else one.code for one in found], target, model, search)
            self._translations += len(texts)
            return [one if language is None else dataclasses.replace(one, language=language) for one, language in zip(translated, found, strict=True)]

    async def _translated(self, texts: Sequence[str], sources: Sequence[str], target: str, model: str, search: _Search) -> list[Translated]:
        cuts: list[Cut] = []
        places: dict[Served, list[int]] = {}
        translated: dict[int, Translated] = {}

        async def of_model(served: Served, those: list[int]) -> None:
            said = iter(await self._searched(served, [source for place in those for source in cuts[place].sources], search))
            async for place in in_pieces(those, _PIECE):
                translated[place] = _whole(cuts[place], list(itertools.islice(said, len(cuts[place].sources))), search, served.info.name)

        with contextlib.ExitStack() as leases:
            async for text, source in in_pieces(zip(texts, sources, strict=True), _PIECE):
                served = self.catalogue.find(source, target, model)
                if served not in places:
                    served.scheduler.check_room(search.client)
                    leases.callback(served.lease().release)
                    places[served] = []
                places[served].append(len(cuts))
                arguments = text, served.translator, served.info.source
                cuts.append(cut(*arguments) if len(text) < _LONG else await asyncio.to_thread(cut, *arguments))
            await together(of_model, list(places.items()))
        return [translated[place] for place in range(len(texts))]

    async def _searched(self, served: Served, sources: Sequence[Sequence[int]], search: _Search) -> list[_Said]:
        options = _options(max(search.beam_size or served.beam_size, search.alternatives + 1), search.alternatives + 1)

        def told(one: Searched) -> _Said:
            self.metrics.translated(served.info.name, TEXT, one.queue_us, one.decode_us)
            found = served.translator.decode(one.found.hypotheses)
            return tuple(hypothesis.text for hypothesis in found.hypotheses), found.score, one.queue_us, one.decode_us

        try:
            return await served.scheduler.search_all(search.client, search.priority, sources, options, told=told, timeout=search.timeout)
        except ConfigError as error:
            raise invalid("texts", str(error)) from error

    # -- streams -----------------------------------------------------------------------------------------------------------------------
    def open(self, caller: Caller, opening: Opening) -> LiveSession:
        """A stream, to be used inside `async with`. Raises ServiceError."""
        with self._counted(False):
            if self.draining:
                raise _draining()
            self.limits.check_search(opening.beam_size)
            _priority(opening.priority)
            if not 0 <= opening.credit <= MOST_CREDIT:
                raise invalid("open.credit", f"is {opening.credit}, and may be at most {MOST_CREDIT}")
            if len(opening.session) > _LONGEST_NAME or not opening.session.isprintable():
                raise invalid("open.session", f"must have at most {_LONGEST_NAME} characters, all of them printable")
            source, target = self._pair(opening.source, opening.target, opening.model)
            limits = self.config.limits
            rules = Rules(limits.text_bytes, limits.unread_tokens, limits.stuck_seconds, limits.idle_seconds, limits.request_seconds)
            language = Sticky(self._detector(target, opening.model), None if source == AUTO else source)
            place = contextlib.ExitStack()
            place.enter_context(self.limits.session(caller))
            try:
                opening = Opening(**{**vars(opening), "source": source, "target": target})
                session = LiveSession(
                    self.catalogue, caller.id, opening, rules, language, self.metrics, ended=lambda ended: self._closed(ended, place)
                )
            except BaseException:
                place.close()
                raise
            self._sessions.add(session)
            self._idle.clear()
            return session

    def _closed(self, session: LiveSession, place: contextlib.ExitStack) -> None:
        if session in self._sessions:
            self._sessions.discard(session)
            place.close()
            self._check_idle()

    # -- what is served ----------------------------------------------------------------------------------------------------------------
    def detect(self, text: str) -> list[Language]:
        """The languages that can be translated from, by how probable it is that the text is in them. Raises ServiceError where none can be found out."""
        return self._detector("", "").rank(text)

    def languages(self) -> list[ServedLanguage]:
        """What can be translated from, and to what."""
        import langcodes

        return [ServedLanguage(code, langcodes.Language.get(code).display_name("en"), self.catalogue.targets(code)) for code in self.catalogue.sources()]

    def models(self) -> list[ModelInfo]:
        """All models, in the order of serve.toml."""
        return self.catalogue.infos()

    def stats(self) -> Stats:
        """Now."""
        load, passed = self._load(), time.monotonic() - self._started
        waiting, running = sum(load.waiting.values()), sum(load.running.values())
        return Stats(load.sessions, waiting, running, self._translations, self._rejected, self._cancelled, passed, self.draining)

    # -- for administrators --------------------------------------------------------------------------------------------------------------
    async def load(self, name: str, path: str = "") -> ModelInfo:
        """See `Models.load`."""
        return await self.catalogue.load(name, path)

    async def unload(self, name: str) -> None:
        """See `Models.unload`."""
        await self.catalogue.unload(name)

    async def drain(self, seconds: float | None = None) -> None:
        """Take no new work, and return when what runs has ended, or after so many seconds; None: as serve.toml says."""
        self.draining = True
        for session in list(self._sessions):
            session.hand_over()
        self._check_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.server.drain_seconds if seconds is None else seconds):
                await self._idle.wait()

    async def end(self, seconds: float) -> None:
        """Tell streams that still run that the server ends, and return when all that runs has ended, or after so many seconds."""
        for session in list(self._sessions):
            session.fail(_draining())
        self._check_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()

    # -- at the edges of transports ------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def observed(self, method: str, headers: Mapping[str, str] | None = None) -> Iterator[None]:
        """Counts, times and traces a call of one of `metrics.METHODS`. What nobody expected becomes a ServiceError INTERNAL with a number that the log
        explains, and nothing more."""
        begun, trouble = time.perf_counter(), None
        try:
            with self.traces.span(method, headers):
                yield
        except ServiceError as error:
            trouble = error
            raise
        except (asyncio.CancelledError, GeneratorExit):
            trouble = ServiceError(Status.CANCELLED, "the client has gone")
            raise
        except Exception:
            trouble = internal(method)
            raise trouble from None
        finally:
            self.metrics.request(method, time.perf_counter() - begun, trouble)

    def _load(self) -> Load:
        served = list(self.catalogue)
        waiting, running = ({one.info.name: getattr(one.scheduler, name) for one in served} for name in ("waiting", "running"))
        return Load(len(self._sessions), waiting, running)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """A request of several translations, one after the other: those that begin within the context are its own, and a server that drains waits for all of
        them. Raises ServiceError where it drains already."""
        if self.draining:
            raise _draining()
        self._requests += 1
        self._idle.clear()
        token = _ADMITTED.set(True)
        try:
            yield
        finally:
            _ADMITTED.reset(token)
            self._requests -= 1
            self._check_idle()

    # -- inside --------------------------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _counted(self, request: bool = True) -> Any:
        if request and self.draining and not _ADMITTED.get():
            raise _draining()
        self._requests += request
        self._idle.clear()
        try:
            yield
        except ServiceError as error:
            self._rejected += error.status is Status.RESOURCE_EXHAUSTED
            raise
        except asyncio.CancelledError:
            self._cancelled += 1
            raise
        finally:
            self._requests -= request
            self._check_idle()

    def _check_idle(self) -> None:
        if not self._requests and not self._sessions:
            self._idle.set()

    def _pair(self, source: str, target: str, model: str) -> tuple[str, str]:
        """Source and target as tags, "auto" and "" as they are; that some model translates them has been checked."""
        source = source or AUTO
        source = source if source == AUTO else tag_of("source", source)
        target = tag_of("target", target) if target else ""
        if not target and not model and len(targets := {info.target for info in self.models() if source == AUTO or answers(source, info.source)}) > 1:
            raise invalid("target", f"is missing, and {', '.join(sorted(targets))} are served")
        self.catalogue.find("" if source == AUTO else source, target, model)
        return source, target

    def _languages_of(self, texts: Sequence[str], source: str, target: str, model: str) -> list[Language | None]:
        """Of each text, where that was asked for."""
        if source != AUTO:
            return [None] * len(texts)
        detector = self._detector(target, model)
        return list(found_for_each(texts, lambda text: detector.rank(text)[0]))

    def _detector(self, target: str, model: str) -> Detector:
        """Of the languages that can be translated to the target, by that model."""
        infos = [info for info in self.models() if answers(target, info.target) and model in ("", info.name)]
        languages = tuple(dict.fromkeys(info.source for info in infos))
        if languages not in self._detectors:
            self._detectors[languages] = Detector(languages)
        return self._detectors[languages]


@functools.cache  # of as many as limits allow
def _options(beam_size: int, n_best: int) -> SearchOptions:
    return SearchOptions(beam_size=beam_size, n_best=n_best)


def _whole(text: Cut, said: Sequence[_Said], search: _Search, model: str) -> Translated:
    """A text's translation, of what was said of each of its sentences."""
    first, *others = (text.joined([texts[min(rank, len(texts) - 1)] for texts, *_ in said]) for rank in range(search.alternatives + 1))
    scores, waited, decoded = (list(values) for values in zip(*(one[1:] for one in said), strict=True)) if said else ([0.0], [0], [0])
    return Translated(first, others, None, sum(scores) / len(scores), max(waited), max(decoded), model)


def _priority(priority: str) -> str:
    if priority not in PRIORITIES:
        raise invalid("priority", f"is {priority!r}, and must be one of {', '.join(PRIORITIES)}")
    return priority


def _draining() -> ServiceError:
    return ServiceError(Status.UNAVAILABLE, "the server is draining: try another one, or again later", retry_after=1.0, reason="draining")


