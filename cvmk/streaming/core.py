"""What a stream of text does, without doing any translating: it says which translation it wants, and what has changed for a reader once it has it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from cvmk.inference.options import FIRST_PIECE
from cvmk.inference.translator import Translation, Translator
from cvmk.streaming.policy import Policy, View
from cvmk.streaming.sentences import Sentences
from cvmk.validation.scripts import complete_words, written_words

_ENDS = " .!?…。！？｡؟۔।"


@dataclass(frozen=True)
class Update:
    """What has changed for a reader of the translation.

    Of sentence `segment`, from 0: `committed` goes behind what was committed of it before, for good; `tentative` takes the place of the last tentative text.
    `deleted` counts the characters of what was to be seen that a reader has to take back before the new ones are written. `revision` counts the updates
    of the stream, from 1. `source_read` is how many characters of the stream's text the translation is of, and `begin` where the sentence begins in it.
    `final` says that the sentence has ended. `pieces` are those that `committed` was made of while the sentence went on, with which a stream that
    breaks can be taken up again.
    """

    segment: int
    revision: int
    committed: str
    tentative: str
    deleted: int
    source_read: int
    final: bool
    begin: int = 0
    pieces: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """A translation that is wanted: of a sentence's `source`, with the pieces `committed` as its beginning. `begun` counts the sentences that were begun, so
    that what an engine keeps of one (`Request.state`) is not used for another. `final` says that the sentence has ended."""

    source: str
    committed: list[int]
    begun: int
    final: bool


Steps = Generator[Wanted | Update, Translation | None, None]
"""Yields what is wanted, for which it is sent what was found, and each update as soon as it is known, for which it is sent None."""


class StreamCore:
    """The state of a stream, between whatever brings the text and whatever translates it; see `Stream`, which drives one.

        core.append("we need a table. ")
        steps = core.advance()              # yields every Wanted, is sent its translation, and yields the updates

    reader is asked at the beginning of each sentence for the model that translates it. `sentences` may be changed between two. `segment` numbers the first
    sentence, and `committed` is what another stream has said of its translation, of these `pieces` of the same model where they are known. Raises ValueError
    where that is longer than the model's translations are.
    """

    def __init__(
        self,
        reader: Callable[[], Translator],
        policy: Policy,
        sentences: Sentences,
        *,
        whole_words: bool = True,
        segment: int = 0,
        committed: str = "",
        pieces: Sequence[int] = (),
    ) -> None:
        self._reader, self._policy, self._whole_words = reader, policy, whole_words
        self.sentences = sentences
        self._revision, self._segment, self._begin, self._begun = 0, segment, 0, 0
        self._source = self._committed = self._seen = self._translated = ""
        self._earlier: deque[tuple[str, ...]] = deque(maxlen=policy.memory)
        self._spelled = (0, "")  # so many characters of what the pieces say are this text
        self._open("")
        if committed:
            self.resume(committed, pieces)

    def resume(self, committed: str, pieces: Sequence[int] = ()) -> None:
        """What another stream has said of the first sentence, before anything is said of it here. Raises ValueError as above."""
        pieces = list(pieces)
        tokenizer = self._model.tokenizer
        sound = all(FIRST_PIECE <= piece < tokenizer.vocab_size for piece in pieces)
        if not pieces or not sound or tokenizer.decode(pieces) != committed:
            pieces = tokenizer.encode(committed)
        if len(pieces) > self._room():
            raise ValueError(f"has {len(pieces)} pieces, and the model has room for {self._room()}: begin the sentence anew without it")
        self._pieces, self._committed = pieces, committed
        self._spelled = (len(tokenizer.decode(pieces)), committed)

    @property
    def source(self) -> str:
        """The text of the sentence that has not ended."""
        return self._source

    @property
    def segment(self) -> int:
        """The number of that sentence."""
        return self._segment

    @property
    def begin(self) -> int:
        """Where it begins, in characters of the whole text."""
        return self._begin

    @property
    def committed(self) -> str:
        """What was committed of its translation."""
        return self._committed

    def append(self, text: str) -> None:
        """More of the text. Raises TypeError for what is no string."""
        self._source += _string(text)

    def replace(self, begin: int, text: str) -> None:
        """`text` instead of everything from character `begin` of the sentence that has not ended; what was committed of its translation stays. Raises
        ValueError for a beginning outside of it, TypeError as `append`."""
        if not 0 <= begin <= len(self._source):
            raise ValueError(
                f"the sentence has {len(self._source)} characters, and cannot be replaced from character {begin} on: those before have been translated"
            )
        self._source = self._source[:begin] + _string(text)

    def reopen(self) -> None:
        """Begin the sentence anew with the model that `reader` gives now, unless something was committed of its translation."""
        if not self._committed:
            self._model, self._begun, self._translated = self._reader(), self._begun + 1, ""
            self._earlier.clear()

    def advance(self, *, end: bool = False) -> Steps:
        """What is due: every sentence that has ended (with `end`, also the last one), and else what has come of the last one. It may be left at a Wanted:
        then that is not done."""
        while (place := self._end()) is not None:
            yield from self._finish(self._source[: place[0]], place[1])
        if end:
            if self._source.strip() or self._committed or self._seen:
                yield from self._finish(self._source, len(self._source))
            return
        read = self._readable()
        if not read and self._seen:
            yield self._take_back()
        elif read and read != self._translated and not self._policy.reads(self._view(())):
            yield from self._revise(read)

    # -- one sentence -----------------------------------------------------------------------------------------------------------------
    def _open(self, source: str) -> None:
        self._model, self._pieces = self._reader(), list[int]()
        self._begun += 1
        self._source, self._committed, self._seen, self._translated, self._spelled = source, "", "", "", (0, "")
        self._earlier.clear()

    def _finish(self, text: str, begin: int) -> Steps:
        """The whole translation of a sentence, and a new one that begins at character `begin` of the text."""
        update = None
        if text.strip() or self._committed or self._seen:
            found = yield Wanted(text.strip(), self._pieces, self._begun, True)
            assert found is not None
            update = self._say(found, len(text), final=True)
            yield update  # before another model is asked for, which there may not be
        rest = self._source[begin:]
        self._begin += begin
        self._segment += update is not None
        self._open(rest)

    def _revise(self, read: str) -> Steps:
        before = self._seen
        found = yield Wanted(read, self._pieces, self._begun, False)
        assert found is not None
        update = self._say(found, len(read), final=False)
        self._translated = read
        if update.committed or update.tentative != before:
            yield update
        else:
            self._revision -= 1  # nobody hears of it

    def _take_back(self) -> Update:
        """Nothing that could be translated is left of the sentence."""
        deleted, self._seen, self._translated = len(self._seen), "", ""
        self._earlier.clear()
        self._revision += 1
        return Update(self._segment, self._revision, "", "", deleted, self._begin, False, self._begin)

    def _say(self, found: Translation, read: int, final: bool) -> Update:
        text, tokens, pieces = self._spell(found.text), found.tokens, len(self._pieces)
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
        return Update(self._segment, self._revision, delta, self._seen, deleted, self._begin + read, final, self._begin, tuple(self._pieces[pieces:]))

    def _commit(self, text: str, tokens: list[int], ends: list[int]) -> str:
        """Commits pieces up to the last of these ends of words at which pieces end too; returns their text."""
        tokenizer = self._model.tokenizer
        while ends and ends[-1] > len(self._committed):
            low, high = len(self._pieces), min(len(tokens), self._room())
            while low < high:  # the fewest pieces that say so much
                middle = (low + high) // 2
                if len(self._spell(tokenizer.decode(tokens[:middle]))) < ends[-1]:
                    low = middle + 1
                else:
                    high = middle
            said = self._spell(tokenizer.decode(tokens[:low]))
            if said == text[: ends[-1]] and not said.endswith("\ufffd"):  # a character whose other bytes may come
                self._pieces = tokens[:low]
                return said
            ends = ends[:-1]
        return self._committed

    def _spell(self, text: str) -> str:
        """What the pieces say, behind what was committed elsewhere, which they may say otherwise."""
        length, committed = self._spelled
        return committed + text[length:]

    # -- the source -------------------------------------------------------------------------------------------------------------------
    def _view(self, words: tuple[str, ...]) -> View:
        return View(len(written_words(self._readable())), len(written_words(self._committed)), words, tuple(self._earlier))

    def _readable(self) -> str:
        """What can be translated."""
        return self._source[: complete_words(self._source)] if self._whole_words else self._source.rstrip()

    def _end(self) -> tuple[int, int] | None:
        """Where the sentence ends and the next one begins, if that is to be seen, or where it is cut."""
        window = self._source[: window_of(self._room())]
        translated = len(self._translated) if self._committed else 0
        return self.sentences.end_within(window, len(window) == len(self._source), self._fits, translated)

    def _fits(self, text: str) -> bool:
        return len(self._model.tokenizer.encode(text)) <= self._room()

    def _room(self) -> int:
        return room_of(self._model)


def room_of(model: Translator) -> int:
    """Pieces of a sentence."""
    return max(1, model.engine.max_length - 2)


def window_of(room: int) -> int:
    """Characters beyond which no sentence goes, whatever they are."""
    return 32 * room


def _string(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"a text grows by strings, and {type(text).__name__} was given")
    return text
