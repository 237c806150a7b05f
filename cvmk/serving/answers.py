"""What the service answers with, whatever carries it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Language:
    """A language (BCP 47) and how sure it is, from 0 to 1."""

    code: str
    probability: float


@dataclass(frozen=True)
class Translated:
    """A text's translation. `language` is what its source was found to be, where that was asked for; times are microseconds, the longest of its sentences."""

    text: str
    alternatives: list[str] = field(default_factory=list)
    language: Language | None = None
    score: float = 0.0
    queue_us: int = 0
    decode_us: int = 0
    model: str = ""


@dataclass(frozen=True)
class ServedLanguage:
    """A language that can be translated from, with its English name, and to which."""

    code: str
    name: str
    targets: list[str]


@dataclass(frozen=True)
class ModelInfo:
    """A served model: its languages, the version of its files, how it computes, the pieces that it reads, and whether it is "ready"."""

    name: str
    source: str
    target: str
    version: str
    compute_type: str
    max_length: int
    state: str = "ready"


@dataclass(frozen=True)
class Stats:
    """What is going on: open streams, tokens that wait and that run, and counts since the start."""

    sessions: int
    waiting_tokens: int
    running_tokens: int
    translations: int
    rejected: int
    cancelled: int
    uptime_s: float
    draining: bool
