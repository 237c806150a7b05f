"""`cvmk serve --ray`: the service as a deployment of Ray Serve, several replicas of the whole server, on one machine or on the nodes of a cluster.

Ray Serve places the replicas, asks for their health, and puts another in the place of one that died. Clients talk with the replicas' own ports: one that is
given all their addresses (`cvmk.serving.client.Client("A:50051,B:50051")`) chooses a replica for every stream, and another one after a broken one.

Ray Serve has a gRPC proxy, too, and since some versions it carries streams in both directions, each message as a call between actors. It is not used because of
what it does to them (Ray 2.60; by its source, and tried on two cores):

- A replica that dies becomes INTERNAL, with the process, the address and the actor in the text. By INTERNAL a client cannot know that it may go on elsewhere
  (UNAVAILABLE), and such texts are nobody's business.
- It takes a replica's responses whether or not the client reads: for one that read nothing it took 20 MB in eight seconds. So `limits.unread_tokens` and
  `limits.stuck_seconds` would mean nothing.
- It listens without TLS at all addresses, takes messages of any size, and has no grpc.health.v1.
- A message there and back took 4.0 ms at the median and 15 ms at the 99th percentile, more than a small model needs to translate it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray as _ray
from ray import serve as _serve

from cvmk.config.loading import check_values
from cvmk.config.serve import ServeConfig
from cvmk.errors import ConfigError, DataError
from cvmk.serving import logs
from cvmk.serving.health_check import check
from cvmk.serving.server import Server

ray: Any = _ray  # only part of it has types
serve: Any = _serve
APPLICATION = "cvmk"
_DIRECTORY = "addresses"
_PORTS = ("port", "http_port", "metrics_port", "admin_port")
_STARTS = 3
"""How often a replica that cannot start is tried."""
_CLOSING = 15.0
"""Seconds that ending takes beside the drain."""
_SAID = re.compile(r"cvmk\.errors\.\w+: (.+)")


@dataclass(frozen=True)
class Replica:
    """Where a replica listens; its number, and the process that it is."""

    rank: int
    address: str
    pid: int


class _Directory:
    """An actor that knows where the replicas are."""

    def __init__(self) -> None:
        self._replicas: dict[int, Replica] = {}

    def put(self, replica: Replica) -> None:
        self._replicas[replica.rank] = replica

    def replicas(self) -> list[Replica]:
        return sorted(self._replicas.values(), key=lambda replica: replica.rank)


class _Served:
    """What Ray Serve runs: the server of `cvmk serve` on ports of its own. Requests never come through Ray."""

    async def __init__(self, values: dict[str, Any], web: bool) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        logs.start()
        rank = serve.get_replica_context().rank
        config = at_rank(check_values(ServeConfig, values, "serve.toml"), rank.local_rank)
        self._server = Server(config, web)
        try:
            ports = await self._server.start()
        except BaseException:
            await self._server.stop()
            raise
        self._config = config.model_copy(update={"server": config.server.model_copy(update={"port": ports.grpc})})
        self._life = asyncio.create_task(self._live())
        host = config.server.host
        host = ray.util.get_node_ip_address() if _is(host, "is_unspecified") else host
        self._replica = Replica(rank.rank, f"[{host}]:{ports.grpc}" if ":" in host else f"{host}:{ports.grpc}", os.getpid())
        await self._announce()

    async def _live(self) -> None:
        await self._server.serve()
        await self._server.stop()

    async def _announce(self) -> None:
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # an application that ends has none any more
            await ray.get_actor(_DIRECTORY, namespace=APPLICATION).put.remote(self._replica)

    async def check_health(self) -> None:
        """Ray Serve asks this; one that fails a few times is replaced."""
        if not self._life.done():
            await asyncio.to_thread(check, self._config)
        else:
            raise RuntimeError("the server has ended")
        await self._announce()

    async def __del__(self) -> None:
        """Ray Serve awaits this when the replica is to go."""
        if hasattr(self, "_life"):
            self._server.end()
            await self._life


def replicas() -> list[Replica]:
    """The replicas of the cluster that this process is connected to (`ray.init`), those that died and were not replaced yet among them."""
    try:
        directory = ray.get_actor(_DIRECTORY, namespace=APPLICATION)
    except ValueError:
        return []
    found: list[Replica] = ray.get(directory.replicas.remote())
    return found


def at_rank(config: ServeConfig, rank: int) -> ServeConfig:
    """The configuration of a node's replica of that number: each port is that of the file plus the number, 0 stays 0."""
    ports = {name: number + rank for name in _PORTS if (number := getattr(config.server, name))}
    log = {} if config.server.log is None else {"log": os.path.join(config.server.log, f"{socket.gethostname()}-{rank}")}  # one process writes a log
    return config.model_copy(update={"server": config.server.model_copy(update=ports | log)})


