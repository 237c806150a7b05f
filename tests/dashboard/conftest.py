from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from cvmk.dashboard import board
from cvmk.dashboard.app import app
from cvmk.dashboard.board import Board
from cvmk.web.server import listen, start


@contextlib.contextmanager
def dashboard(*folders: Path, port: int = 0) -> Iterator[str]:
    """The address of a dashboard of runs, served in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    try:
        with Board([str(folder) for folder in folders]) as runs:
            server = run(start(app(runs, "127.0.0.1"), listen("127.0.0.1", port, ("--host", "--port")), ws="none"))
            try:
                yield server.url
            finally:
                run(server.stop(0.2))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., contextlib.AbstractContextManager[str]]:
    monkeypatch.setattr(board, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(board, "_FIND_SECONDS", 0.5)
    return dashboard
