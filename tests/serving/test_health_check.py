"""cvmk serve --check: what supervisors of processes and containers ask."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from certificates import authority, signed
from served import serving

from cvmk.config.serve import SecurityConfig, ServeConfig
from cvmk.errors import DataError
from cvmk.serving.health_check import check


def _at(config: ServeConfig, port: int, **changes: Any) -> ServeConfig:
    return config.model_copy(update={"server": config.server.model_copy(update={"port": port}), **changes})


async def _check_one_that_runs(config: ServeConfig) -> None:
    async with serving(config) as (server, _):
        await asyncio.to_thread(check, _at(config, server.ports.grpc))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", "::1", "::"])
def test_one_that_is_well(serve_config: Any, host: str) -> None:
    asyncio.run(_check_one_that_runs(serve_config(server={"host": host})))


@pytest.mark.parametrize("names", ["DNS:translate.example", "DNS:*.example", "IP:192.0.2.1"])
@pytest.mark.parametrize("mutual", [False, True])
def test_over_tls(serve_config: Any, tmp_path: Path, names: str, mutual: bool) -> None:
    signer = authority(tmp_path, "authority")
    pair = signed(tmp_path, "server", signer, names=names)
    security = {"certificate": str(pair.certificate), "private_key": str(pair.key), **({"client_authority": str(signer.certificate)} if mutual else {})}
    config = serve_config(security=security)
    asyncio.run(_check_one_that_runs(config))

    other = signed(tmp_path, "other", signer)
    config = serve_config(security=security)

    async def ask_with_another_certificate() -> None:
        async with serving(config) as (server, _):
            changed = SecurityConfig(certificate=str(other.certificate), private_key=str(other.key))
            await asyncio.to_thread(check, _at(config, server.ports.grpc, security=changed))

    with pytest.raises(DataError, match="does not answer"):
        asyncio.run(ask_with_another_certificate())


def test_one_that_drains_or_is_not_there(serve_config: Any) -> None:
    async def go() -> ServeConfig:
        async with serving(serve_config()) as (server, _):
            config = _at(server.config, server.ports.grpc)
            server.application.draining = True
            await server.publish_health()
            with pytest.raises(DataError, match="is NOT_SERVING$"):
                await asyncio.to_thread(check, config)
        return config

    config = asyncio.run(go())
    with pytest.raises(DataError, match=f"the service at 127.0.0.1:{config.server.port} does not answer: "):
        check(config)


def test_the_verb(serve_config: Any, tmp_path: Path) -> None:
    config, path = serve_config(), tmp_path / "serve.toml"

    def verb() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "cvmk", "serve", str(path), "--check"], capture_output=True, text=True, timeout=60)

    async def go() -> None:
        async with serving(config) as (server, _):
            model = config.models["en-de"]
            path.write_text(f'[server]\nport = {server.ports.grpc}\n[models.en-de]\npath = "{model.path}"\n', encoding="utf-8")
            done = await asyncio.to_thread(verb)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    asyncio.run(go())
    done = verb()
    assert done.returncode == 5 and done.stderr.startswith("cvmk: ") and "does not answer" in done.stderr and done.stderr.count("\n") == 1
