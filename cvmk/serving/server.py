"""`cvmk serve`: an Application, the ports that it is reached by, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cvmk.config.serve import ServeConfig
from cvmk.errors import CvmkError, DataError
from cvmk.serving import logs
from cvmk.serving.application import Application
from cvmk.serving.auth import Keys, server_credentials, ssl_context
from cvmk.serving.exporter import Exporter
from cvmk.serving.recording import ServiceLog
from cvmk.serving.service import AdminService, TranslationService

if TYPE_CHECKING:
    from cvmk.web.server import HttpServer

SWITCH_INTERVAL = 0.0005
"""Seconds after which Python lets another thread on: an engine's thread that has finished a step should not wait 5 ms for the event loop to pause."""
STUCK = 10.0
"""Seconds in one step after which an engine is taken for stuck: steps last milliseconds."""
_HEALTH_SECONDS = 0.5
_LAST_WORDS, _LAST_SECONDS = 0.5, 2.0
"""Seconds in which streams are told that the server ends, and in which what was cancelled then has to be gone."""
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the port is an error
    ("grpc.http2.bdp_probe", 0),  # else some megabytes are taken in before a sender is slowed down
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # a minute, where nobody says it
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 4),
    ("grpc.server.max_pending_requests", 1000),  # calls that the event loop has not come to yet; of more, the core refuses so many that there are never
    ("grpc.server.max_pending_requests_hard_limit", 1500),  # more than these: with CANCELLED, at a tenth of what the event loop would need
    ("grpc.http.overload_protection", 0),  # else a client that keeps to the limit of streams is refused, while those that have ended are cleared away
]
_CALLS = 128
"""Calls at once of one connection, beside its streams; a client's library keeps more to itself until there is room."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ports:
    """Where the server listens; None where it does not."""

    grpc: int
    admin: int | None = None
    http: int | None = None
    metrics: int | None = None


class Server:
    """All of `cvmk serve`, in the event loop of its caller: `start`, `serve` until it is told to end, and `stop`."""

    def __init__(self, config: ServeConfig, web: bool = False) -> None:
        self.config, self.application, self._web = config, Application(config), web
        self._keys = Keys(config.security.keys)
        self._admin_keys: Keys | None = None
        self._credentials = server_credentials(config.security)
        self._health = health.aio.HealthServicer()
        self._told: dict[str, bool] = {}  # to whoever watches the health
        self._watch: asyncio.Task[None] | None = None
        self._servers: list[grpc.aio.Server] = []
        self._http: HttpServer | None = None
        self._others = contextlib.AsyncExitStack()
        self._ending = asyncio.Event()
        self._seconds: float | None = None
        self.ports = Ports(0)

    async def start(self) -> Ports:
        """Load the models and listen. Raises what is wrong with a model, and DataError for a port that is taken."""
        server = self.config.server
        await self.application.start()
        log = None
        if server.log is not None:
            log = await self._others.enter_async_context(ServiceLog(Path(server.log), server.log_every, self.application.metrics))
        main = TranslationService(self.application, self._keys)
        port = await self._listen(server.host, server.port, main.handler(), (main.NAME, health.SERVICE_NAME), self._credentials)
        admin_port = None
        if server.admin_port is not None:
            self._admin_keys = Keys(self.config.security.admin_keys, admin=True)
            admin = AdminService(self.application, self._admin_keys, self.end)
            admin_port = await self._listen("127.0.0.1", server.admin_port, admin.handler(), (admin.NAME,), self._credentials)
        metrics_port = http_port = None
        if server.metrics_port is not None:
            metrics_port = (await self._others.enter_async_context(Exporter(self.application.metrics, server.host, server.metrics_port))).port
        if server.http_port is not None or self._web:
            from cvmk.serving.http_server import serve_http

            tls = ssl_context(self.config.security)
            self._http = await serve_http(self.application, self._keys, self.application.limits, server, tls, self._web)
            http_port = self._http.port
        await self.publish_health()
        self._watch = asyncio.create_task(self._watch_health(), name="cvmk health")
        self.ports = Ports(port, admin_port, http_port, metrics_port)
        if log is not None:
            await log.started(*self._described())
        return self.ports

    def _described(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The models and the ports, for the log."""
        models = {name: {"path": model.path, "compute_type": model.compute_type, "engine": model.engine} for name, model in self.config.models.items()}
        ports = {"gRPC": self.ports.grpc, "HTTP": self.ports.http, "metrics": self.ports.metrics}
        return models, {name: f"{self.config.server.host}:{port}" for name, port in ports.items() if port is not None}

    async def _listen(
        self, host: str, port: int, handler: grpc.GenericRpcHandler, names: tuple[str, ...], credentials: grpc.ServerCredentials | None
    ) -> int:
        limits = self.config.limits
        most = ("grpc.max_receive_message_length", limits.message_bytes), ("grpc.max_concurrent_streams", limits.sessions_per_client + _CALLS)
        options = [*_OPTIONS, *most]
        server = grpc.aio.server(handlers=[handler], options=options)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            found = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        except RuntimeError:
            found = 0
        if not found:
            raise DataError(f"cannot listen at {address}: the port is taken, or the address is not this machine's; choose another in [server]")
        await server.start()
        self._servers.append(server)
        return int(found)

    async def publish_health(self) -> None:
        """Tell grpc.health how it stands: each model by its name, and the service by its own and by none. A model that has been unloaded, or whose engine has
        been in one step for `STUCK` seconds, is not well, nor is the service where it drains or any engine is stuck."""
        stuck = {served.info.name for served in self.application.catalogue if served.stuck_seconds() > STUCK}
        loaded = {info.name for info in self.application.models()}
        well = not self.application.draining
        wanted = {name: well and name in loaded and name not in stuck for name in self.config.models}
        wanted |= dict.fromkeys(("", TranslationService.NAME), well and not stuck)
        for name, serves in wanted.items():
            if self._told.get(name) is not serves:
                self._told[name] = serves
                await self._health.set(name, health_pb2.HealthCheckResponse.SERVING if serves else health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _watch_health(self) -> None:
        while True:
            await self.publish_health()
            await asyncio.sleep(_HEALTH_SECONDS)

    def end(self, seconds: float | None = None) -> None:
        """Drain and end; the second time, at once."""
        self._seconds = 0.0 if self._ending.is_set() else seconds
        self._ending.set()

    def reload_keys(self) -> None:
        """Read the files of tokens anew; where one is wrong, the tokens before stay."""
        for keys in (self._keys, self._admin_keys):
            try:
                if keys is not None:
                    keys.reload()
            except CvmkError as error:
                _log.warning("the tokens stay as they were: %s", error)

    async def serve(self) -> None:
        """Until `end`: then nothing new is taken, and what runs has its time."""
        await self._ending.wait()
        self._ending.clear()
        _log.info("draining")
        self.application.draining = True
        await self.publish_health()
        drained = asyncio.create_task(self.application.drain(self._seconds))
        again = asyncio.create_task(self._ending.wait())
        await asyncio.wait({drained, again}, return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, again):
            task.cancel()

    async def stop(self) -> None:
        """Close the ports and the models."""
        if self._watch is not None:
            self._watch.cancel()
        await self.application.end(_LAST_WORDS)
        await asyncio.gather(*(server.stop(0.2) for server in self._servers), *([self._http.stop(0.2)] if self._http is not None else []))
        await self._others.aclose()
        await self.application.end(_LAST_SECONDS)  # those that gRPC has cancelled: it logs an error of each that the event loop does not live to see end
        await self.application.stop()


async def run(config: ServeConfig, tell: Callable[[Ports], None], web: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; `tell` is called when everything is ready. SIGHUP reads keys and changed models anew."""
    loop = asyncio.get_running_loop()
    logs.watch(loop)
    sys.setswitchinterval(SWITCH_INTERVAL)
    server = Server(config, web)
    reloads: set[asyncio.Task[object]] = set()

    def reload() -> None:
        server.reload_keys()
        task = loop.create_task(server.application.catalogue.reload_changed())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    try:
        ports = await server.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.end)
        loop.add_signal_handler(signal.SIGHUP, reload)
        gc.collect()
        gc.freeze()  # what is there now stays: no collection goes through it again, which would be a pause of some milliseconds
        tell(ports)
        await server.serve()
    finally:
        await server.stop()
