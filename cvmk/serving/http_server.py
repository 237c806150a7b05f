"""HTTP in the event loop of the service, by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl as tls
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from starlette.routing import BaseRoute
from uvicorn.protocols.http.h11_impl import H11Protocol

from cvmk.config.serve import ServerConfig
from cvmk.errors import ConfigError
from cvmk.serving.auth import Keys
from cvmk.serving.http import http_app
from cvmk.serving.limits import Limits

if TYPE_CHECKING:
    from cvmk.serving.application import Application

_IDLE_SECONDS = 30.0
_CONNECTIONS = 1024
_PORT = 8080


async def serve_http(
    application: Application, keys: Keys, limits: Limits, config: ServerConfig, ssl: tls.SSLContext | None = None, web: bool = False
) -> HttpServer:
    """Listens at `config.host` and `config.http_port` (8080 where there is none) until `stop` of what is given back; `web` adds the page and its WebSocket.

    Raises ConfigError where it cannot listen there.
    """
    listener = _listener(config.host, _PORT if config.http_port is None else config.http_port)
    app = http_app(application, keys, limits, _web_routes(application, keys, config) if web else ())
    server = _Server(
        uvicorn.Config(
            app,
            http=_Protocol,
            ws="websockets-sansio",
            ws_max_size=limits.config.message_bytes,
            ws_per_message_deflate=False,
            lifespan="off",
            loop="none",
            interface="asgi3",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="warning",
            limit_concurrency=max(_CONNECTIONS, 2 * limits.config.sessions),
            ssl_context_factory=None if ssl is None else lambda config, default: ssl,
        )
    )
    task = asyncio.create_task(server.serve([listener]), name="cvmk http")
    while not server.started and not task.done():
        await asyncio.sleep(0.005)
    if task.done():
        listener.close()
        task.result()
    return HttpServer(server, task, listener.getsockname()[:2], ssl is not None)


def _web_routes(application: Application, keys: Keys, config: ServerConfig) -> tuple[BaseRoute, ...]:
    from cvmk.serving.web import web_routes  # with gRPC's messages

    return web_routes(application, keys, config)


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


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"server.host: {host!r} is no address of this machine ({error.strerror or error})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"server.http_port: cannot listen at {host}:{port} ({error.strerror or error}); give another port") from error
    listener.setblocking(False)
    return listener
