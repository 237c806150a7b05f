"""The live service: text that grows goes in, text that stays comes out; and its clients."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvmk.serving.client import AsyncClient, AsyncLiveStream, Client, LiveStream, LiveUpdate, NoServerError, Retry, Tls

__all__ = ["AsyncClient", "AsyncLiveStream", "Client", "LiveStream", "LiveUpdate", "NoServerError", "Retry", "Tls"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # grpc takes a while to import
        return getattr(importlib.import_module("cvmk.serving.client"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
