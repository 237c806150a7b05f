"""Where the translation of `cvmk stream` goes: a terminal, lines of finished sentences, or records."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any, Self

from cvmk.text.lines import one_line

if TYPE_CHECKING:
    from rich.text import Text

    from cvmk.cli._live_input import Typed
    from cvmk.streaming import Update


_FIELDS = ("segment", "revision", "committed", "tentative", "deleted", "source_read", "begin", "final", "queue_us", "decode_us")
"""Of an update, in a record; the last two where a server translates."""

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class View:
    """Shows updates, inside `with`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, what: str, stream: Any = None) -> None:
        """`what` translates. `stream` says by `connected` whether it does now."""

    def show(self, update: Update) -> None:
        raise NotImplementedError

    def refresh(self) -> None:
        """Something else is to be seen: what was typed, whether the server is there."""


class Lines(View):
    """Every sentence when it is finished, a line each, in UTF-8."""

    def __init__(self) -> None:
        self._committed = ""

    def show(self, update: Update) -> None:
        self._committed += update.committed
        if update.final:
            _write(one_line(self._committed))
            self._committed = ""


class Records(View):
    """Every update as a JSON object a line, in UTF-8."""

    def show(self, update: Update) -> None:
        language = getattr(update, "language", None)
        record = {name: getattr(update, name) for name in _FIELDS if hasattr(update, name)} | ({"language": language.code} if language else {})
        _write(json.dumps(record, ensure_ascii=False))


class Screen(View):
    """A terminal: finished sentences, and below them the present one, rewritten in place: what is committed plain, what may still change dim. What is typed
    (where that is given) stands above its translation."""

    def __init__(self, typed: Typed | None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._typed = typed
        self._cursor = "▏" if _spells("▏") else "_"
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, transient=True)
        self._committed = self._tentative = ""
        self._stream: Any = None

    @staticmethod
    def fits() -> bool:
        """Whether standard output is a terminal on which lines can be rewritten."""
        if not sys.stdout.isatty():
            return False
        from rich.console import Console

        console = Console()
        return console.is_terminal and not console.is_dumb_terminal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()
        if self._committed:  # what was said of a sentence that has not ended
            self._print(one_line(self._committed))

    def begin(self, what: str, stream: Any = None) -> None:
        self._stream = stream
        hint = "; type, and end with Ctrl-D" if self._typed is not None else ""
        self._print(f"{what}{hint}", "dim")
        self._live.start()
        self.refresh()

    def show(self, update: Update) -> None:
        self._committed, self._tentative = self._committed + update.committed, update.tentative
        if not update.final:
            return self.refresh()
        said, self._committed = one_line(self._committed), ""
        source = self._typed.translated(update.source_read) if self._typed is not None else ""
        self.refresh()
        if source:
            self._print(source, "bold")
        self._print(said)

    def refresh(self) -> None:
        self._live.update(self._present(), refresh=True)

    def _present(self) -> Text:
        """The sentence that has not ended."""
        from rich.text import Text

        parts = Text()
        if self._typed is not None:
            parts.append(f"{self._typed.text.lstrip()}{self._cursor}\n", "bold")
        parts.append(_harmless(self._committed))
        parts.append(_harmless(self._tentative), "dim")
        if self._stream is not None and not self._stream.connected:
            parts.append(" (the server is gone: looking for it)", "dim italic")
        return parts

    def _print(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self._console.print(Text(_harmless(text), style))


def _harmless(text: str) -> str:
    """Without what a terminal would take for a command."""
    return _CONTROL.sub("\ufffd", text)


def _spells(text: str) -> bool:
    """Whether standard output has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _write(line: str) -> None:
    sys.stdout.buffer.write(f"{line}\n".encode())
    sys.stdout.buffer.flush()
