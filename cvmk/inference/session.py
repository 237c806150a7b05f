"""A text that grows while it is translated: speech that is recognised, a message that is typed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from cvmk.inference.engine import Request, check_pieces
from cvmk.inference.options import SearchOptions
from cvmk.inference.translator import Translation, Translator


class Session:
    """Translates a source again and again while it grows, with what was committed of its translation as a fixed beginning.

        with translator.session(beam_size=2) as session:
            session.append("we need a table")
            print(session.translate().text)
            session.commit(session.translate().tokens[:2])      # these are said, and stay
            session.append(" for two people")
            print(session.translate().text)

    Where the model's encoder is causal (`model.encoder_direction`) and the native engine runs it, only new pieces of the source are encoded, and the
    result is that of encoding it anew; else the whole source is. (Where the source's end is revised, a recurrent encoder begins up to 31 pieces
    before it.) The committed pieces are read at once, in one step. `options` are those of `SearchOptions`. One thread at a time may use a session
    (RuntimeError).
    """

    def __init__(self, translator: Translator, **options: Any) -> None:
        self._translator, self._options = translator, SearchOptions(**options)
        self._state = translator.engine.open_source() if hasattr(translator.engine, "open_source") else None
        self._closed = False
        self.source, self.committed = "", list[int]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give its memory back."""
        self._state, self._closed = None, True

    @property
    def nbytes(self) -> int:
        """Bytes that it holds between two translations."""
        engine: Any = self._translator.engine
        return engine.source_bytes() if self._state is not None else 0

    @property
    def kept(self) -> int:
        """How many positions of the source the last translation did not have to encode."""
        return self._state.kept if self._state is not None else 0

    def append(self, text: str) -> None:
        """More of the source; the space between words is its own. Raises RuntimeError for a closed session."""
        self._check_open()
        if not isinstance(text, str):
            raise TypeError(f"a source grows by strings, and {type(text).__name__} was given")
        self.source += text

    def commit(self, tokens: Sequence[int]) -> None:
        """These pieces of the translation are said: all that follow begin with them. Raises ValueError where they do not begin with
        what was committed before, ConfigError where the model has no such pieces or no room for them."""
        tokens = list(tokens)
        if tokens[: len(self.committed)] != self.committed:
            raise ValueError(f"the first {len(self.committed)} of the {len(tokens)} pieces are not those that were committed: what was said stays")
        translator = self._translator
        check_pieces((), tokens, self._options, translator.engine.max_length, translator.tokenizer.vocab_size)
        self.committed = tokens

    def translate(self) -> Translation:
        """The translation of the source so far. Raises DataError for one that is too long, RuntimeError for a closed session."""
        self._check_open()
        translator = self._translator
        source = translator.encode(self.source)
        if not source:
            return translator.decode([])
        engine: Any = translator.engine
        if self._state is None:
            return translator.decode(engine.search([source], self._options, [self.committed])[0])
        return translator.decode(engine.search_one(Request(None, source, self._options, self.committed, state=self._state)))

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the session is closed: open another one")
