"""HTTP in an event loop of ours, by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cvmk.errors import ConfigError

_IDLE_SECONDS = 30.0
_WAITING = 2048
"""Connections that may wait to be taken."""


class PortError(ConfigError):
    """A port that cannot be listened at, as where another process does."""


async def start(app: Any, listener: socket.socket, *, is_secure: bool = False, **options: Any) -> HttpServer:
    """Serve an ASGI application on a socket of `listen` until `stop` of what is given back; `options` are uvicorn's."""
    server = _Server(
        uvicorn.Config(
            app,
            http=_Protocol,
            lifespan="off",
            loop="none",
            interface="asgi3",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="warning",
            **options,
        )
    )
    task = asyncio.create_task(server.serve([listener]), name="cvmk http")
    while not server.started and not task.done():
        await asyncio.sleep(0.005)
    if task.done():
        listener.close()
        task.result()
    return HttpServer(server, task, listener.getsockname()[:2], is_secure)


class HttpServer:
    """A server that listens. `url` says where."""

    def __init__(self, server: uvicorn.Server, task: asyncio.Task[None], address: tuple[str, int], is_secure: bool) -> None:
        self._server, self._task = server, task
        host, self.port = address
        self.url = f"http{'s' * is_secure}://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def stop(self, seconds: float = 2.0) -> None:
        """Takes no new connections, lets what runs end for so many seconds, and closes what is left."""
        self._server.should_exit = True
        try:
            await asyncio.wait_for(asyncio.shield(self._task), seconds)
        except TimeoutError:
            self._server.force_exit = True
            for running in list(self._server.server_state.tasks):
                running.cancel()
            for connection in list(self._server.server_state.connections):
                if (transport := getattr(connection, "transport", None)) is not None:
                    transport.abort()
            await self._task


class _Server(uvicorn.Server):
    """uvicorn's, whose signals are the service's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """uvicorn's, which also closes connections on which no request comes, or none gets whole."""

    _is_idle = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(_IDLE_SECONDS, self._look)

    def _look(self) -> None:
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # a WebSocket by now
            return
        is_idle = self.conn.their_state is h11.IDLE
        if is_idle and self._is_idle:
            self.transport.close()
            return
        self._is_idle = is_idle
        self.loop.call_later(_IDLE_SECONDS, self._look)


def listen(host: str, port: int, keys: tuple[str, str]) -> socket.socket:
    """A socket that takes connections at an address. Raises ConfigError, which names `keys[0]`, for a host
    that is none, and PortError, which names `keys[1]`, where the port is taken or forbidden."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"{keys[0]}: {host!r} is no address of this machine ({error.strerror or error})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_WAITING)  # now, for until then another process may be given the same port
    except OSError as error:
        listener.close()
        raise PortError(f"{keys[1]}: cannot listen at {host}:{port} ({error.strerror or error}); give another port") from error
    listener.setblocking(False)
    return listener
