"""The command line: one file a verb. Exit codes: 0 ok, 2 usage or configuration, 3 a quality gate failed, 4 diverged after the last
rollback, 5 input or output, 130 interrupted."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Sequence

from cvmk import __version__
from cvmk.errors import CvmkError, DataError

INTERRUPTED = 130
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)  # as torch says it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. A deliberate error is one sentence on stderr, never a traceback."""
    _occupy_closed_descriptors()
    try:
        options = _parser().parse_args(arguments)
        return int(options.run(options))
    except CvmkError as error:
        print(f"cvmk: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("cvmk: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away: end quietly, and keep the interpreter's last flush from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = error.filename or "standard output"
        print(f"cvmk: cannot read or write {what}: {error.strerror or error}", file=sys.stderr)
        return DataError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        print("cvmk: not enough memory: use a smaller model, smaller batches or a smaller beam", file=sys.stderr)
        return DataError.exit_code


def _occupy_closed_descriptors() -> None:
    """Where a standard stream was closed, the next file that is opened must not become it and get what is printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:  # print(file=None) would mean standard output
        sys.stderr = open(os.devnull, "w")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cvmk", description="Translation models small and fast enough to run live.")
    parser.add_argument("--version", action="version", version=f"cvmk {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name):
        if module.name.startswith("_"):
            continue
        verb = importlib.import_module(f"{__name__}.{module.name}")
        sub = verbs.add_parser(module.name, help=verb.HELP, description=verb.HELP)
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return parser
