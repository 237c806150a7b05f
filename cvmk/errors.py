"""The errors that cvmk raises on purpose. Each carries the exit code of the command line.

A message is one sentence that names the key, file or shape at fault, and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


class CvmkError(Exception):
    """Base of every deliberate error; the command line prints its message without a traceback."""

    exit_code = 1


class ConfigError(CvmkError):
    """A wrong command line, configuration key or value."""

    exit_code = 2


class NoBackendError(ConfigError, NotImplementedError):
    """None of the backends that are allowed takes a call of an op. `reasons` holds their refusals."""

    def __init__(self, message: str, reasons: Sequence[str]) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons)

    def __reduce__(self) -> tuple[type[NoBackendError], tuple[str, tuple[str, ...]]]:  # an exception is pickled by its first argument alone
        return type(self), (str(self), self.reasons)


class QualityGateError(CvmkError):
    """A result is worse than the gate allows."""

    exit_code = 3


class DivergedError(CvmkError):
    """Training diverged again after the last rollback."""

    exit_code = 4


class DataError(CvmkError):
    """A file or folder is missing, unreadable, unwritable, empty or corrupt."""

    exit_code = 5


_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)  # as torch says it


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of the machine or of a GPU."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
