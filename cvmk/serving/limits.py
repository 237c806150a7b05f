"""How much one caller may ask for, and all of them together: the keys of `[limits]`, held to."""

from __future__ import annotations

import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from cvmk.config.serve import LimitsConfig
from cvmk.serving.auth import Caller
from cvmk.serving.errors import ServiceError, Status, invalid

Clock = Callable[[], float]

_MINUTE = 60.0
_KNOWN = 65_536
"""Callers of the last minute that are known apart; of more the one that was quiet for longest is forgotten. About 20 MB."""
_SESSION_RETRY = 1.0  # seconds; nobody knows when a session ends


class Bucket:
    """A bucket of `rate` times `seconds` tokens, full to begin with, that gets `rate` more a second. Its state is one number: when it will be full."""

    __slots__ = ("_full_at", "_rate", "_seconds")

    def __init__(self, rate: float, seconds: float) -> None:
        self._rate, self._seconds = rate, seconds
        self._full_at = -math.inf

    def wait(self, tokens: float, now: float) -> float:
        """Seconds until `tokens` can be taken; 0 where they can be now, infinity where the bucket never holds as many."""
        if tokens > self._rate * self._seconds * (1 + 1e-9):
            return math.inf
        excess = max(self._full_at, now) + tokens / self._rate - now - self._seconds
        return excess if excess > 1e-9 * self._seconds else 0.0

    def take(self, tokens: float, now: float) -> None:
        """Take them, whether they are there or not: what is not there is owed."""
        self._full_at = max(self._full_at, now) + tokens / self._rate


class Pace:
    """How fast the events of one stream are read: in bursts of a second, then `events` a second. Nothing is refused: the reader waits."""

    def __init__(self, events: float, clock: Clock = time.monotonic) -> None:
        self._bucket, self._clock = Bucket(events, 1.0), clock

    def delay(self) -> float:
        """Seconds to wait before the event that has come is looked at; 0 nearly always."""
        now = self._clock()
        wait = self._bucket.wait(1.0, now)
        self._bucket.take(1.0, now)
        return wait


