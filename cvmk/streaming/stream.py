"""A translation that follows a text while it is written."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Self

from cvmk.inference.session import Session
from cvmk.inference.translator import Translator
from cvmk.streaming.policy import Policy, Retranslation, View
from cvmk.streaming.sentences import Sentences
from cvmk.validation.scripts import complete_words, written_words

_ENDS = " .!?…。！？｡؟۔।"


@dataclass(frozen=True)
class Update:
    """What has changed for a reader of the translation.

    Of sentence `segment`, from 0: `committed` goes behind what was committed of it before, for good; `tentative` takes the place of the last tentative text.
    `deleted` counts the characters of what was to be seen that a reader has to take back before the new ones are written. `revision` counts the updates
    of the stream, from 1. `source_read` is how many characters of the stream's text the translation is of. `final` says that the sentence has ended.
    """

    segment: int
    revision: int
    committed: str
    tentative: str
    deleted: int
    source_read: int
    final: bool


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
        self._policy, self._sentences, self._whole_words = policy or Retranslation(), sentences or Sentences(), whole_words
        self._revision = self._segment = self._begin = 0
        self._closed = False
        self._open("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()
        self._closed = True

    @property
    def source(self) -> str:
        """The text of the sentence that has not ended."""
        return self._source

    def append(self, text: str) -> list[Update]:
        """More of the text. Raises RuntimeError for a closed stream, TypeError for what is no string."""
        self._check(text)
        return self._go_on(self._source + text)

    def replace(self, begin: int, text: str) -> list[Update]:
        """`text` instead of everything from character `begin` of the sentence that has not ended; what was committed of its translation stays. Raises
        ValueError for a beginning outside of it, else as `append`."""
        self._check(text)
        if not 0 <= begin <= len(self._source):
            raise ValueError(
                f"the sentence has {len(self._source)} characters, and cannot be replaced from character {begin} on: those before have been translated"
            )
        return self._go_on(self._source[:begin] + text)

    def end_segment(self) -> list[Update]:
        """The sentence ends here, whatever it ends with. No update where there is none."""
        self._check("")
        source = self._source
        return self._finish(source, len(source)) if source.strip() else []

    def close(self) -> list[Update]:
        """The text ends here: the rest of its translation. The stream cannot be used any more."""
        if self._closed:
            return []
        updates = self.end_segment()
        self.__exit__()
        return updates

    # -- one sentence -----------------------------------------------------------------------------------------------------------------
    def _open(self, source: str) -> None:
        self._session: Session = self._translator.session(**self._options)
        self._source, self._committed, self._seen, self._translated = source, "", "", ""
        self._earlier: deque[tuple[str, ...]] = deque(maxlen=self._policy.memory)

    def _go_on(self, source: str) -> list[Update]:
        updates: list[Update] = []
        self._source = source
        while (place := self._end()) is not None:
            end, begin = place
            updates += self._finish(self._source[:end], begin)
        read = self._readable()
        if read and read != self._translated and not self._policy.reads(self._view(())):
            updates += self._revise(read)
        return updates

    def _finish(self, text: str, begin: int) -> list[Update]:
        """The whole translation of a sentence, and a new one that begins at character `begin` of the text."""
        rest = self._source[begin:]
        self._source = text
        update = self._say(self._translate(text.strip()), len(text), final=True) if text.strip() or self._committed else None
        self._session.close()
        self._begin += begin
        self._segment += update is not None
        self._open(rest)
        return [update] if update is not None else []

    def _revise(self, read: str) -> list[Update]:
        before = self._seen
        update = self._say(self._translate(read), len(read), final=False)
        self._translated = read
        return [update] if update.committed or update.tentative != before else []

    def _translate(self, text: str) -> tuple[str, list[int]]:
        self._session.source = text
        found = self._session.translate()
        return found.text, found.tokens

    def _say(self, found: tuple[str, list[int]], read: int, final: bool) -> Update:
        text, tokens = found
        before = self._committed + self._seen
        if not final and len(text) > len(self._committed):
            text = self._committed + text[len(self._committed) :].rstrip(_ENDS)  # the end of what has been read ends no sentence
        places = written_words(text)
        if final:
            committed, shown = text, text
        else:
            words = tuple(text[first:last] for first, last in places)
            write = self._policy.writes(self._view(words))
            committed = self._commit(text, tokens, [last for _, last in places][: max(0, write.commit)])
            shown = text[: places[min(write.show, len(places)) - 1][1]] if write.show > 0 and places else ""
            self._earlier.append(words)
        delta = committed[len(self._committed) :]
        self._committed = committed
        self._seen = shown[len(committed) :]
        self._revision += 1
        now = self._committed + self._seen
        deleted = len(before) - len(commonprefix([before, now]))
        return Update(self._segment, self._revision, delta, self._seen, deleted, self._begin + read, final)

    def _commit(self, text: str, tokens: list[int], ends: list[int]) -> str:
        """Commits pieces up to the last of these ends of words at which pieces end too; returns their text."""
        tokenizer = self._translator.tokenizer
        while ends and ends[-1] > len(self._committed):
            low, high = len(self._session.committed), min(len(tokens), self._room())
            while low < high:  # the fewest pieces that say so much
                middle = (low + high) // 2
                if len(tokenizer.decode(tokens[:middle])) < ends[-1]:
                    low = middle + 1
                else:
                    high = middle
            said = tokenizer.decode(tokens[:low])
            if said == text[: ends[-1]] and not said.endswith("\ufffd"):  # a character whose other bytes may come
                self._session.commit(tokens[:low])
                return said
            ends = ends[:-1]
        return self._committed

    # -- the source -------------------------------------------------------------------------------------------------------------------
    def _view(self, words: tuple[str, ...]) -> View:
        return View(len(written_words(self._readable())), len(written_words(self._committed)), words, tuple(self._earlier))

    def _readable(self) -> str:
        """What can be translated."""
        return self._source[: complete_words(self._source)] if self._whole_words else self._source.rstrip()

    def _window(self) -> int:
        """Characters beyond which no sentence goes, whatever they are."""
        return 32 * self._room()

    def _end(self) -> tuple[int, int] | None:
        """Where the sentence ends and the next one begins, if that is to be seen, or where it is cut."""
        window = self._source[: self._window()]
        place = self._sentences.end(window)
        if place is not None and self._fits(window[: place[0]]):
            return place
        if len(window) == len(self._source) and self._fits(window.rstrip()):
            return None
        return self._cut(window)

    def _cut(self, text: str) -> tuple[int, int]:
        """Where a sentence that the model cannot read whole is cut: behind a clause, or behind all that was translated where something was committed."""
        low, limit = 1, len(text)
        while low < limit:  # the longest beginning that fits
            middle = (low + limit + 1) // 2
            low, limit = (middle, limit) if self._fits(text[:middle]) else (low, middle - 1)
        end = len(self._translated) if self._committed and 0 < len(self._translated) <= limit else self._sentences.clause(text, limit)
        return end, end

    def _fits(self, text: str) -> bool:
        return len(self._translator.tokenizer.encode(text)) <= self._room()

    def _room(self) -> int:
        """Pieces of a sentence."""
        return max(1, self._translator.engine.max_length - 2)

    def _check(self, text: object) -> None:
        if self._closed:
            raise RuntimeError("the stream is closed: open another one")
        if not isinstance(text, str):
            raise TypeError(f"a text grows by strings, and {type(text).__name__} was given")
