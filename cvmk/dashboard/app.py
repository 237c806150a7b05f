"""The dashboard over HTTP: its page, and /data, which says what a window of the charts shows."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import math
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cvmk.dashboard import find
from cvmk.dashboard.board import Board, Query
from cvmk.web.pages import HEADERS, page_routes
from cvmk.web.server import PortError, listen, start

_PAGE = Path(__file__).parent / "page"
_POINTS = (16, 2000)
_CONNECTIONS = 200
PORT = 8090
_PORTS = 20
"""Ports that are tried from PORT on where none is asked for: dashboards may run beside each other."""


def app(board: Board, host: str) -> Starlette:
    """The dashboard as an ASGI application; `host` is a name that it may be asked for by."""

    def data(request: Request) -> Response:  # in a thread, for it is no coroutine
        try:
            query = _query(request)
        except ValueError as error:
            return PlainTextResponse(f"{error}\n", 400, headers=HEADERS)
        body = json.dumps(board.answer(query), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return Response(body.encode("utf-8", "replace"), media_type="application/json", headers=HEADERS | {"Cache-Control": "no-store"})

    routes = (*page_routes(_PAGE), Route("/data", data, methods=["GET"]))
    return Starlette(routes=routes, middleware=[Middleware(_OwnNames, host=host)])


def _query(request: Request) -> Query:
    given = request.query_params
    axis = given.get("axis", "step")
    if axis not in ("step", "time"):
        raise ValueError(f"axis is {axis!r}: give step or time")
    low, high, points = (_number(given.get(name), name) for name in ("from", "to", "points"))
    least, most = _POINTS
    runs = given.get("runs")
    chosen = None if runs is None else frozenset(runs.split(","))
    return Query(axis, low, high, int(min(most, max(least, points or 400))), chosen, given.get("since", ""))


def _number(text: str | None, name: str) -> float | None:
    if text is None:
        return None
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name} is {text[:40]!r}: give a number")
    return found


class _OwnNames:
    """Answers only those who ask for this server by a name of its own, or by an address.

    A page of a stranger can have its name lead to this machine, and would then read what is here; it cannot choose what Host the browser says.
    """

    def __init__(self, app: Any, host: str) -> None:
        self._app, self._host = app, host.lower()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        host = next((value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"), "")
        answer = self._app if self._is_own(host) else PlainTextResponse("this dashboard is not asked for by that name: use its address\n", 421, headers=HEADERS)
        await answer(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # brackets that are no address
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return bool(name) and name in ("localhost", self._host)
        return True


async def serve(paths: Sequence[str], host: str, port: int | None, tell: Callable[[str, int], None]) -> None:
    """Serve the dashboard of the runs in `paths` until SIGINT or SIGTERM; `tell` is given its address and the number of runs.

    Raises DataError for a folder without a run, ConfigError where it cannot listen.
    """
    find.check(paths)
    listener = _listener(host, port)
    with Board(paths) as board:
        server = await start(app(board, host), listener, ws="none", limit_concurrency=_CONNECTIONS, timeout_graceful_shutdown=1)
        ending = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ending.set)
        try:
            tell(server.url, len(board.runs))
            await ending.wait()
        finally:
            await server.stop(0.5)


def _listener(host: str, port: int | None) -> socket.socket:
    keys = ("--host", "--port")
    if port is None:
        for number in range(PORT, PORT + _PORTS):
            with contextlib.suppress(PortError):
                return listen(host, number, keys)
    return listen(host, PORT if port is None else port, keys)
