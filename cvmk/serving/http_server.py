"""HTTP in the event loop of the service, by uvicorn."""

from __future__ import annotations

import ssl as tls
from typing import TYPE_CHECKING

from starlette.routing import BaseRoute

from cvmk.config.serve import ServerConfig
from cvmk.serving.auth import Keys
from cvmk.serving.http import http_app
from cvmk.serving.limits import Limits
from cvmk.web.server import HttpServer, listen, start

if TYPE_CHECKING:
    from cvmk.serving.application import Application

_CONNECTIONS = 1024
_PORT = 8080


async def serve_http(
    application: Application, keys: Keys, limits: Limits, config: ServerConfig, ssl: tls.SSLContext | None = None, web: bool = False
) -> HttpServer:
    """Listens at `config.host` and `config.http_port` (8080 where there is none) until `stop` of what is given back; `web` adds the page and its WebSocket.

    Raises ConfigError where it cannot listen there.
    """
    listener = listen(config.host, _PORT if config.http_port is None else config.http_port, ("server.host", "server.http_port"))
    app = http_app(application, keys, limits, _web_routes(application, keys, config) if web else ())
    return await start(
        app,
        listener,
        is_secure=ssl is not None,
        ws="websockets-sansio",
        ws_max_size=limits.config.message_bytes,
        ws_per_message_deflate=False,
        limit_concurrency=max(_CONNECTIONS, 2 * limits.config.sessions),
        ssl_context_factory=None if ssl is None else lambda config, default: ssl,
    )


def _web_routes(application: Application, keys: Keys, config: ServerConfig) -> tuple[BaseRoute, ...]:
    from cvmk.serving.web import web_routes  # with gRPC's messages

    return web_routes(application, keys, config)
