"""A running service over small models of random weights: `async with serving(config) as (server, channel)`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from cvmk.config.loading import check_values
from cvmk.config.serve import ServeConfig
from cvmk.formats import save_model_folder
from cvmk.serving import messages
from cvmk.serving.server import Server


@pytest.fixture
def serve_config(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., ServeConfig]:
    def config(pairs: tuple[tuple[str, str], ...] = (("en", "de"),), model: dict[str, Any] | None = None, **tables: Any) -> ServeConfig:
        """serve.toml of one random model a pair of languages, on free ports; `model` are options of their sizes, `tables` whole tables."""
        models = {}
        for seed, (source, target) in enumerate(pairs):
            folder = tmp_path / f"{source}-{target}"
            made = make_model(tokenizer.vocab_size, seed=seed, **{"sharpness": 3.0, **(model or {})})
            save_model_folder(folder, made, tokenizer, "", {"languages": {"source": source, "target": target}})
            models[f"{source}-{target}"] = {"path": str(folder), "threads": 1, **tables.get("each", {})}
        server = {"port": 0, **tables.get("server", {})}
        others = {name: table for name, table in tables.items() if name not in ("each", "server")}
        return check_values(ServeConfig, {"server": server, "models": models, **others}, "serve.toml")

    return config


@contextlib.asynccontextmanager
async def serving(config: ServeConfig) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    """A server in this process and a channel to it."""
    server = Server(config)
    try:
        ports = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
            yield server, channel
    finally:
        await server.stop()


def idle(server: Server) -> bool:
    """Whether nothing runs, waits or is open."""
    stats = server.application.stats()
    return not (stats.sessions or stats.waiting_tokens or stats.running_tokens or server.application.limits.sessions)


async def until(condition: Callable[[], object], seconds: float = 20.0) -> float:
    """How many seconds it took until something was so."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "it never was"
        await asyncio.sleep(0.002)
    return time.monotonic() - begun


async def ask(channel: grpc.aio.Channel, method: str, request: Any = None, *, service: str = messages.SERVICE, **options: Any) -> Any:
    """The response of a unary method; `request` is a message, or bytes."""
    described = messages.services()[service][method]
    response = getattr(messages, described.output_type.name)
    request = getattr(messages, described.input_type.name)() if request is None else request
    call = channel.unary_unary(f"/{service}/{method}", request_serializer=_bytes, response_deserializer=response.FromString)
    return await call(request, **options)


async def refused(call: Any) -> tuple[Any, str]:
    """Status and message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


def stream(channel: grpc.aio.Channel, **options: Any) -> Any:
    """A TranslateStream."""
    path = f"/{messages.SERVICE}/TranslateStream"
    return channel.stream_stream(path, request_serializer=_bytes, response_deserializer=messages.StreamResponse.FromString)(**options)


def request(acknowledged: int = 0, **event: Any) -> Any:
    """A StreamRequest."""
    return messages.StreamRequest(ack_revision=acknowledged, **event)


def append(seq: int, text: str | bytes, acknowledged: int = 0) -> Any:
    return request(acknowledged, append=messages.Append(seq=seq, text=text.encode() if isinstance(text, str) else text))


def _bytes(message: Any) -> bytes:
    return message if isinstance(message, bytes) else bytes(message.SerializeToString())
