"""The command line: one file a verb. Exit codes: 0 ok, 2 usage or configuration, 3 a quality gate failed, 4 diverged after the last
rollback, 5 input or output, 130 interrupted."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pkgutil
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from cvmk import __version__
from cvmk.cli import _terminal
from cvmk.errors import CvmkError, DataError, is_out_of_memory
from cvmk.libraries import check_environment

INTERRUPTED = 130
_TERMINATED = 143  # what shells say of a process that SIGTERM ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. A deliberate error is one sentence on stderr, never a traceback."""
    _terminal.prepare()
    try:
        with _terminable():
            code = _run(arguments)
        _terminal.flush()
        return code
    except CvmkError as error:
        _terminal.complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        _terminal.complain("interrupted")
        return INTERRUPTED
    except _Terminated:
        _terminal.complain("terminated")
        return _TERMINATED
    except BrokenPipeError:  # the reader of our output went away
        return 0
    except OSError as error:
        _terminal.complain(f"cannot read or write {error.filename or 'standard output'}: {error.strerror or error}")
        return DataError.exit_code
    except UnicodeEncodeError as error:
        _terminal.complain(_unencodable(error))
        return DataError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _terminal.complain("not enough memory: use a smaller model, smaller batches or a smaller beam")
        return DataError.exit_code
    finally:
        _terminal.settle()


class _Terminated(BaseException):
    """SIGTERM, which by itself would leave half-written files behind."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises _Terminated, unless somebody else handles it (training does for itself)."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments)
    except SystemExit:  # help, version, wrong usage
        _terminal.flush()
        raise
    if options.check_environment:
        check_environment()
    return int(options.run(options))


def _unencodable(error: UnicodeEncodeError) -> str:
    """What printing replaces, a file's name cannot do without."""
    name = _terminal.as_text(error.object)
    name = name if len(name) <= 60 else f"{name[:57]}..."
    if error.encoding.startswith("utf"):
        return f"{name!r} is no valid text: give the file a name in UTF-8"
    return f"the encoding of this locale ({error.encoding}) cannot spell {name!r}: set PYTHONUTF8=1, or a locale in UTF-8"


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
        sub.set_defaults(run=verb.run, check_environment=getattr(verb, "CHECK_ENVIRONMENT", True))
    return parser
