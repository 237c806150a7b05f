"""What a client of the service is told of an error: a status, one sentence, and the field at fault."""

from __future__ import annotations

import enum
import logging
import secrets

from cvmk.errors import CvmkError

_log = logging.getLogger(__name__)


class Status(enum.Enum):
    """gRPC's canonical codes, by their numbers, as far as the service uses them, and what HTTP says for each."""

    CANCELLED = (1, 499)
    INVALID_ARGUMENT = (3, 400)
    DEADLINE_EXCEEDED = (4, 504)
    NOT_FOUND = (5, 404)
    PERMISSION_DENIED = (7, 403)
    RESOURCE_EXHAUSTED = (8, 429)
    FAILED_PRECONDITION = (9, 400)
    ABORTED = (10, 409)
    UNIMPLEMENTED = (12, 501)
    INTERNAL = (13, 500)
    UNAVAILABLE = (14, 503)
    UNAUTHENTICATED = (16, 401)

    def __init__(self, number: int, http: int) -> None:
        self.number, self.http = number, http


REASONS = ("queue", "requests", "characters", "sessions", "client_sessions", "unread", "stuck", "memory", "draining")
"""Why something was rejected, where its status leaves that open."""


class ServiceError(CvmkError):
    """Something that a client did wrong, or that the service cannot do now. The message is for the client: it tells nothing of the server's inside.

    field        path of the request's field at fault, such as "texts[2]"; "" where there is none.
    retry_after  seconds after which it may be tried again; None where trying again does not help.
    reason       for the metrics, one of `REASONS`: what was at its end; "" where the status says enough.
    """

    def __init__(self, status: Status, message: str, *, field: str = "", retry_after: float | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.field, self.retry_after, self.reason = status, field, retry_after, reason


def invalid(field: str, message: str) -> ServiceError:
    """A field that cannot be so; the message begins with its name."""
    return ServiceError(Status.INVALID_ARGUMENT, f"{field} {message}", field=field)


def internal(what: str) -> ServiceError:
    """What a client is told of the exception that is being handled: a number, which the log explains."""
    number = secrets.token_hex(4)
    _log.exception("%s failed (%s)", what, number)
    return ServiceError(Status.INTERNAL, f"the server failed: its log says why under {number}")
