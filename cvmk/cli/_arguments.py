"""Converters of arguments that several verbs have. argparse names a converter by __name__ in its messages: "invalid whole number value: 'x'"."""

from __future__ import annotations

import argparse


def number(text: str) -> float:
    """A finite number."""
    found = float(text)
    if found != found or found in (float("inf"), float("-inf")):
        raise ValueError(text)
    return found


def points(text: str) -> float:
    """Points that a score may drop."""
    found = number(text)
    if found < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative: give the points that the score may drop")
    return found


def positive(text: str) -> int:
    """1 or more."""
    found = int(text)
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give 1 or more")
    return found


def samples(text: str) -> int:
    """Resamples of a bootstrap."""
    from cvmk.config.training import MAX_RESAMPLES

    found = int(text)
    if not 50 <= found <= MAX_RESAMPLES:
        raise argparse.ArgumentTypeError(f"{text} is too {'small' if found < 50 else 'large'}: give 50 to {MAX_RESAMPLES}")
    return found


def share(text: str) -> float:
    """A confidence."""
    found = number(text)
    if not 0.5 < found < 1:
        raise argparse.ArgumentTypeError(f"{text} is no confidence: give a number between 0.5 and 1, such as 0.95")
    return found


positive.__name__ = samples.__name__ = "whole number"
points.__name__ = share.__name__ = "number"
