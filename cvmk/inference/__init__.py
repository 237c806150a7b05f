"""Translation with a finished model: the Translator and its engines. torch is imported by the torch engine only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cvmk.deprecation import moved
from cvmk.inference.engine import Engine, Finished, Partial, Request
from cvmk.inference.engines import EngineAnswer
from cvmk.inference.options import Hypothesis, SearchOptions
from cvmk.inference.session import Session
from cvmk.inference.translator import TooLongError, Translation, TranslationHypothesis, Translator

if TYPE_CHECKING:
    from cvmk.inference.asynchronous import AsyncTranslator, ExpiredError

__all__ = [
    "AsyncTranslator",
    "Engine",
    "EngineAnswer",
    "ExpiredError",
    "Finished",
    "Hypothesis",
    "Partial",
    "Request",
    "SearchOptions",
    "Session",
    "TooLongError",
    "Translation",
    "TranslationHypothesis",
    "Translator",
]

_moved = moved(__name__, "cvmk.formats")


def __getattr__(name: str) -> Any:
    if name in ("load_model_folder", "save_model_folder"):
        return _moved(name)
    if name in ("AsyncTranslator", "ExpiredError"):  # asyncio takes a while to import
        from cvmk.inference import asynchronous

        return getattr(asynchronous, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
