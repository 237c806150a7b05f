"""Several servers of the same models: a client that is given their addresses spreads its streams, and goes on where one of them ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from served import serving

from cvmk.errors import ConfigError
from cvmk.serving.client import AsyncClient, Retry, Tls

SENTENCES = ["a man rides. ", "two horses ride. ", "a man on horses. "]


async def written(stream: Any, sentences: list[str]) -> None:
    for sentence in sentences:
        await stream.append(sentence)
        await asyncio.sleep(0.02)
    await stream.close()


async def committed(stream: Any) -> str:
    return "".join([update.committed async for update in stream])


def test_streams_are_spread_and_go_on(serve_config: Any) -> None:
    config = serve_config()

    async def go() -> None:
        async with serving(config) as (one, _), serving(config) as (two, _):
            ports = [server.ports.grpc for server in (one, two)]
            async with AsyncClient(f"127.0.0.1:{ports[0]}") as client, client.stream() as stream:
                expected, _ = await asyncio.gather(committed(stream), written(stream, SENTENCES))
            async with AsyncClient(",".join(f"127.0.0.1:{port}" for port in ports), retry=Retry(first_delay=0.01)) as client:
                streams = [client.stream() for _ in range(6)]
                for stream in streams:
                    await stream.__aenter__()
                    await stream.append(SENTENCES[0])
                open_at = [server.application.stats().sessions for server in (one, two)]
                assert sum(open_at) == 6 and min(open_at) >= 2  # the first ones go where there is a connection first
                await one.stop()
                found = await asyncio.gather(*(committed(stream) for stream in streams), *(written(stream, SENTENCES[1:]) for stream in streams))
                assert found[:6] == [expected] * 6
                assert (await client.translate("a man rides.")).model == "en-de"
                for stream in streams:
                    await stream.__aexit__(None, None, None)

    asyncio.run(asyncio.wait_for(go(), 60))


def test_several_addresses_of_ipv6(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config(server={"host": "::1"})) as (server, _), AsyncClient(f"[::1]:{server.ports.grpc},[::1]:1") as client:
            assert [(await client.models())[0].name for _ in range(3)] == ["en-de"] * 3

    asyncio.run(asyncio.wait_for(go(), 60))


@pytest.mark.parametrize("address", ["127.0.0.1:1,localhost:2", "127.0.0.1:1,[::1]:2", "a:1,b:2"])
def test_addresses_that_do_not_go_together(address: str) -> None:
    with pytest.raises(ConfigError, match="several addresses are all numbers, of IPv4 or of IPv6"):
        AsyncClient(address)


def test_tls_of_several_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="give server_name"):
        AsyncClient("127.0.0.1:1,127.0.0.1:2", tls=Tls())
    with pytest.raises(ConfigError, match="is no address of a server"):
        AsyncClient("127.0.0.1:1,")
