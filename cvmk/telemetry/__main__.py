"""`python -m cvmk.telemetry RUN [png] [svg]`: draw the curves of a run. What draws while it goes on is this, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from cvmk.errors import ConfigError, CvmkError
from cvmk.telemetry.plots import FORMATS, IDLE, draw


def main(arguments: Sequence[str]) -> int:
    if os.environ.get(IDLE) == "1":
        _yield_processor()
    try:
        if not arguments:
            raise ConfigError("name the folder of a run: python -m cvmk.telemetry RUN [png] [svg]")
        draw(arguments[0], arguments[1:] or FORMATS)
    except CvmkError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _yield_processor() -> None:
    with contextlib.suppress(OSError, AttributeError):
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
