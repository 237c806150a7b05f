"""What the service answers with, whatever carries it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Language:
    """A language (an ISO 639-1 code) and how probable it is, from 0 to 1."""

    code: str
    probability: float


@dataclass(frozen=True)
class Translated:
    """The translation of a text. `language` is the source's, where it was asked to be found; times are in microseconds."""

    text: str
    alternatives: list[str] = field(default_factory=list)
    language: Language | None = None
    score: float = 0.0
    queue_us: int = 0
    decode_us: int = 0
    model: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """A model that is served. `state` is "loading", "ready" or "failed"; `max_length` counts the pieces of a text."""

    name: str
    source: str
    target: str
    version: str
    compute_type: str
    max_length: int
    state: str


@dataclass(frozen=True)
class Stats:
    """What the service does now, and has done since its start."""

    sessions: int
    waiting_tokens: int
    running_tokens: int
    translations: int
    rejected: int
    cancelled: int
    uptime_s: float
    draining: bool
