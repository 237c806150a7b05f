"""A translation that follows a text while it is written."""

from __future__ import annotations

import contextlib
from typing import Any, Self

from cvmk.inference.session import Session
from cvmk.inference.translator import Translation, Translator
from cvmk.streaming.core import Steps, StreamCore, Update, Wanted
from cvmk.streaming.policy import Policy, Retranslation
from cvmk.streaming.sentences import Sentences


class Stream:
    """Translates a text that grows, sentence by sentence, and says as much of it as a policy allows.

        with Stream(Translator("model"), LocalAgreement()) as stream:
            for update in stream.append("we need a table"):
                print(update.committed, update.tentative)
            stream.close()

    policy       when to translate and what to say (`Retranslation` where there is none).
    sentences    where sentences end.
    whole_words  whether a last word that no space follows is left out until one does, or the sentence ends.
    options      of `SearchOptions`; beams, penalties and the like, for every translation.

    Committed text never changes, and for `Retranslation` what is committed is what `Translator.translate` makes of the sentence. One thread at a time may use a
    stream.
    """

    def __init__(
        self, translator: Translator, policy: Policy | None = None, *, sentences: Sentences | None = None, whole_words: bool = True, **options: Any
    ) -> None:
        self._translator, self._options = translator, options
        self._core = StreamCore(lambda: translator, policy or Retranslation(), sentences or Sentences(), whole_words=whole_words)
        self._session: Session = translator.session(**options)
        self._begun = 1
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()
        self._closed = True

    @property
    def source(self) -> str:
        """The text of the sentence that has not ended."""
        return self._core.source

    @property
    def begin(self) -> int:
        """Where it begins, in characters of the whole text."""
        return self._core.begin

    def append(self, text: str) -> list[Update]:
        """More of the text. Raises RuntimeError for a closed stream, TypeError for what is no string."""
        self._check()
        self._core.append(text)
        return self._drive(self._core.advance())

    def replace(self, begin: int, text: str) -> list[Update]:
        """`text` instead of everything from character `begin` of the sentence that has not ended; what was committed of its translation stays. Raises
        ValueError for a beginning outside of it, else as `append`."""
        self._check()
        self._core.replace(begin, text)
        return self._drive(self._core.advance())

    def end_segment(self) -> list[Update]:
        """The sentence ends here, whatever it ends with. No update where there is none."""
        self._check()
        return self._drive(self._core.advance(end=True))

    def close(self) -> list[Update]:
        """The text ends here: the rest of its translation. The stream cannot be used any more."""
        if self._closed:
            return []
        updates = self.end_segment()
        self.__exit__()
        return updates

    def _drive(self, steps: Steps) -> list[Update]:
        updates: list[Update] = []
        answer = None
        with contextlib.suppress(StopIteration):
            while True:
                step = steps.send(answer)
                if isinstance(step, Update):
                    updates.append(step)
                    answer = None
                else:
                    answer = self._translate(step)
        return updates

    def _translate(self, wanted: Wanted) -> Translation:
        if wanted.begun != self._begun:
            self._session.close()
            self._session, self._begun = self._translator.session(**self._options), wanted.begun
        self._session.source = wanted.source
        self._session.commit(wanted.committed)
        return self._session.translate()

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("the stream is closed: open another one")
