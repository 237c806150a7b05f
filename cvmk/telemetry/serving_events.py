"""The events of the live service. Nothing of them is a client's: no text, address, name or session."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cvmk.telemetry.event import Event


@dataclass(frozen=True)
class ServingStarted(Event):
    """The service takes requests from now on."""

    KIND = "serving_start"
    models: dict[str, Any]
    """By name: whatever is known, such as engine and compute_type."""
    addresses: dict[str, str] = field(default_factory=dict)
    """By protocol."""

    def text(self) -> str:
        return f"serving {', '.join(self.models) or 'no model'}" + "".join(f", {name} at {address}" for name, address in self.addresses.items())


@dataclass(frozen=True)
class Serving(Event):
    """What happened since the last one, and what there is now."""

    KIND = "serving"
    seconds: float
    """Since the last one."""
    sessions: int
    """Open now."""
    requests: dict[str, int] = field(default_factory=dict)
    """By status: "OK", "CANCELLED", ...; a stream counts when it ends."""
    rejections: dict[str, int] = field(default_factory=dict)
    """By reason."""
    models: dict[str, Any] = field(default_factory=dict)
    """By name: translations, queue_seconds, decode_seconds, first_text_seconds (means; null where there was none), waiting_tokens, running_tokens (now),
    committed_characters, deleted_characters."""
    loop_lag: float | None = None
    """Seconds that the event loop was late, the mean."""


@dataclass(frozen=True)
class ServingEnded(Event):
    """The service has ended."""

    KIND = "serving_end"
    reason: str = ""

    def text(self) -> str:
        return f"the service ends{f': {self.reason}' if self.reason else ''}"
