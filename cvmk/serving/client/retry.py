"""When a call that failed is tried again."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from cvmk.errors import ConfigError
from cvmk.serving.errors import ServiceError, Status


@dataclass(frozen=True)
class Retry:
    """Exponential backoff with full jitter: after the n-th failure in a row, a time drawn from 0 to first_delay * 2**(n - 1) seconds, at most max_delay.

    Tried again is what the server could not do now: it is not there or goes away (UNAVAILABLE), or says after which time it may be asked again; that time
    is waited for first. `tries` counts all tries in a row, the first one included; of a stream, those since something was committed.
    """

    tries: int = 10
    first_delay: float = 0.1
    max_delay: float = 10.0

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ConfigError(f"tries is {self.tries}, and must be at least 1")
        if not 0 <= self.first_delay <= self.max_delay:
            raise ConfigError(f"first_delay is {self.first_delay} and max_delay {self.max_delay}: both are seconds, and the first is not the longer one")

    def delay(self, failures: int, error: ServiceError) -> float | None:
        """Seconds until the next try, after so many failures in a row; None where there is none."""
        if failures >= self.tries or not (error.status is Status.UNAVAILABLE or error.retry_after is not None):
            return None
        return (error.retry_after or 0.0) + random.uniform(0.0, min(self.max_delay, self.first_delay * 2.0 ** min(failures - 1, 60)))

    async def pause(self, failures: int, error: ServiceError, deadline: Deadline) -> None:
        """Waits for the next try. Raises `error` where there is none, or none before the deadline."""
        delay = self.delay(failures, error)
        left = deadline.left()
        if delay is None or (left is not None and delay >= left):
            raise error from None
        await asyncio.sleep(delay)


class Deadline:
    """So many seconds from now on, for a call and all its tries; None: no limit."""

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds > 0:
            raise ConfigError(f"timeout is {seconds}, and must be a time above 0 in seconds, or None")
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds, not below 0."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())
