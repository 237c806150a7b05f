"""The engine that runs a CVMTransformer with PyTorch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from cvmk.errors import ConfigError
from cvmk.formats import Manifest
from cvmk.formats.torch_weights import load_model
from cvmk.inference import decoding
from cvmk.inference.engine import Event, Request, check_request, search_batch
from cvmk.inference.options import Hypothesis, SearchOptions, checked_number
from cvmk.inference.scheduler import Entry, Scheduler
from cvmk.inference.shortlist import Shortlist, load_shortlist, wanted
from cvmk.nn import CVMTransformer

ComputeType = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_BATCH_TOKENS = 4096
"""Source positions times hypotheses of submitted requests that run at once, where nobody says another number."""


def check_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes a GPU where there is one. Raises ConfigError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'device is {name!r}, and must be "auto", "cpu", "cuda" or "cuda:<number>"') from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f'device is {name!r}, and PyTorch sees {torch.cuda.device_count()} GPUs: use device "cpu" or another number')
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'device is {name!r}, and the torch engine runs on "cpu" and "cuda"')
    return device


def check_compute_type(name: str) -> torch.dtype:
    """The dtype called `name`. Raises ConfigError where this engine has no such compute type."""
    if name not in _DTYPES:
        raise ConfigError(f"compute_type is {name!r}, and the torch engine has {' and '.join(get_args(ComputeType))}")
    return _DTYPES[name]


def refusals(manifest: Manifest, device: str, compute_type: str) -> list[str]:
    """Why this engine cannot run a model so; empty where it can."""
    found = []
    for check, name in ((check_device, device), (check_compute_type, compute_type)):
        try:
            check(name)
        except ConfigError as error:
            found.append(str(error))
    return found


def load(folder: Path, manifest: Manifest, device: str, compute_type: str, threads: int | None = None) -> TorchEngine:
    """The engine of a model's folder. `threads` becomes PyTorch's number, for the whole process. Raises DataError where its weights are not sound."""
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchEngine(load_model(folder, manifest), device, compute_type, shortlist=load_shortlist(folder, manifest.vocab_size))


def of_model(model: CVMTransformer) -> TorchEngine:
    """The engine of a model in memory, which it does not copy."""
    return TorchEngine(model)


class TorchEngine:
    """An `engine.Engine` over a model, which is put into evaluation mode while it works, and then as it was.

    device and compute_type None leave the model as it is, so that an engine made of a model in training always uses its
    present weights; otherwise the engine keeps a copy where the model has to be converted. max_batch_tokens bounds what submitted requests run at
    once: source positions times hypotheses; shortlist is what `SearchOptions.shortlist` asks for.

    Requests begin and leave between steps. Those with the same options are decoded together, newcomers with those that run already.
    """

    def __init__(
        self,
        model: CVMTransformer,
        device: str | None = None,
        compute_type: str | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        shortlist: Shortlist | None = None,
    ) -> None:
        parameter = next(model.parameters())
        to_device = parameter.device if device is None else check_device(device)
        dtype = parameter.dtype if compute_type is None else check_compute_type(compute_type)
        if to_device.type == "cuda" and to_device.index is None and parameter.device.type == "cuda":
            to_device = parameter.device
        if (to_device, dtype) != (parameter.device, parameter.dtype):
            model = copy.deepcopy(model).to(device=to_device, dtype=dtype)
        max_batch_tokens = int(checked_number("max_batch_tokens", max_batch_tokens, 1))
        self.model, self.shortlist = model, shortlist
        self._scheduler = Scheduler(self._begin, max_batch_tokens)

    @property
    def max_length(self) -> int:
        """Longest source or target in pieces, with the special one at its end or beginning."""
        return self.model.config.max_length

    def submit(self, request: Request) -> None:
        """See `engine.Engine`."""
        _check(request, self)
        self._scheduler.submit(request)

    def step(self) -> list[Event]:
        """See `engine.Engine`."""
        with self._evaluating():
            return self._scheduler.step()

    def cancel(self, id: Hashable) -> bool:
        """See `engine.Engine`."""
        return self._scheduler.cancel(id)

    def search(self, sources: Sequence[Sequence[int]], options: SearchOptions, prefixes: Sequence[Sequence[int]] | None = None) -> list[list[Hypothesis]]:
        """The hypotheses of each source (piece ids without special ones, at most max_length - 1 of them), best first; all in one batch."""
        alone = _Alone(self)
        with self._evaluating():
            return search_batch(alone, sources, options, prefixes)

    def _begin(self, entries: Sequence[Entry]) -> decoding.Decoding:
        return decoding.begin(self.model, entries, self.shortlist)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if was_training:
                self.model.train()


class _Alone:
    """The same engine without its submitted requests, and without a limit to what runs at once."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine, self._scheduler = engine, Scheduler(engine._begin, float("inf"))

    def submit(self, request: Request) -> None:
        _check(request, self._engine)
        self._scheduler.submit(request)

    def step(self) -> list[Event]:
        return self._scheduler.step()


def _check(request: Request, engine: TorchEngine) -> None:
    check_request(request, engine.max_length, engine.model.vocab_size)
    wanted(engine.shortlist, request.options)