class Limits:
    """Counts what callers ask for; for one event loop, since nothing here is locked. `clock` gives seconds, for tests."""

    def __init__(self, config: LimitsConfig, clock: Clock = time.monotonic) -> None:
        self.config, self._clock = config, clock
        self._rates = {"requests": config.requests_per_minute, "characters": config.characters_per_minute}
        self._buckets: OrderedDict[str, tuple[dict[str, Bucket], float]] = OrderedDict()  # with the time of the last request, the oldest first
        self._sessions: dict[str, int] = {}
        self.sessions = 0
        """Sessions that are open."""

    # rates

    def admit_request(self, caller: Caller, characters: int, *, requests: int = 1) -> None:
        """Count a request of so many characters; an event of a stream is one with `requests` 0.

        Raises ServiceError RESOURCE_EXHAUSTED with `retry_after`, and counts nothing then.
        """
        asked = {kind: amount for kind, amount in (("requests", requests), ("characters", characters)) if self._rates[kind] and amount}
        if not asked:
            return
        now = self._clock()
        buckets = self._buckets_of(caller.id, now)
        for kind, amount in asked.items():
            if wait := buckets[kind].wait(amount, now):
                raise self._too_many(kind, wait)
        for kind, amount in asked.items():
            buckets[kind].take(amount, now)

    def _too_many(self, kind: str, wait: float) -> ServiceError:
        allowed = self._rates[kind]
        if math.isinf(wait):
            message = f"the request has more {kind} than the {allowed} that are allowed a minute: send it in parts"
            return ServiceError(Status.RESOURCE_EXHAUSTED, message, reason=kind)
        message = f"more than {allowed} {kind} a minute: try again in {wait:.1f} s"
        return ServiceError(Status.RESOURCE_EXHAUSTED, message, retry_after=wait, reason=kind)

    def _buckets_of(self, caller: str, now: float) -> dict[str, Bucket]:
        buckets, _ = self._buckets.pop(caller, (None, now))
        for _ in range(2):  # a bucket that nobody took from for a minute is full, as that of a stranger is: forgetting it changes nothing
            if self._buckets and (next(iter(self._buckets.values()))[1] <= now - _MINUTE or len(self._buckets) >= _KNOWN):
                self._buckets.popitem(last=False)
        buckets = buckets or {kind: Bucket(rate / _MINUTE, _MINUTE) for kind, rate in self._rates.items() if rate}
        self._buckets[caller] = buckets, now
        return buckets

    def pace(self) -> Pace:
        """For the events of one stream."""
        return Pace(self.config.events_per_second, self._clock)

    # sessions

    @contextlib.contextmanager
    def session(self, caller: Caller) -> Iterator[None]:
        """A session that is open for as long as the context. Entering it raises ServiceError RESOURCE_EXHAUSTED where there are too many."""
        own = self._sessions.get(caller.id, 0)
        if own >= self.config.sessions_per_client:
            message = f"{own} sessions of yours are open, and no client may have more: close one, or try again later"
            raise ServiceError(Status.RESOURCE_EXHAUSTED, message, retry_after=_SESSION_RETRY, reason="client_sessions")
        if self.sessions >= self.config.sessions:
            message = f"{self.sessions} sessions are open, which is all that this server takes: try again later"
            raise ServiceError(Status.RESOURCE_EXHAUSTED, message, retry_after=_SESSION_RETRY, reason="sessions")
        self.sessions += 1
        self._sessions[caller.id] = own + 1
        try:
            yield
        finally:
            self.sessions -= 1
            self._sessions[caller.id] -= 1
            if not self._sessions[caller.id]:
                del self._sessions[caller.id]

    # what one request may have

    def check_text(self, field: str, data: bytes | str) -> str:
        """The text of a request's field, which comes as UTF-8 (or from JSON as characters). White space alone, or nothing, is a text like another.

        Raises ServiceError INVALID_ARGUMENT, which names the field and never shows the text: over `text_bytes`, not UTF-8, a surrogate (half a character), NUL.
        """
        limit = self.config.text_bytes
        encoded = data if isinstance(data, bytes) else data[: limit + 1].encode("utf-8", "surrogatepass")  # a surrogate is no UTF-8
        if len(encoded) > limit:
            raise invalid(field, f"is longer than {limit} bytes of UTF-8: send it in parts")
        text, wrong = _decoded(encoded)
        if text is None:
            raise invalid(field, f"is not UTF-8, or has half of a surrogate pair, at byte {wrong + 1}")
        if (place := text.find("\0")) >= 0:
            raise invalid(field, f"has a NUL as character {place + 1}")
        return text

    def check_texts(self, field: str, texts: Sequence[bytes | str]) -> list[str]:
        """`check_text` of each of a request's texts, and how many there are: one at least, `texts` at most."""
        if not texts:
            raise invalid(field, "is empty: give one text or more")
        if len(texts) > self.config.texts:
            raise invalid(field, f"has {len(texts)} texts, and a request may have {self.config.texts}: send several")
        return [self.check_text(f"{field}[{index}]", text) for index, text in enumerate(texts)]

    def check_search(self, beam_size: int = 0, alternatives: int = 0) -> None:
        """What a request asks of the search; a beam of 0 is the model's own. Raises ServiceError INVALID_ARGUMENT."""
        for field, value, most in (("beam_size", beam_size, self.config.beam_size), ("alternatives", alternatives, self.config.alternatives)):
            if not 0 <= value <= most:
                raise invalid(field, f"must be from 0 to {most}")


def _decoded(data: bytes) -> tuple[str | None, int]:
    """The text; None and the place of the first wrong byte where it is not UTF-8. The decoder's exception holds the text and stays in here."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError as error:
        return None, error.start
