"""The metrics over HTTP, on a port of their own: GET /metrics, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time

from cvmk.errors import DataError
from cvmk.serving.metrics import Metrics

_LOG = logging.getLogger(__name__)
_SECONDS = 5.0  # for a request to come, and for its answer to be read
_REQUEST_BYTES = 8192
_CONNECTIONS = 16
_PATHS = ("/metrics", "/")


class Exporter:
    """Answers Prometheus in the running event loop; used inside `async with`.

    host, port   where it listens; port 0 takes a free one, and `port` is that then. Entering raises DataError where that cannot be had.
    fresh        seconds for which an answer is given again: whoever asks often costs no more than who asks so often.
    """

    def __init__(self, metrics: Metrics, host: str, port: int, *, fresh: float = 0.5) -> None:
        self._metrics, self._host, self.port, self._fresh = metrics, host, port, fresh
        self._told: dict[str, tuple[float, bytes, str]] = {}
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None
        self._lag: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Exporter:
        try:
            self._server = await asyncio.start_server(self._connected, self._host, self.port, limit=_REQUEST_BYTES)
        except OSError as error:
            raise DataError(f"server.metrics_port: cannot listen at {self._host}:{self.port}: {error.strerror or error}") from error
        self.port = self._server.sockets[0].getsockname()[1]
        self._lag = asyncio.create_task(self._metrics.watch_loop())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None and self._lag is not None
        self._server.close()
        self._lag.cancel()
        for writer in self._open.values():
            writer.transport.abort()  # its task ends by that; asyncio logs one that is cancelled
        await asyncio.gather(self._lag, *self._open, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(_SECONDS):
                    writer.write(await self._answer(reader))
                    writer.write_eof()
                    await writer.drain()
                    while await reader.read(_REQUEST_BYTES):  # what is not read when a connection is closed takes the answer back
                        pass
        except Exception:
            _LOG.exception("the metrics could not be told")
        finally:
            del self._open[task]
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        if len(self._open) > _CONNECTIONS:
            return _response("503 Service Unavailable", b"too many connections\n")
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response("431 Request Header Fields Too Large", b"the request is too large\n")
        except asyncio.IncompleteReadError:
            return b""
        line, *fields = head.decode("latin-1").split("\r\n")
        match line.split(" "):
            case ["GET" | "HEAD" as method, target, version] if version.startswith("HTTP/1."):
                pass
            case [_, _, version] if version.startswith("HTTP/1."):
                return _response("405 Method Not Allowed", b"only GET and HEAD\n", allow="GET, HEAD")
            case _:
                return _response("400 Bad Request", b"this is no HTTP/1.1\n")
        if target.partition("?")[0] not in _PATHS:
            return _response("404 Not Found", b"the metrics are at /metrics\n", head_only=method == "HEAD")
        accept = ",".join(value for name, _, value in (field.partition(":") for field in fields) if name.strip().lower() == "accept")
        body, media_type = self._exposition(accept.strip())
        return _response("200 OK", body, media_type, head_only=method == "HEAD")

    def _exposition(self, accept: str) -> tuple[bytes, str]:
        now = time.monotonic()
        begun, body, media_type = self._told.get(accept, (-math.inf, b"", ""))
        if now - begun >= self._fresh:
            body, media_type = self._metrics.exposition(accept)
            self._told = {accept: (now, body, media_type)}  # of the last one alone: clients choose what they say
        return body, media_type


def _response(status: str, body: bytes, media_type: str = "text/plain; charset=utf-8", *, allow: str = "", head_only: bool = False) -> bytes:
    fields = [f"HTTP/1.1 {status}", f"Content-Type: {media_type}", f"Content-Length: {len(body)}", "Connection: close", "X-Content-Type-Options: nosniff"]
    if allow:
        fields.append(f"Allow: {allow}")
    return "\r\n".join([*fields, "", ""]).encode("latin-1") + (b"" if head_only else body)
