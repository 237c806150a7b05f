"""The HTTP interface of an application at a real port: `with http_served(lambda: Application(config)) as server`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from cvmk.config.serve import ServerConfig
from cvmk.serving.auth import Keys
from cvmk.serving.http_server import serve_http
from cvmk.web.server import HttpServer


@contextlib.contextmanager
def http_served(make: Callable[[], Any], *, port: int = 0, server: dict[str, Any] | None = None, **options: Any) -> Iterator[HttpServer]:
    """A server in a thread, at a free port where none is given, of the application that `make` gives there; `server` are keys of the table."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    async def start() -> tuple[Any, HttpServer]:
        application = make()
        await _maybe(application, "start")
        config = ServerConfig(http_port=port, **(server or {}))
        return application, await serve_http(application, Keys(application.config.security.keys), application.limits, config, **options)

    async def stop(application: Any, server: HttpServer) -> None:
        await server.stop(0.5)
        await _maybe(application, "stop")

    try:
        application, found = run(start())
        try:
            yield found
        finally:
            run(stop(application, found))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _maybe(application: Any, name: str) -> None:
    if hasattr(application, name):
        await getattr(application, name)()
