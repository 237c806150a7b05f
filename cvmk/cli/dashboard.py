"""`cvmk dashboard RUN...`: a live page over the events of runs."""

from __future__ import annotations

import argparse
import sys

from cvmk.errors import ConfigError

HELP = "Watch runs on a live page of this machine."
PORT = 8090


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a live page over the events of runs, for a browser on this machine, until Ctrl-C. It reads the runs and changes nothing."
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run, or a folder of runs")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (%(default)s: this machine only; others can read the runs)")
    parser.add_argument("--port", type=_port, metavar="N", help=f"the port to listen at ({PORT}, or the next that is free)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(arguments: argparse.Namespace) -> int:
    import asyncio

    try:
        from cvmk.dashboard.app import serve
    except ImportError as error:
        raise ConfigError(f"the dashboard needs packages that are not installed ({error.name}): pip install 'cvmk[serve]'") from error

    def tell(url: str, runs: int) -> None:
        print(f"cvmk: a dashboard of {runs} {'run' if runs == 1 else 'runs'} at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        if arguments.open:
            import webbrowser

            webbrowser.open(url)

    asyncio.run(serve(arguments.runs, arguments.host, arguments.port, tell))
    return 0


def _port(text: str) -> int:
    """A port."""
    found = int(text)
    if not 0 <= found <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: give 0 to 65535, 0 for any that is free")
    return found


_port.__name__ = "whole number"
