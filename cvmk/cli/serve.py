"""`cvmk serve serve.toml`: translate for others, live."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cvmk.errors import ConfigError

if TYPE_CHECKING:
    from cvmk.config.serve import ServeConfig
    from cvmk.serving.server import Ports

HELP = "Translate live text for others, over gRPC."
WEB_PORT = 8080
REPLICAS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve the models of a configuration file until SIGTERM, then finish what runs. SIGHUP loads models whose files have changed."
    parser.add_argument("config", metavar="SERVE.toml", nargs="?", help="the configuration")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="set a key of the configuration, as in TOML")
    parser.add_argument("--web", action="store_true", help=f"also serve a page to type in, and HTTP, at server.http_port ({WEB_PORT} where there is none)")
    parser.add_argument("--ray", action="store_true", help="serve with several replicas on Ray, each at a port of its own from server.port on (extra `ray`)")
    parser.add_argument("--replicas", type=int, metavar="N", help=f"how many, with --ray ({REPLICAS})")
    parser.add_argument("--check", action="store_true", help="ask the server that runs by this configuration on this machine whether it is well, and end")
    parser.add_argument("--explain-config", action="store_true", help="print every key with its default and meaning, and end")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.config.loading import explain_config, load_config
    from cvmk.config.serve import ServeConfig

    if arguments.explain_config:
        print(explain_config(ServeConfig))
        return 0
    if arguments.config is None:
        raise ConfigError("no configuration is given: cvmk serve SERVE.toml, or --explain-config for its keys")
    config = load_config(ServeConfig, arguments.config, arguments.overrides)
    if arguments.check:
        return _check(config)
    if arguments.replicas is not None and (not arguments.ray or arguments.replicas < 1):
        raise ConfigError("--replicas N goes with --ray, and N is 1 or more")
    if arguments.ray:
        return _serve_on_ray(config, arguments.replicas or REPLICAS, arguments.web)
    return _serve(config, arguments.web)


def _check(config: ServeConfig) -> int:
    with _packages():
        from cvmk.serving.health_check import check
    check(config)
    return 0


@contextlib.contextmanager
def _packages(extra: str = "serve") -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"the service needs packages that are not installed ({error.name}): pip install 'cvmk[{extra}]'") from error


def _serve(config: ServeConfig, web: bool) -> int:
    import asyncio

    with _packages():
        from cvmk.serving import logs
        from cvmk.serving.server import run as serve

    def tell(ports: Ports) -> None:
        host = config.server.host
        told = [f"{', '.join(config.models)} at {host}:{ports.grpc}"]
        told += [f"{what} at {where}:{port}" for what, where, port in (
            ("HTTP" if not web else "a page", host, ports.http), ("metrics", host, ports.metrics), ("Admin", "127.0.0.1", ports.admin),
        ) if port is not None]  # fmt: skip
        print(f"cvmk: serving {'; '.join(told)}", file=sys.stderr, flush=True)

    logs.start()
    asyncio.run(serve(config, tell, web))
    return 0


def _serve_on_ray(config: ServeConfig, replicas: int, web: bool) -> int:
    with _packages("ray"):
        from cvmk.serving.ray import run as serve

    def tell(addresses: list[str]) -> None:
        print(f"cvmk: serving {', '.join(config.models)} at {','.join(addresses)}", file=sys.stderr, flush=True)

    if web and config.server.http_port is None:
        config = config.model_copy(update={"server": config.server.model_copy(update={"http_port": WEB_PORT})})
    serve(config, replicas, tell, web)
    return 0