def run(config: ServeConfig, count: int, tell: Callable[[list[str]], None], web: bool = False) -> None:
    """Serve with so many replicas until SIGTERM or SIGINT; `tell` is given their addresses when all are ready.

    On the cluster that RAY_ADDRESS names, or that runs on this machine, or else on a new one of this machine alone. Raises ConfigError where the
    configuration does not fit the cluster, DataError where replicas cannot start.
    """
    _check_ports(config, count)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _connected():
        config = _for_cluster(config, count)
        with _deployed(config, count, web), _told_to_end() as ending:
            tell([replica.address for replica in replicas()])
            ending.wait()


def _check_ports(config: ServeConfig, count: int) -> None:
    ranges = sorted((number, name) for name in _PORTS if (number := getattr(config.server, name)))
    for (first, name), (second, other) in zip(ranges, ranges[1:], strict=False):
        if second < first + count:
            raise ConfigError(f"server.{name} and server.{other} are too near: {count} replicas have the ports from each on; put {count} or more between them")
    for first, name in ranges:
        if first + count > 65536:
            raise ConfigError(f"server.{name} is too large: {count} replicas have the ports from it on")


@contextlib.contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    ending = threading.Event()
    before = {number: signal.signal(number, lambda *_: ending.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(include_dashboard=False, logging_level="ERROR", namespace=APPLICATION)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DataError(f"cannot reach or start Ray: {error}") from error
    try:
        for number, handler in kept.items():  # Ray has put its own in their place
            signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def _for_cluster(config: ServeConfig, count: int) -> ServeConfig:
    """With threads for each replica, and files by their whole names: replicas have another working directory. Raises ConfigError for what does not fit."""
    if len(nodes := [node for node in ray.nodes() if node["Alive"]]) > 1 and _is(config.server.host, "is_loopback"):
        raise ConfigError(f"server.host is {config.server.host}, and the cluster has {len(nodes)} machines: an address such as 0.0.0.0 is reached from others")
    cpus = int(ray.cluster_resources().get("CPU", 0))
    threads = config.server.threads or max(1, cpus // count)
    if threads * count > cpus:
        raise ConfigError(f"{count} replicas of {threads} threads need {threads * count} CPUs, and Ray has {cpus}: lower --replicas or server.threads")
    files = ("certificate", "private_key", "client_authority", "keys", "admin_keys")
    security = {name: os.path.abspath(path) for name in files if (path := getattr(config.security, name))}
    models = {name: model.model_copy(update={"path": os.path.abspath(model.path)}) for name, model in config.models.items()}
    return config.model_copy(
        update={"server": config.server.model_copy(update={"threads": threads}), "security": config.security.model_copy(update=security), "models": models}
    )


@contextlib.contextmanager
def _deployed(config: ServeConfig, count: int, web: bool) -> Iterator[None]:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    if APPLICATION in serve.status().applications:
        raise ConfigError(f"this Ray cluster already serves an application {APPLICATION!r}: end its `cvmk serve --ray` first")
    with contextlib.suppress(ValueError):  # of one that was killed
        ray.kill(ray.get_actor(_DIRECTORY, namespace=APPLICATION))
    directory: Any = ray.remote(_Directory)
    kept = directory.options(name=_DIRECTORY, namespace=APPLICATION, num_cpus=0, max_restarts=-1).remote()
    deployment: Any = serve.deployment(
        _Served,
        name="Server",
        num_replicas=count,
        ray_actor_options={"num_cpus": config.server.threads},
        health_check_period_s=5,
        health_check_timeout_s=15,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.server.drain_seconds + _CLOSING,
        max_constructor_retry_count=_STARTS,
    )
    try:
        try:
            serve.run(deployment.bind(config.model_dump(), web), name=APPLICATION, route_prefix=None)
        except RuntimeError as error:
            deployments = serve.status().applications[APPLICATION].deployments.values()
            said = _SAID.findall("\n".join(deployment.message for deployment in deployments))
            raise DataError(f"no replica could start: {said[-1] if said else error}") from error
        yield
    finally:
        _end(config.server.drain_seconds + _CLOSING)
        ray.kill(kept)


def _end(seconds: float) -> None:
    """Every replica drains at the same time."""
    serve.delete(APPLICATION, _blocking=False)
    until = time.monotonic() + seconds
    while APPLICATION in (others := serve.status().applications) and time.monotonic() < until:
        time.sleep(0.1)
    if not set(others) - {APPLICATION}:
        serve.shutdown()


def _is(host: str, kind: str) -> bool:
    """Whether an address `is_loopback` or `is_unspecified`; names are neither, but for localhost."""
    try:
        return bool(getattr(ipaddress.ip_address(host), kind))
    except ValueError:
        return host == "localhost" and kind == "is_loopback"
