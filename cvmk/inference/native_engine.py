"""The engine in C++ on the CPU kernels (csrc/engine/): encoder-decoders of attention, Mamba and SSRU, without torch in the process."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import threading
import weakref
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cvmk import libraries
from cvmk.config.section import MAX_THREADS
from cvmk.errors import ConfigError, DataError
from cvmk.formats import Manifest
from cvmk.formats.folder import WEIGHTS, read_model_weights
from cvmk.formats.stored import split_weights
from cvmk.formats.tensors import RawTensor, let_go
from cvmk.inference.engine import Event, Finished, Partial, Request, check_pieces, check_request
from cvmk.inference.options import BROKEN, Hypothesis, SearchOptions, checked_number
from cvmk.inference.shortlist import Shortlist, load_shortlist, wanted

if TYPE_CHECKING:
    from cvmk.nn import CVMTransformer

ComputeType = Literal["float32", "bfloat16", "int8", "int4"]
MAX_BATCH_TOKENS = 4096
"""Source positions times hypotheses of submitted requests that run at once, where nobody says another number."""
MAX_SESSIONS = 1024
"""Growing sources that are open at once, where nobody says another number."""
_MOST = 2**63 - 1  # of a whole number in the library; more than any length or vocabulary
_MIXERS = ("attention", "mamba", "ssru")
_PARTIAL, _FINISHED, _EXPIRED, _FAILED = range(4)  # csrc/engine/scheduler.h


def refusals(manifest: Manifest, device: str, compute_type: str) -> list[str]:
    """Why this engine cannot run a model so; empty where it can."""
    found = []
    _, reason = libraries.load("_native", "native")
    if reason is not None:
        found.append(f"the native engine needs the native library: {reason}")
    allowed = libraries.allowed_backends()
    if allowed and "native" not in allowed:
        found.append(f"the native engine computes with the native backend, and CVMK_BACKEND allows only {', '.join(allowed)}")
    if device != "cpu":
        found.append(f'device is {device!r}, and the native engine runs on "cpu"')
    if compute_type not in get_args(ComputeType):
        found.append(f"compute_type is {compute_type!r}, and the native engine has {', '.join(get_args(ComputeType))}")
    others = sorted({*manifest.model.encoder_mixers, *manifest.model.decoder_mixers} - {*_MIXERS})
    if others:
        found.append(f"the model has the mixers {', '.join(others)}, and the native engine has {', '.join(_MIXERS)}")
    return found


def of_model(model: CVMTransformer) -> NativeEngine:
    """The engine of a model's present weights, in their dtype, with as many threads as PyTorch has."""
    import torch

    from cvmk.formats.torch_weights import manifest_of, raw_tensors

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return NativeEngine(manifest_of(model), raw_tensors(model), dtype, torch.get_num_threads())


def load(
    folder: Path, manifest: Manifest, device: str, compute_type: str, threads: int | None = None, max_sessions: int = MAX_SESSIONS
) -> NativeEngine:
    """The engine of a model's folder. Raises DataError where its weights are not sound."""
    weights = read_model_weights(folder, manifest)
    try:
        return NativeEngine(manifest, weights, compute_type, threads, max_sessions=max_sessions, shortlist=load_shortlist(folder, manifest.vocab_size))
    except ValueError as error:
        raise DataError(f"{folder / WEIGHTS} {error}") from error


