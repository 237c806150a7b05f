"""Clients of the live service: `AsyncClient`, and `Client` for those without an event loop."""

from __future__ import annotations

from cvmk.serving.client.asynchronous import AsyncClient
from cvmk.serving.client.channel import NoServerError, Tls
from cvmk.serving.client.retry import Retry
from cvmk.serving.client.stream import AsyncLiveStream
from cvmk.serving.client.synchronous import Client, LiveStream
from cvmk.serving.client.unread import LiveUpdate

__all__ = ["AsyncClient", "AsyncLiveStream", "Client", "LiveStream", "LiveUpdate", "NoServerError", "Retry", "Tls"]
