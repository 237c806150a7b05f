"""The models that are served: loaded, leased to whoever translates, replaced while they are in use."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from cvmk.config.serve import ServeConfig, ServedModelConfig
from cvmk.errors import ConfigError, CvmkError, DataError
from cvmk.formats import read_model_manifest
from cvmk.hardware import release_freed_memory
from cvmk.inference import AsyncTranslator, Translator
from cvmk.serving.answers import ModelInfo
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.scheduler import Scheduler

_log = logging.getLogger(__name__)
_BEHIND = 10
"""Steps of priority (nice) of whoever loads a model while others translate."""
_TRIED = "1 2 3 a b c"


class Served:
    """One version of a model, with an engine of its own. It is closed when it has been replaced and nobody leases it any more."""

    def __init__(self, info: ModelInfo, translator: Translator, asynchronous: AsyncTranslator, scheduler: Scheduler, beam_size: int) -> None:
        self.info, self.translator, self.scheduler, self.beam_size = info, translator, scheduler, beam_size
        self._asynchronous = asynchronous
        self._leases, self._retired = 0, False
        self.causal = translator.info.get("model", {}).get("encoder_direction") == "causal" and hasattr(translator.engine, "open_source")

    def open_source(self) -> Any:
        """What the engine keeps of a source that grows, where that saves it anything; else None."""
        engine: Any = self.translator.engine
        return engine.open_source() if self.causal else None

    def stuck_seconds(self) -> float:
        """For how long its engine has been in its present step; 0 between two."""
        return self._asynchronous.step_seconds()

    def lease(self) -> Served:
        """It stays open until `release`."""
        self._leases += 1
        return self

    def release(self) -> None:
        self._leases -= 1
        self._close_if_unused()

    @property
    def retired(self) -> bool:
        """Whether another one has taken its place."""
        return self._retired

    def retire(self) -> None:
        """Nobody new gets it."""
        self._retired = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._retired and self._leases == 0:
            task = asyncio.get_running_loop().create_task(self._close())
            _CLOSING.add(task)
            task.add_done_callback(_CLOSING.discard)

    async def _close(self) -> None:
        await self._asynchronous.__aexit__()
        await asyncio.to_thread(self._let_go)

    def _let_go(self) -> None:
        del self._asynchronous, self.translator, self.scheduler  # the weights go with them, and not when somebody forgets the rest
        release_freed_memory()


_CLOSING: set[asyncio.Task[None]] = set()  # the loop itself holds tasks only weakly


class Models:
    """All models of serve.toml by name. Loading happens in threads; everything else in one event loop."""

    def __init__(self, config: ServeConfig, given_up: Callable[[str], None] = lambda kind: None) -> None:
        self._config, self._given_up = config, given_up
        self._served: dict[str, Served] = {}
        self._lock = asyncio.Lock()  # one is loaded at a time
        self._loader = ThreadPoolExecutor(1, "cvmk-loader", _yield_to_others)  # of what replaces a model; at the start there is nobody to yield to

    async def start(self) -> None:
        """Load all. Raises what a Translator raises, and ConfigError for a model of unknown languages."""
        for name in self._config.models:
            self._served[name] = await self._loaded(name, "")

    async def stop(self) -> None:
        for served in self._served.values():
            served.retire()
        self._served.clear()
        await asyncio.gather(*_CLOSING)
        self._loader.shutdown(wait=False)

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    def infos(self) -> list[ModelInfo]:
        return [served.info for served in self]

    def sources(self) -> list[str]:
        """The languages that some model reads."""
        return sorted({info.source for info in self.infos()})

    def targets(self, source: str) -> list[str]:
        return sorted({info.target for info in self.infos() if info.source == source})

    def find(self, source: str, target: str, name: str = "") -> Served:
        """The model of that name, or else the first one of those languages; an empty source or target is any. Raises ServiceError NOT_FOUND."""
        for served in [self._served[name]] if name in self._served else () if name else self:
            if answers(source, served.info.source) and answers(target, served.info.target):
                return served
        if name and name not in self._served:
            raise ServiceError(Status.NOT_FOUND, f"no model {name!r} is served", field="model")
        pair = f"from {source or 'any language'} to {target or 'any language'}"
        raise ServiceError(Status.NOT_FOUND, f"{f'the model {name!r} does not translate' if name else 'no model translates'} {pair}", field="target")

    @contextmanager
    def lease(self, source: str, target: str, name: str = "") -> Iterator[Served]:
        """`find`, and nobody closes it meanwhile."""
        served = self.find(source, target, name).lease()
        try:
            yield served
        finally:
            served.release()

    async def load(self, name: str, path: str = "") -> ModelInfo:
        """Load a model of serve.toml anew, try it, and put it in the place of the old one, which whoever uses it finishes with. Where anything is wrong the
        old one stays: a ServiceError FAILED_PRECONDITION that says what, NOT_FOUND for a name that is not in serve.toml."""
        if name not in self._config.models:
            raise ServiceError(Status.NOT_FOUND, f"serve.toml has no model {name!r}", field="model")
        async with self._lock:
            old = self._served.get(name)
            try:
                new = await self._loaded(name, path, old.info if old is not None else None, self._loader)
            except (CvmkError, ValueError, OSError) as error:
                _log.warning("the model %s was not replaced: %s", name, error)
                raise ServiceError(Status.FAILED_PRECONDITION, f"the model was not replaced: {error}", field="path" if path else "model") from error
            self._served[name] = new
            if old is not None:
                old.retire()
            _log.info("the model %s is now version %s", name, new.info.version)
            return new.info

    async def reload_changed(self) -> list[ModelInfo]:
        """`load` of every model whose folder has another version; those that are not sound are only logged."""
        found = []
        for name, served in list(self._served.items()):
            try:
                version = (await asyncio.to_thread(read_model_manifest, self._config.models[name].path))[1].weights_sha256
                if (version or "")[:12] != served.info.version:
                    found.append(await self.load(name))
            except (CvmkError, ValueError, OSError) as error:
                _log.warning("the model %s was not replaced: %s", name, error)
        return found

    async def unload(self, name: str) -> None:
        """Raises ServiceError NOT_FOUND for a model that is not loaded, FAILED_PRECONDITION for the only one."""
        async with self._lock:
            if name not in self._served:
                raise ServiceError(Status.NOT_FOUND, f"no model {name!r} is served", field="model")
            if len(self._served) == 1:
                raise ServiceError(Status.FAILED_PRECONDITION, f"{name!r} is the only model that is served: drain the server instead", field="model")
            self._served.pop(name).retire()

    async def _loaded(self, name: str, path: str, old: ModelInfo | None = None, loader: Executor | None = None) -> Served:
        section = self._config.models[name]
        if path:
            section = section.model_copy(update={"path": path})
        arguments = name, section, self._config.server.threads, old
        info, translator = await asyncio.get_running_loop().run_in_executor(loader, _load, *arguments)
        asynchronous = await AsyncTranslator(translator).__aenter__()
        try:
            if not math.isfinite((await asynchronous.translate(_TRIED)).score):
                raise DataError(f"the model in {section.path} computes what are no numbers: train it again, or serve another one")
        except BaseException:
            await asynchronous.__aexit__()
            raise
        limits = self._config.limits
        scheduler = Scheduler(asynchronous, section.running_tokens, limits.waiting_tokens, limits.waiting_tokens_per_client, given_up=self._given_up)
        return Served(info, translator, asynchronous, scheduler, section.beam_size)


def _yield_to_others() -> None:
    """The present thread goes behind those that translate, where threads have priorities of their own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(os.getpriority(os.PRIO_PROCESS, 0) + _BEHIND, 19))


def answers(asked: str, served: str) -> bool:
    """Whether a served language is what was asked for: the same, or without a region or script that was ("en" for "en-GB"); "" asks for any."""
    return asked in ("", served) or asked.startswith(f"{served}-")


def _load(name: str, section: ServedModelConfig, threads: int, old: ModelInfo | None) -> tuple[ModelInfo, Translator]:
    _, manifest, said = read_model_manifest(section.path)
    languages = said.get("languages") or {}
    source, target = section.source or languages.get("source"), section.target or languages.get("target")
    for key, value in (("source", source), ("target", target)):
        if not value:
            raise ConfigError(f"models.{name}.{key} is missing, and the model in {section.path} does not say it: add the language")
    if old is not None and (source, target) != (old.source, old.target):
        raise ConfigError(f"the model in {section.path} translates {source} to {target}, and {name} is {old.source} to {old.target}: give it another name")
    translator = Translator(section.path, section.device, section.compute_type, engine=section.engine, threads=section.threads or threads or None)
    assert source and target
    version = (manifest.weights_sha256 or "")[:12]
    return ModelInfo(name, source, target, version, section.compute_type, translator.engine.max_length), translator
