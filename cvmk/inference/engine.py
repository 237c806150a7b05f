"""What an engine is: requests go in, events come out, a step at a time; and the search of a whole batch on top of that."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cvmk.errors import ConfigError
from cvmk.inference.options import FIRST_PIECE, Hypothesis, SearchOptions


@dataclass(frozen=True)
class Request:
    """A sentence to translate.

    id       names the request until it has ended; the caller's choice.
    source   its pieces without special ids, at most max_length - 1 of the engine's.
    options  how to search.
    prefix   pieces that every hypothesis begins with. They count as its pieces, in its score too, whatever the options forbid.
    partial  whether to tell after each step what the translation is so far.
    state    what the engine keeps of a source that grows (`NativeEngine.open_source`), for one request at a time; None: nothing.
    timeout  seconds from its submission, after which it ends with what it has then; None: no limit.
    """

    id: Hashable
    source: Sequence[int]
    options: SearchOptions = field(default_factory=SearchOptions)
    prefix: Sequence[int] = ()
    partial: bool = False
    timeout: float | None = None
    state: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Partial:
    """The pieces of a request's best hypothesis so far. A beam may take pieces back."""

    id: Hashable
    tokens: list[int]


@dataclass(frozen=True)
class Finished:
    """A request has ended; its hypotheses, the best first. Nothing more comes of it, and its id is free.

    reason is "finished", "expired" where its time was over (the hypotheses are what there was by then), or "failed" where there was no memory for it.
    """

    id: Hashable
    hypotheses: list[Hypothesis]
    reason: Literal["finished", "expired", "failed"] = "finished"


Event = Partial | Finished


class Engine(Protocol):
    """What searches for translations of piece ids.

    submit  takes a request, which waits until a step begins it. Raises ValueError for an id that is in use, and ConfigError for a source, prefix
            or option that the model cannot have.
    step    begins what there is room for, brings everything that runs one piece further, and returns what there is to tell, in order. [] where
            there is nothing to do. One thread may call it at a time (RuntimeError). Where it raises, the requests that it was working on are
            gone, and the engine goes on with the others.
    cancel  ends a request, waiting or running, and returns True: no event of it comes after, and its id is free. False where there is no such
            request, because it was never submitted, has ended, or was cancelled. May be called from any thread, also during a step.
    search  the hypotheses of each source, the best first, independent of submitted requests; `prefixes` has one for each source.

    submit and cancel may be called from any thread. A request's result does not depend on what else is submitted.
    """

    @property
    def max_length(self) -> int:
        """Longest source or target in pieces, with the special one at its end or beginning."""

    def submit(self, request: Request) -> None: ...

    def step(self) -> list[Event]: ...

    def cancel(self, id: Hashable) -> bool: ...

    def search(self, sources: Sequence[Sequence[int]], options: SearchOptions, prefixes: Sequence[Sequence[int]] | None = None) -> list[list[Hypothesis]]: ...


class Steps(Protocol):
    """The part of an engine that `search_batch` is made of."""

    def submit(self, request: Request) -> None: ...

    def step(self) -> list[Event]: ...


def search_batch(
    engine: Steps, sources: Sequence[Sequence[int]], options: SearchOptions, prefixes: Sequence[Sequence[int]] | None = None
) -> list[list[Hypothesis]]:
    """`Engine.search` by submitting all and stepping until all are finished; for an engine that has no other requests."""
    found: dict[Hashable, list[Hypothesis]] = {}
    for index, (source, prefix) in enumerate(zip(sources, prefixes or [()] * len(sources), strict=True)):
        engine.submit(Request(index, source, options, prefix))
    while len(found) < len(sources):
        found.update((event.id, event.hypotheses) for event in engine.step() if isinstance(event, Finished))
    return [found[index] for index in range(len(sources))]


def check_request(request: Request, max_length: int, vocab_size: int) -> None:
    """Raises ConfigError where a model of so many positions and pieces cannot have the request's source, prefix or options."""
    check_pieces(request.source, request.prefix, request.options, max_length, vocab_size)


def check_pieces(source: Sequence[int], prefix: Sequence[int], options: SearchOptions, max_length: int, vocab_size: int) -> None:
    """`check_request` of what a request is made of."""
    for name, ids in (("source", source), ("prefix", prefix)):
        if len(ids) > max_length - 1:
            raise ConfigError(f"the {name} has {len(ids)} pieces, and the model has room for {max_length - 1} (model.max_length = {max_length}): shorten it")
    for name, ids, least in (("source", source, 1), ("prefix", prefix, FIRST_PIECE), ("suppressed list", options.suppressed, FIRST_PIECE)):
        if not ids or (min(ids) >= least and max(ids) < vocab_size):
            continue
        wrong = next((id for id in ids if not least <= id < vocab_size), None)
        if wrong is not None:
            raise ConfigError(f"the {name} has the id {wrong}, and ids of pieces are from {least} to {vocab_size - 1}: encode with the model's tokenizer")
