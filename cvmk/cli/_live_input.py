"""Where the text of `cvmk stream` comes from: a file at a pace, a pipe, or the keyboard."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import importlib.util
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from os.path import commonprefix
from typing import Any

from cvmk.cli._streams import STANDARD_INPUT
from cvmk.errors import DataError
from cvmk.files import explained
from cvmk.files.reading import BOM

_BLOCK = 1 << 16
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)?")  # arrows and the like
_END_OF_TEXT, _BACKSPACE, _LINE, _WORD = "\x04", "\x7f\x08", "\x15", "\x17"

Feed = Callable[[Any], Awaitable[None]]


# -- a file -------------------------------------------------------------------------------------------------------------------------------
def from_text(text: str, words_a_minute: float) -> Feed:
    """`text` word by word, each at its time; at 0 words a minute line by line, without waiting."""

    async def feed(stream: Any) -> None:
        if not words_a_minute:
            for line in text.splitlines(keepends=True):
                await stream.append(line)
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        for index, piece in enumerate(pieces(text)):
            await asyncio.sleep(began + index * 60 / words_a_minute - loop.time())
            await stream.append(piece)

    return feed


def pieces(text: str) -> Iterator[str]:
    """The words of a text, each with what stands behind it; joined they are the text."""
    from cvmk.validation.scripts import written_words

    for line in text.splitlines(keepends=True):
        begins = [begin for begin, _ in written_words(line)]
        for begin, end in zip([0, *begins[1:]], [*begins[1:], len(line)], strict=True):
            yield line[begin:end]


# -- standard input -----------------------------------------------------------------------------------------------------------------------
def from_descriptor(descriptor: int) -> Feed:
    """What comes through a file descriptor, as it comes. Raises DataError for what is not UTF-8, after what came before it."""

    async def feed(stream: Any) -> None:
        async for text in _decoded(descriptor):
            await stream.append(text)

    return feed


async def _decoded(descriptor: int) -> AsyncIterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    while True:
        block = await _block(descriptor)
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            yield (error.object[: error.start]).decode()
            place = read - waiting + error.start + 1
            raise DataError(f"{STANDARD_INPUT} is not valid UTF-8 (byte {place}): convert it to UTF-8") from error
        read += len(block)
        if text := text.replace(BOM, ""):
            yield text
        if not block:
            return


async def _block(descriptor: int) -> bytes:
    """What is there, or comes first; nothing at the end. The event loop goes on meanwhile."""
    loop = asyncio.get_running_loop()
    there = asyncio.Event()
    with explained(STANDARD_INPUT, "read"):
        try:
            loop.add_reader(descriptor, there.set)
        except (PermissionError, NotImplementedError):  # a file, which is always there
            return await asyncio.to_thread(os.read, descriptor, _BLOCK)
        try:
            await there.wait()
        finally:
            loop.remove_reader(descriptor)
        try:
            return os.read(descriptor, _BLOCK)
        except OSError:
            if os.isatty(descriptor):  # a terminal that has gone
                return b""
            raise


# -- the keyboard -------------------------------------------------------------------------------------------------------------------------
class Typed:
    """What has been typed, from the end of the last sentence that is translated on; `begin` is its place in the whole text, and what stands before `floor`
    cannot be taken back."""

    def __init__(self) -> None:
        self.begin = self.floor = 0
        self.text = ""
        self.ended = False

    def type(self, text: str) -> None:
        """Characters and keys as a terminal sends them."""
        for key in _ESCAPE.sub("", text):
            kept = max(0, self.floor - self.begin)
            fixed, rest = self.text[:kept], self.text[kept:]
            if key == _END_OF_TEXT:
                self.ended = True
                return
            if key in _BACKSPACE:
                rest = rest[:-1]
            elif key == _WORD:
                rest = re.sub(r"\S*\s*\Z", "", rest)
            elif key == _LINE:
                rest = ""
            elif key in "\r\n":
                rest += "\n"
            elif key == "\t" or key.isprintable():
                rest += " " if key == "\t" else key
            self.text = fixed + rest

    def translated(self, end: int) -> str:
        """A sentence is, up to this character of the whole text; returns it."""
        length = max(0, end - self.begin)
        taken, self.text, self.begin = self.text[:length], self.text[length:], self.begin + length
        return taken.strip()


def from_keyboard(descriptor: int, typed: Typed, echo: Callable[[], None]) -> Feed:
    """The keys of a terminal, inside `each_key`. `echo` is called when `typed` has changed. Ctrl-D ends the text."""

    async def feed(stream: Any) -> None:
        changed = asyncio.Event()

        async def listen() -> None:
            async for text in _decoded(descriptor):
                typed.floor = stream.begin
                typed.type(text)
                echo()
                changed.set()
                if typed.ended:
                    return
            typed.ended = True
            changed.set()

        listener = asyncio.create_task(listen())
        try:
            await _bring(stream, typed, changed)
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)

    return feed


async def _bring(stream: Any, typed: Typed, changed: asyncio.Event) -> None:
    """What is typed comes into the stream, until it ends."""
    begin, sent = 0, ""  # what the stream has been told
    while True:
        await changed.wait()
        changed.clear()
        place = max(begin, typed.begin, stream.begin)
        now, sent, begin = typed.text[place - typed.begin :], sent[place - begin :], place
        common = len(commonprefix([sent, now]))
        ended, shorter, sent = typed.ended, common < len(sent), now
        if shorter:
            await stream.replace(place + common, now[common:])
        elif common < len(now):
            await stream.append(now[common:])
        if ended:
            return


def tells_keys() -> bool:
    """Whether terminals of this system tell every key; elsewhere they tell lines."""
    return importlib.util.find_spec("termios") is not None


@contextlib.contextmanager
def each_key(descriptor: int) -> Iterator[None]:
    """A terminal that tells every key at once and shows none of them; Ctrl-C interrupts as ever. What has been typed already is not lost."""
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
