"""cvmk serve --ray: replicas on this machine, and what a client loses when they are killed, which is nothing."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import serving

from cvmk.config.loading import check_values
from cvmk.config.serve import ServeConfig
from cvmk.errors import ConfigError
from cvmk.serving.client import AsyncClient, Retry

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'cvmk[ray]')")
TEXT = [f"{word} man rides {count} horses" + ("." if count % 5 == 0 else "") + " " for count in range(40) for word in ("a", "two")]


def values(config: ServeConfig, **server: Any) -> dict[str, Any]:
    dumped = config.model_dump()
    return {**dumped, "server": {**dumped["server"], **server}}


# -- what is told before anything starts -------------------------------------------------------------------------------------------------
def test_ports_of_replicas(serve_config: Any) -> None:
    from cvmk.serving.ray import at_rank

    config = check_values(ServeConfig, values(serve_config(), port=5000, http_port=6000, metrics_port=0), "serve.toml")
    ports = at_rank(config, 3).server
    assert (ports.port, ports.http_port, ports.metrics_port, ports.admin_port) == (5003, 6003, 0, None)
    assert at_rank(config, 0) == config


@pytest.mark.parametrize(
    ("server", "count", "said"),
    [
        ({"port": 5000, "http_port": 5001}, 2, "server.port and server.http_port are too near: 2 replicas"),
        ({"port": 5000, "http_port": 5000}, 1, "server.http_port and server.port are too near"),
        ({"port": 65535}, 2, "server.port is too large"),
    ],
)
def test_ports_that_replicas_cannot_have(serve_config: Any, server: dict[str, int], count: int, said: str) -> None:
    from cvmk.serving.ray import run

    with pytest.raises(ConfigError, match=said):
        run(check_values(ServeConfig, values(serve_config(), **server), "serve.toml"), count, lambda _: None)


# -- two replicas ------------------------------------------------------------------------------------------------------------------------
@contextmanager
def on_ray(folder: Path, model: str, port: int, *options: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """`cvmk serve --ray` as a process, when it has started or failed, and the file of what it says."""
    path, said = folder / "serve.toml", folder / "said"
    path.write_text(f'[server]\nport = {port}\nthreads = 1\ndrain_seconds = 5.0\n[models.en-de]\npath = "{model}"\n', encoding="utf-8")
    with said.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "cvmk", "serve", str(path), "--ray", *options], stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        )  # fmt: skip
    try:
        until = time.monotonic() + 150
        while process.poll() is None and "cvmk: " not in said.read_text(encoding="utf-8"):
            assert time.monotonic() < until, said.read_text(encoding="utf-8")
            time.sleep(0.2)
        yield process, said
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def served_by() -> list[int]:
    """The processes of replicas."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"ray::ServeReplica:cvmk:Server"):
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


@pytest.mark.exhaustive
@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_replicas_lose_no_committed_text(serve_config: Any, tmp_path: Path) -> None:
    """Each of two replicas is killed while a stream is open, the second one when the first has been replaced: at least one of them had the stream."""
    config = serve_config()
    expected = asyncio.run(_alone(config))
    with on_ray(tmp_path, config.models["en-de"].path, 47310, "--replicas", "2") as (process, said):
        addresses = re.search(r"serving en-de at (127\.0\.0\.1:47310,127\.0\.0\.1:47311)\n", said.read_text(encoding="utf-8"))
        assert addresses, said.read_text(encoding="utf-8")
        asyncio.run(asyncio.wait_for(_while_replicas_die(addresses[1], expected), 240))
        process.terminate()
        assert process.wait(60) == 0
    assert not served_by()


async def _alone(config: ServeConfig) -> str:
    async with serving(config) as (server, _), AsyncClient(f"127.0.0.1:{server.ports.grpc}") as client, client.stream() as stream:
        return await _followed(stream, TEXT)


async def _followed(stream: Any, words: list[str]) -> str:
    async def write() -> None:
        for word in words:
            await stream.append(word)
            await asyncio.sleep(0)
        await stream.close()

    writing = asyncio.create_task(write())
    text = "".join([update.committed async for update in stream])
    await writing
    return text


async def _while_replicas_die(addresses: str, expected: str) -> None:
    committed: list[str] = []
    async with AsyncClient(addresses, retry=Retry(tries=60, max_delay=1.0)) as client:
        async with client.stream() as stream:

            async def read() -> None:
                async for update in stream:
                    committed.append(update.committed)

            reading = asyncio.create_task(read())
            killed = set(served_by())
            assert len(killed) == 2
            third = len(TEXT) // 3
            for part, process in zip((TEXT[:third], TEXT[third : 2 * third]), sorted(killed), strict=True):
                for word in part:
                    await stream.append(word)
                    await asyncio.sleep(0.01)
                before = "".join(committed)
                assert before and expected.startswith(before)
                os.kill(process, signal.SIGKILL)
                await _replaced(killed, client)
            for word in TEXT[2 * third :]:
                await stream.append(word)
            await stream.close()
            await reading
        assert "".join(committed) == expected
    for address in addresses.split(","):  # both are there again
        async with AsyncClient(address, retry=Retry(tries=30, max_delay=1.0)) as client:
            assert [model.name for model in await client.models()] == ["en-de"]


async def _replaced(killed: set[int], client: AsyncClient) -> None:
    """Waits until there are two replicas again, and each answers."""
    for _ in range(600):
        if len([process for process in served_by() if os.path.exists(f"/proc/{process}/exe")]) == 2:
            break
        await asyncio.sleep(0.2)
    else:
        raise AssertionError(f"the replicas {killed} were not replaced")
    await asyncio.sleep(3)
    await client.models()


@pytest.mark.exhaustive
@pytest.mark.timeout(400)
def test_replicas_that_cannot_start(serve_config: Any, tmp_path: Path) -> None:
    with on_ray(tmp_path, str(tmp_path / "nothing"), 47320) as (process, said):
        assert process.wait(60) == 5
        assert re.search(r"cvmk: no replica could start: .*nothing", said.read_text(encoding="utf-8"))
