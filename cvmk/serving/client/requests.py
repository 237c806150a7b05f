"""Python's values as the messages' fields."""

from __future__ import annotations

from typing import Any, TypedDict

from cvmk.errors import ConfigError
from cvmk.serving import messages
from cvmk.serving.errors import invalid
from cvmk.streaming import LocalAgreement, Policy, Retranslation, WaitK

POLICIES: dict[str, type[Retranslation | LocalAgreement | WaitK]] = {"retranslation": Retranslation, "local-agreement": LocalAgreement, "wait-k": WaitK}


class TimeoutOptions(TypedDict, total=False):
    """Of every call."""

    timeout: float | None


class TranslateOptions(TimeoutOptions, total=False):
    """Of `translate`."""

    source: str
    target: str
    model: str
    beam_size: int
    alternatives: int
    priority: str


class StreamOptions(TimeoutOptions, total=False):
    """Of `stream`."""

    source: str
    target: str
    model: str
    policy: Policy | str | None
    beam_size: int
    priority: str
    partial_words: bool
    credit: int
    session: str


def utf8(text: object, field: str) -> bytes:
    """Raises TypeError for what is no string, ServiceError for one that UTF-8 cannot spell."""
    if not isinstance(text, str):
        raise TypeError(f"{field} is a string, and {type(text).__name__} was given")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise invalid(field, f"has half of a surrogate pair (character {error.start}), which is no text") from None


def priority(name: str) -> int:
    """Raises ConfigError."""
    if name not in ("low", "normal", "high"):
        raise ConfigError(f'priority is {name!r}, and must be "low", "normal" or "high"')
    return int(getattr(messages, f"PRIORITY_{name.upper()}"))


def policy(chosen: Policy | str | None) -> Any:
    """A policy of `cvmk.streaming`, or the name of one with its defaults. Raises ConfigError."""
    if isinstance(chosen, str):
        if chosen not in POLICIES:
            raise ConfigError(f"policy is {chosen!r}, and must be one of {', '.join(POLICIES)}")
        chosen = POLICIES[chosen]()
    if chosen is None:
        return None
    message = messages.Policy()
    match chosen:
        case Retranslation(mask):
            message.retranslation.mask = mask
        case LocalAgreement(agreeing, mask):
            message.local_agreement.agreeing, message.local_agreement.mask = agreeing, mask
        case WaitK(k):
            message.wait_k.k = k
        case _:
            raise ConfigError(f"policy is a {type(chosen).__name__}, which the service does not have: take one of {', '.join(POLICIES)}")
    return message


def count(name: str, value: int) -> int:
    """Raises ConfigError for what is no whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ConfigError(f"{name} is {value!r}, and must be a whole number, not below 0")
    return value
