"""The client of the service for programs without an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Self, TypeVar, Unpack, overload

from cvmk.serving.answers import Language, ModelInfo, Stats, Translated
from cvmk.serving.client.asynchronous import AsyncClient
from cvmk.serving.client.channel import DEFAULT_ADDRESS, Tls
from cvmk.serving.client.requests import StreamOptions, TimeoutOptions, TranslateOptions
from cvmk.serving.client.retry import Retry
from cvmk.serving.client.unread import LiveUpdate

T = TypeVar("T")


class _Loop:
    """The event loop of all clients of a process, in a thread that begins with the first of them and ends with the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for the end of `work`; whatever interrupts the waiting cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="cvmk-client", daemon=True).start()
            return self._loop


_LOOP = _Loop()


class Client:
    """`AsyncClient` for programs without an event loop: the same arguments, methods and errors, but every method waits. Any number of threads may use a client.

    with Client("127.0.0.1:50051") as client:
        print(client.translate("We need a table.", target="de").text)
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float | None = 30.0,
        retry: Retry | None = None,
    ) -> None:
        self._client = AsyncClient(address, token=token, tls=tls, timeout=timeout, retry=retry)

    def __repr__(self) -> str:
        return repr(self._client).removeprefix("Async")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is under way."""
        _LOOP.run(self._client.close())

    @overload
    def translate(self, texts: str, **options: Unpack[TranslateOptions]) -> Translated: ...

    @overload
    def translate(self, texts: list[str] | tuple[str, ...], **options: Unpack[TranslateOptions]) -> list[Translated]: ...

    def translate(self, texts: str | list[str] | tuple[str, ...], **options: Unpack[TranslateOptions]) -> Translated | list[Translated]:
        """`AsyncClient.translate`, with its options."""
        work: Coroutine[Any, Any, Any] = self._client.translate(texts, **options)
        return _LOOP.run(work)  # type: ignore[no-any-return]

    @overload
    def detect(self, texts: str, **options: Unpack[TimeoutOptions]) -> list[Language]: ...

    @overload
    def detect(self, texts: list[str] | tuple[str, ...], **options: Unpack[TimeoutOptions]) -> list[list[Language]]: ...

    def detect(self, texts: str | list[str] | tuple[str, ...], **options: Unpack[TimeoutOptions]) -> list[Language] | list[list[Language]]:
        """`AsyncClient.detect`, with its options."""
        work: Coroutine[Any, Any, Any] = self._client.detect(texts, **options)
        return _LOOP.run(work)  # type: ignore[no-any-return]

    def models(self, **options: Unpack[TimeoutOptions]) -> list[ModelInfo]:
        """`AsyncClient.models`."""
        return _LOOP.run(self._client.models(**options))

    def stats(self, **options: Unpack[TimeoutOptions]) -> Stats:
        """`AsyncClient.stats`."""
        return _LOOP.run(self._client.stats(**options))

    def stream(self, **options: Unpack[StreamOptions]) -> LiveStream:
        """`AsyncClient.stream`, with its options: a text that grows; to be entered by `with`."""
        return LiveStream(self._client, options)


class LiveStream:
    """`AsyncLiveStream` for programs without an event loop. One thread takes updates; any may write, that one included.

    with client.stream(source="en", target="de") as stream:
        stream.append("We need a table. ")
        stream.close()
        for update in stream:
            print(update.committed, update.tentative)
    """

    def __init__(self, client: AsyncClient, options: StreamOptions) -> None:
        self._stream = client.stream(**options)

    def __repr__(self) -> str:
        return repr(self._stream).removeprefix("Async")

    def __enter__(self) -> Self:
        _LOOP.run(self._stream.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        _LOOP.run(self._stream.__aexit__())

    @property
    def session(self) -> str:
        """Its name at the server."""
        return self._stream.session

    @property
    def model(self) -> str:
        """What translates it."""
        return self._stream.model

    @property
    def target(self) -> str:
        """The language of the translation."""
        return self._stream.target

    @property
    def connected(self) -> bool:
        """Whether a server is there now."""
        return self._stream.connected

    @property
    def source(self) -> str:
        """`AsyncLiveStream.source`."""
        return self._stream.source

    @property
    def begin(self) -> int:
        """`AsyncLiveStream.begin`."""
        return self._stream.begin

    def append(self, text: str) -> None:
        """`AsyncLiveStream.append`."""
        _LOOP.run(self._stream.append(text))

    def replace(self, from_char: int, text: str) -> None:
        """`AsyncLiveStream.replace`."""
        _LOOP.run(self._stream.replace(from_char, text))

    def end_segment(self) -> None:
        """`AsyncLiveStream.end_segment`."""
        _LOOP.run(self._stream.end_segment())

    def close(self) -> None:
        """`AsyncLiveStream.close`."""
        _LOOP.run(self._stream.close())

    def __iter__(self) -> Iterator[LiveUpdate]:
        return self

    def __next__(self) -> LiveUpdate:
        update = _LOOP.run(self._next(None))
        if update is None:
            raise StopIteration
        return update

    def poll(self, seconds: float = 0.0) -> LiveUpdate | None:
        """The next update, where there is one within so many seconds; None where there is none, and at the end."""
        with contextlib.suppress(TimeoutError):
            return _LOOP.run(self._next(seconds))
        return None

    async def _next(self, seconds: float | None) -> LiveUpdate | None:
        async with asyncio.timeout(seconds):
            return await anext(self._stream, None)
