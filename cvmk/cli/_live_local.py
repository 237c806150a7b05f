"""A stream of this process that looks like one of a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from cvmk.streaming import Stream, Update


class LocalText:
    """`cvmk.streaming.Stream` for an event loop, which goes on while the model translates. One task writes, another one takes the updates."""

    connected = True

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._updates: asyncio.Queue[Update | BaseException | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stream.__exit__()

    @property
    def begin(self) -> int:
        """Where the sentence begins that has not ended, in characters of the whole text."""
        return self._stream.begin

    async def append(self, text: str) -> None:
        await self._translated(lambda: self._stream.append(text))

    async def replace(self, from_char: int, text: str) -> None:
        await self._translated(lambda: self._stream.replace(from_char - self._stream.begin, text))

    async def close(self) -> None:
        await self._translated(self._stream.close)
        self._updates.put_nowait(None)

    async def _translated(self, work: Callable[[], list[Update]]) -> None:
        """A failure is the taker's."""
        try:
            updates = await asyncio.to_thread(work)
        except Exception as error:
            self._updates.put_nowait(error)
            return
        for update in updates:
            self._updates.put_nowait(update)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Update:
        update = await self._updates.get()
        if update is None:
            raise StopAsyncIteration
        if isinstance(update, BaseException):
            raise update
        return update