def default_threads() -> int:
    """As many as the process may use; OMP_NUM_THREADS bounds them too."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return max(1, min(allowed, int(given))) if given.isdigit() and int(given) else allowed


class NativeEngine:
    """An `engine.Engine` over weights by the names of `formats.folder`; they stay mapped while it lives.

    compute_type says how matrices that come as floats are stored and multiplied: "float32", "bfloat16" (float32 sums), "int8" (weights by rows) or "int4"
    (weights in groups of at most 128), both times activations that are quantised by tokens, and keys and values in bfloat16 (states of recurrent mixers are
    always float32). Weights that come quantised (`formats.stored`) stay as they are, bit for bit, and are multiplied as their schemes say. threads None: as
    many as the process may use. max_batch_tokens bounds what submitted requests run at once: source positions times hypotheses; max_sessions how many
    growing sources are open at once; shortlist is what `SearchOptions.shortlist` asks for. Raises ConfigError for numbers below 1, ValueError where a
    weight is missing or of another shape.
    """

    def __init__(
        self,
        manifest: Manifest,
        weights: Mapping[str, RawTensor],
        compute_type: str = "float32",
        threads: int | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        max_sessions: int = MAX_SESSIONS,
        shortlist: Shortlist | None = None,
    ) -> None:
        threads = int(checked_number("threads", min(default_threads(), MAX_THREADS) if threads is None else threads, 1, MAX_THREADS))
        max_batch_tokens = int(checked_number("max_batch_tokens", max_batch_tokens, 1, _MOST))
        max_sessions = int(checked_number("max_sessions", max_sessions, 1))
        model = manifest.model
        config = {**model.model_dump(), "kv_heads": model.kv_heads or model.heads, "vocab_size": manifest.vocab_size}
        _, stored = split_weights(weights, manifest.schemes, Path(WEIGHTS))
        tokens = {name for name, weight in stored.items() if weight.scheme.options["activations"] == "token"}
        given = {name: (tensor.dtype, tensor.buffer, tensor.shape) for name, tensor in weights.items()}
        library, reason = libraries.load("_native", "native")
        if library is None:
            raise ConfigError(f"the native engine needs the native library: {reason}")
        self._engine = library.Engine(config, given, compute_type, threads, max_batch_tokens, tokens)
        let_go(weights.values())  # all but embeddings is packed by now
        self._max_length, self._vocab_size = model.max_length, manifest.vocab_size
        self._lock = threading.Lock()
        self._max_sessions, self._shortlist, self._candidates = max_sessions, shortlist, None
        if shortlist is not None:
            self._candidates = library.Candidates(*shortlist.arrays(), manifest.vocab_size)
        self._sources: weakref.WeakSet[Any] = weakref.WeakSet()
        self._numbers = itertools.count()
        self._number_of: dict[Hashable, int] = {}
        self._requests: dict[int, Request] = {}

    @property
    def max_length(self) -> int:
        """Longest source or target in pieces, with the special one at its end or beginning."""
        return self._max_length

    @property
    def threads(self) -> int:
        """Of its own, the caller's among them; fewer than were asked for where the system had no more when they were first needed."""
        count: int = self._engine.threads
        return count

    def request_bytes(self, request: Request) -> int:
        """Bytes that a request holds while it runs."""
        size: int = self._engine.request_bytes(self._native(request))
        return size

    def open_source(self) -> Any:
        """Room for a source that grows up to the model's length, for `Request.state` and `search_one`; `kept` says how many of the last one's positions had
        been encoded before. A causal encoder encodes only what is new. Raises ConfigError where too many are open."""
        with self._lock:
            if len(self._sources) >= self._max_sessions:
                raise ConfigError(f"{self._max_sessions} sessions are open, which is max_sessions: close one, or allow more")
            source = self._engine.open_source(self._max_length)
            self._sources.add(source)
        return source

    def source_bytes(self) -> int:
        """Bytes of such a source."""
        size: int = self._engine.source_bytes(self._max_length)
        return size

    def search_one(self, request: Request) -> list[Hypothesis]:
        """The hypotheses of a request, which may have a `state`, at once. Raises RuntimeError where its state has a request that has not ended."""
        check_request(request, self._max_length, self._vocab_size)
        return _hypotheses(self._engine.search_one(self._native(request)), len(request.source) + 1)

    def held_bytes(self) -> int:
        """Bytes that submitted requests and the engine's threads hold now, without the weights."""
        size: int = self._engine.held_bytes()
        return size

    def submit(self, request: Request) -> None:
        """See `engine.Engine`."""
        check_request(request, self._max_length, self._vocab_size)
        native = self._native(request)
        with self._lock:
            if request.id in self._number_of:
                raise ValueError(f"the id {request.id!r} is in use by a request that has not ended: cancel that one, or choose another id")
            number = next(self._numbers)
            self._engine.submit(number, native, request.partial, 0.0 if request.timeout is None else max(request.timeout, 1e-9))
            self._number_of[request.id], self._requests[number] = number, request

    def step(self) -> list[Event]:
        """See `engine.Engine`."""
        return self._events(self._engine.step())

    def cancel(self, id: Hashable) -> bool:
        """See `engine.Engine`."""
        with self._lock:
            number = self._number_of.pop(id, None)
            if number is None:
                return False
            del self._requests[number]
            self._engine.cancel(number)
            return True

    def search(self, sources: Sequence[Sequence[int]], options: SearchOptions, prefixes: Sequence[Sequence[int]] | None = None) -> list[list[Hypothesis]]:
        """The hypotheses of each source (piece ids without special ones, at most max_length - 1 of them), best first; all in one batch."""
        hard = [0 if options.prefix_bias else len(prefix) for prefix in prefixes] if prefixes is not None else [0] * len(sources)
        if len(hard) != len(sources):
            raise ValueError(f"there are {len(hard)} prefixes for {len(sources)} sources: give one for each")
        for index, source in enumerate(sources):
            check_pieces(source, () if prefixes is None else prefixes[index], options, self._max_length, self._vocab_size)
        limits = [max(options.limit(len(source), self._max_length), least) for source, least in zip(sources, hard, strict=True)]
        found = self._engine.search(sources, prefixes or (), limits, _options(options), self._wanted(options))
        return [_hypotheses(one, len(source) + 1) for one, source in zip(found, sources, strict=True)]

    def _native(self, request: Request) -> tuple[Any, ...]:
        limit = request.options.limit(len(request.source), self._max_length)
        hard = 0 if request.options.prefix_bias else len(request.prefix)
        return list(request.source), list(request.prefix), max(limit, hard), _options(request.options), self._wanted(request.options), request.state

    def _wanted(self, options: SearchOptions) -> Any:
        """The shortlist as the library reads it, where the options ask for it."""
        return self._candidates if wanted(self._shortlist, options) is not None else None

    def _events(self, told: list[tuple[int, int, list[Any]]]) -> list[Event]:
        found: list[Event] = []
        with self._lock:
            for number, kind, hypotheses in told:
                request = self._requests.get(number)
                if request is None:  # cancelled since
                    continue
                if kind == _PARTIAL:
                    found.append(Partial(request.id, hypotheses[0][0]))
                    continue
                del self._requests[number], self._number_of[request.id]
                found.append(Finished(request.id, _hypotheses(hypotheses, len(request.source) + 1), ("finished", "expired", "failed")[kind - _FINISHED]))
        return found


@functools.lru_cache(maxsize=64)
def _options(options: SearchOptions) -> Any:
    library, _ = libraries.load("_native", "native")
    assert library is not None
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return library.SearchOptions({name: min(value, _MOST) if isinstance(value, int) else value for name, value in given.items()})


def _hypotheses(found: list[Any], source: int) -> list[Hypothesis]:
    return [
        Hypothesis(tokens, score, scores, tuple(tuple(alignment[at : at + source]) for at in range(0, len(alignment), source)))
        for tokens, score, scores, alignment in found
    ] or [BROKEN]
