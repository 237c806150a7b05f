"""What `cvmk stream` does: text from somewhere, through a server or a model here, to somewhere."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from cvmk.cli._live_input import Typed, each_key, from_descriptor, from_keyboard, from_text, tells_keys
from cvmk.cli._live_view import Lines, Records, Screen, View
from cvmk.cli._streams import need_open, read_whole
from cvmk.cli.stream import SERVER
from cvmk.errors import ConfigError, CvmkError, DataError

if TYPE_CHECKING:
    from cvmk.serving.client import AsyncClient
    from cvmk.streaming import Policy, Update

PACE = 150.0
_WRONG = ("INVALID_ARGUMENT", "NOT_FOUND", "UNAUTHENTICATED", "PERMISSION_DENIED", "FAILED_PRECONDITION", "UNIMPLEMENTED")
"""Statuses of what the command line asked for, and not of what became of it."""

Feed = Callable[["LiveText"], Awaitable[None]]


class LiveText(Protocol):
    """A text that grows: a stream of the service, or of a model in this process."""

    connected: bool

    @property
    def begin(self) -> int: ...
    async def append(self, text: str) -> None: ...
    async def replace(self, from_char: int, text: str) -> None: ...
    async def close(self) -> None: ...
    def __aiter__(self) -> AsyncIterator[Update]: ...


def follow(arguments: argparse.Namespace, policy: Policy) -> None:
    """The whole text of the command line. Raises CvmkError."""
    with contextlib.ExitStack() as stack:
        feed, view = _feed_and_view(arguments, stack)
        stack.enter_context(view)
        asyncio.run((_there if arguments.model_folder is None else _here)(arguments, policy, feed, view))


def _feed_and_view(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Feed, View]:
    """Where the text comes from, and where its translation goes."""
    typed = Typed()
    typing = arguments.file is None and sys.stdin is not None and sys.stdin.isatty() and tells_keys()
    view: View = Records() if arguments.json else Screen(typed if typing else None) if Screen.fits() else Lines()
    if arguments.file is not None:
        text, _ = read_whole(arguments.file)
        return from_text(text, PACE if arguments.wpm is None else arguments.wpm), view
    need_open(sys.stdin, "input", "open it, or give --file FILE")
    if typing and isinstance(view, Screen):
        stack.enter_context(each_key(sys.stdin.fileno()))
        return from_keyboard(sys.stdin.fileno(), typed, view.refresh), view
    return from_descriptor(sys.stdin.fileno()), view


# -- who translates -----------------------------------------------------------------------------------------------------------------------
async def _here(arguments: argparse.Namespace, policy: Policy, feed: Feed, view: View) -> None:
    from cvmk.cli._live_local import LocalText
    from cvmk.inference import Translator
    from cvmk.streaming import Sentences, Stream

    translator = Translator(arguments.model_folder)
    source = (translator.info.get("languages") or {}).get("source") or "" if arguments.source == "auto" else arguments.source
    stream = Stream(translator, policy, sentences=Sentences(source), whole_words=not arguments.partial_words, beam_size=arguments.beam_size or 1)
    view.begin(f"{arguments.model_folder}, in this process")
    async with LocalText(stream) as text:
        await _follow(text, feed, view)


async def _there(arguments: argparse.Namespace, policy: Policy, feed: Feed, view: View) -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its log lines would stand among the translation
    try:
        from cvmk.serving.client import NoServerError
        from cvmk.serving.errors import ServiceError
    except ImportError as error:
        raise ConfigError(f"asking a server needs packages that are not installed ({error.name}): pip install 'cvmk[serve]', or give --model-folder") from error
    options = {"source": arguments.source, "target": arguments.target or "", "model": arguments.model or "", "beam_size": arguments.beam_size}
    options |= {"policy": policy, "priority": arguments.priority or "normal", "partial_words": arguments.partial_words}
    try:
        await _greet(arguments)
        async with _client(arguments) as client, client.stream(**options) as stream:
            view.begin(f"{stream.model or 'models'} at {arguments.server or SERVER}, into {stream.target}", stream)
            await _follow(stream, feed, view)
    except NoServerError as error:
        remedy = "" if error.there else ": start one by `cvmk serve`, name another by --server, or give --model-folder to do without"
        raise DataError(f"{error}{remedy}") from error
    except ServiceError as error:
        kind: type[CvmkError] = ConfigError if error.status.name in _WRONG else DataError
        raise kind(f"the server at {arguments.server or SERVER} says: {error}") from error


async def _greet(arguments: argparse.Namespace) -> None:
    """Raises ServiceError where no server answers: one that was never there is not waited for."""
    from cvmk.serving.client import Retry

    async with _client(arguments, retry=Retry(tries=1), timeout=10.0) as client:
        await client.models()


def _client(arguments: argparse.Namespace, **options: Any) -> AsyncClient:
    from cvmk.serving.client import AsyncClient, Tls

    files = {name: getattr(arguments, name) for name in ("authority", "certificate", "private_key", "server_name")}
    tls = Tls(**files) if arguments.tls or any(files.values()) else None
    token = None
    if arguments.token_file is not None:
        text, name = read_whole(arguments.token_file)
        token = text.strip()
        if not token or len(token.split()) != 1:
            raise ConfigError(f"{name} has {len(token.split())} words, and a token is one: write the token alone into the file")
    return AsyncClient(arguments.server or SERVER, token=token, tls=tls, **options)


# -- the text and its translation ---------------------------------------------------------------------------------------------------------
async def _follow(stream: LiveText, feed: Feed, view: View) -> None:
    """Until all of the text has been translated. What came before a fault of the text is translated before the fault is raised."""
    feeder, watcher = asyncio.create_task(_fed(stream, feed)), asyncio.create_task(_watch(stream, view))
    try:
        async for update in stream:
            view.show(update)
        await feeder
    finally:
        feeder.cancel()
        watcher.cancel()
        await asyncio.gather(feeder, watcher, return_exceptions=True)


async def _fed(stream: LiveText, feed: Feed) -> None:
    try:
        await feed(stream)
    finally:
        await stream.close()


async def _watch(stream: LiveText, view: View) -> None:
    """Shows where the server goes away and comes back."""
    connected = True
    while True:
        if stream.connected != connected:
            connected = stream.connected
            view.refresh()
        await asyncio.sleep(0.2)
