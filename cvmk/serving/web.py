"""The web page, and the WebSocket /stream that it translates by: the protocol's StreamRequest and StreamResponse as JSON, a message a frame.

The first frame has `open`, and beside it `token` where the server asks for one (`authorization: Bearer` will do, too): addresses are written to logs, and a
token is never part of one. An error comes as `{"error": {"status", "message", "field", "retry_after"}}`, and then the connection is closed with 4000 and the
number of the status.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from cvmk.config.serve import ServerConfig
from cvmk.serving.auth import Keys, bearer_token
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.json_messages import from_json, object_of, to_json
from cvmk.serving.service import FIRST_SECONDS, TranslationService
from cvmk.web.pages import page_routes

if TYPE_CHECKING:
    from cvmk.serving.application import Application

_PAGE = Path(__file__).parent / "page"
_PROTOCOL = "cvmk.v1"


def web_routes(application: Application, keys: Keys, config: ServerConfig) -> tuple[BaseRoute, ...]:
    """The page, its files, and its WebSocket."""
    return (*page_routes(_PAGE), WebSocketRoute("/stream", _Streams(application, keys, config).stream))


class _Streams:
    def __init__(self, application: Application, keys: Keys, config: ServerConfig) -> None:
        self._application, self._limits, self._keys, self._config = application, application.config.limits, keys, config
        self._service = TranslationService(application, keys)

    async def stream(self, websocket: WebSocket) -> None:
        if not self._is_ours(websocket):
            await websocket.close()  # before it is accepted: HTTP's 403
            return
        await websocket.accept(_PROTOCOL if _PROTOCOL in websocket.scope["subprotocols"] else None)
        error: ServiceError | None = None
        try:
            with self._application.observed("websocket", dict(websocket.headers)):
                await self._until_gone(websocket)
        except ServiceError as trouble:
            error = trouble
        if error is None or error.status is not Status.CANCELLED:
            await self._end(websocket, error)

    def _is_ours(self, websocket: WebSocket) -> bool:
        """Whether it is of a page of this server, or of one that may, or of no page: browsers let any page connect to anywhere, and say which it is."""
        origin = websocket.headers.get("origin")
        return origin is None or origin in self._config.origins or urlsplit(origin).netloc == websocket.headers.get("host")

    async def _until_gone(self, websocket: WebSocket) -> None:
        """Runs the stream; it is cancelled when the client goes: ServiceError CANCELLED."""
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                first = await _received(websocket)
        except TimeoutError:
            raise ServiceError(Status.DEADLINE_EXCEEDED, f"nothing came for {FIRST_SECONDS:g} seconds: send open") from None
        token = first.pop("token", None)
        if token is not None and not isinstance(token, str):
            raise ServiceError(Status.UNAUTHENTICATED, "token must be a string", field="token")
        peer = websocket.client.host if websocket.client else ""
        caller = self._keys.caller(token or bearer_token(websocket.headers.get("authorization")), peer)
        gone = asyncio.Event()
        running = asyncio.ensure_future(self._service.stream(_requests(websocket, first, gone), caller, lambda message: self._write(websocket, message)))
        leaving = asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait((running, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise _gone()
            running.result()
        finally:
            for task in (running, leaving):
                task.cancel()
            await asyncio.gather(running, leaving, return_exceptions=True)

    async def _write(self, websocket: WebSocket, message: Any) -> None:
        try:
            async with asyncio.timeout(self._limits.stuck_seconds):
                await websocket.send_text(json.dumps(to_json(message), ensure_ascii=False, separators=(",", ":")))
        except TimeoutError:
            raise ServiceError(Status.RESOURCE_EXHAUSTED, "what was sent is not being read", reason="stuck") from None
        except WebSocketDisconnect:
            raise _gone() from None

    async def _end(self, websocket: WebSocket, error: ServiceError | None) -> None:
        try:
            async with asyncio.timeout(self._limits.stuck_seconds):
                if error is not None:
                    told = {"status": error.status.name, "message": str(error), "field": error.field, "retry_after": error.retry_after}
                    await websocket.send_text(json.dumps({"error": {name: value for name, value in told.items() if value not in ("", None)}}))
                await websocket.close(1000 if error is None else 4000 + error.status.number)
        except (TimeoutError, WebSocketDisconnect, RuntimeError):
            pass  # nobody is there any more


def _gone() -> ServiceError:
    return ServiceError(Status.CANCELLED, "the client has gone")


async def _received(websocket: WebSocket) -> dict[str, Any]:
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise _gone()
    return object_of(message.get("text"))


async def _requests(websocket: WebSocket, first: dict[str, Any], gone: asyncio.Event) -> AsyncIterator[Any]:
    """StreamRequests, until the client goes: then nothing more comes, and `gone` is set."""
    yield from_json("StreamRequest", first)
    while not gone.is_set():
        try:
            yield from_json("StreamRequest", await _received(websocket))
        except ServiceError as error:
            if error.status is not Status.CANCELLED:
                raise
            gone.set()
            await asyncio.Event().wait()  # until the stream is cancelled
