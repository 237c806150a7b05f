"""Which of the served languages a text is in: py3langid, asked for these alone, and a decision that stays within a session."""

from __future__ import annotations

import copy
import functools
import logging
import re
import threading
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

from cvmk.config.languages import language_tag
from cvmk.errors import ConfigError
from cvmk.serving.answers import Language
from cvmk.serving.errors import invalid

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
AUTO = "auto"
"""In the place of a source language: it is to be found out."""
SHORT = 40
"""Characters of a text that goes by its request (as LibreTranslate does)."""
_READ = 4096  # characters that are looked at: a millisecond's work, and more of them change nothing
_WORDS, _LETTERS = 3, 12  # what a decision needs
_OTHER_WORDS, _OTHER_PROBABILITY = 5, 0.9  # what another decision needs
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"
)  # Thai, Lao, …, kana, ideographs
_LABELS = {"nb": "no", "fil": "tl", "ki": "kik", "gn": "gug", "kok": "gom"}
"""What py3langid calls languages otherwise than BCP 47."""
_SCRIPTS = {"Latn": "LATIN ", "Cyrl": "CYRILLIC ", "Arab": "ARABIC ", "Deva": "DEVANAGARI ", "Hebr": "HEBREW ", "Beng": "BENGALI ", "Guru": "GURMUKHI "}
"""What the names of a script's characters begin with."""


def tag_of(field: str, code: str) -> str:
    """The language tag that a client's code stands for. Raises ServiceError, which names the field."""
    try:
        return language_tag(code)
    except ValueError as error:
        raise invalid(field, str(error)) from error


def found_for_each(texts: Sequence[str], find: Callable[[str], T]) -> list[T]:
    """What `find` finds for each text of a request, but for a short one what it finds for all of them together: alone it says too little."""
    whole = find("\n".join(texts))
    return [whole if len(texts) == 1 or len(text) <= SHORT else find(text) for text in texts]


class Detector:
    """Ranks the languages that are served. Making one costs nothing; the first text costs half a second and 90 MB once a process (`load`).

    languages   BCP 47 tags, the preferred ones first. A tag goes by its language ("pt-BR" by "pt", "nb" by "no"). Of several of one language the script of the
                text decides ("zh-Hans" or "zh-Hant", "sr-Latn" or "sr-Cyrl"), and where that says nothing ("pt-BR" or "pt-PT") the first one is found always.

    A language that py3langid does not know ("hsb") is left out: it is never found, and its texts are taken for another one. Where one language is served,
    every text is in it.
    """

    def __init__(self, languages: Collection[str]) -> None:
        self._languages = tuple(dict.fromkeys(languages))
        self._lock = threading.Lock()
        self._groups: dict[str, dict[str, str]] = {}  # py3langid's label -> script -> tag
        self._identifier: Any = None

    @property
    def is_single(self) -> bool:
        """Whether there is one language, in which every text is."""
        return len(self._languages) == 1

    @property
    def loaded(self) -> bool:
        """Whether `rank` answers at once."""
        return self._identifier is not None or self.is_single

    def load(self) -> None:
        """Read py3langid's model, where it has not been: for a thread beside the event loop. Raises ConfigError where the package is not installed."""
        with self._lock:
            if not self.loaded:
                whole = _identifier()
                self._groups, unknown = _groups(self._languages, set(whole.labels))
                if unknown:
                    _LOG.warning("the languages %s are never detected: py3langid does not know them", ", ".join(unknown))
                restricted = copy.copy(whole)
                if self._groups:
                    restricted.set_languages(list(self._groups))
                self._identifier = restricted

    def rank(self, text: str) -> list[Language]:
        """The languages that `text` may be in, the likeliest first; their probabilities add up to 1. All are alike for a text without letters.

        Raises ServiceError where no served language is one that can be found.
        """
        if self.is_single:
            return [Language(self._languages[0], 1.0)]
        self.load()
        if not self._groups:
            raise invalid("source", "cannot be found out: none of the served languages is one that the detector knows; name it")
        text = text[:_READ]
        if any(map(str.isalpha, text)):
            scores = dict(self._identifier.rank(text))
        else:
            scores = dict.fromkeys(self._groups, 1.0)
        total = sum(scores.values())
        found = [Language(_of_script(tags, text), min(scores[label] / total, 1.0)) for label, tags in self._groups.items()]
        return sorted(found, key=lambda language: -language.probability)


class Sticky:
    """The language of one session's text: decided when there are three words or twelve letters, or there is one language alone, and then kept.

    It becomes another only where that has a probability above 0.9 over five words or more: a name or a quotation changes nothing. Two characters of a script
    that writes no spaces count as a word. `language` is a code that the client has given: it stays whatever the text is.
    """

    def __init__(self, detector: Detector, language: str | None = None) -> None:
        self._detector = detector
        self.language: Language | None = None
        """What has been decided; None so far."""
        self._given = language is not None
        if language is not None:
            self.override(language)

    def override(self, code: str) -> None:
        """Take the client's word for it, from now on."""
        self.language, self._given = Language(code, 1.0), True

    def read(self, text: str, *, final: bool = False) -> Language | None:
        """The language after `text`, the open sentence so far; None while that is undecided.

        A `final` text that is too short to decide goes by the best guess, which binds nothing that follows.
        """
        if self._given:
            return self.language
        words, letters = _measure(text[:_READ])
        enough = words >= _WORDS or letters >= _LETTERS or self._detector.is_single
        if self.language is None:
            if not enough and not final:
                return None
            best = self._detector.rank(text)[0]
            if enough:
                self.language = best
            return best
        if words >= _OTHER_WORDS:
            best = self._detector.rank(text)[0]
            if best.code != self.language.code and best.probability > _OTHER_PROBABILITY:
                self.language = best
        return self.language


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid import langid  # 0.4 or later: its model is arrays read with allow_pickle=False; before, it was a pickle
    except ImportError as error:
        raise ConfigError("finding out the language of a text needs py3langid: pip install 'cvmk[serve]', or let clients name it") from error
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def _groups(languages: Iterable[str], labels: Collection[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The served tags by the label of their language and then by script, and those that have no label."""
    import langcodes  # slow to import

    groups: dict[str, dict[str, str]] = {}
    unknown = []
    for tag in languages:
        language = langcodes.Language.get(tag)
        code = language.language or tag
        wider = langcodes.standardize_tag(code, macro=True)
        if label := next((name for name in (code, _LABELS.get(code), wider, _LABELS.get(wider)) if name in labels), None):
            groups.setdefault(label, {}).setdefault(language.maximize().script or "", tag)
        else:
            unknown.append(tag)
    return groups, unknown


def _of_script(tags: dict[str, str], text: str) -> str:
    """The tag of the script that most of the text is in; the first where none is."""
    return tags[max(tags, key=lambda script: _letters_of(script, text))] if len(tags) > 1 else next(iter(tags.values()))


def _letters_of(script: str, text: str) -> int:
    if script in ("Hans", "Hant"):  # characters that only the one's character set has
        own, other = ("gb2312", "big5") if script == "Hans" else ("big5", "gb2312")
        return sum(_in(own, letter) and not _in(other, letter) for letter in text)
    prefix = _SCRIPTS.get(script)
    return sum(unicodedata.name(letter, "").startswith(prefix) for letter in text) if prefix else 0


@functools.lru_cache(8192)
def _in(encoding: str, letter: str) -> bool:
    try:
        return bool(letter.encode(encoding))
    except UnicodeEncodeError:
        return False


def _measure(text: str) -> tuple[int, int]:
    """Words and letters; what has no letter (a number, a smiley) is no word."""
    unspaced = len(_UNSPACED.findall(text))
    words = sum(any(map(str.isalpha, word)) for word in _UNSPACED.sub(" ", text).split()) + unspaced // 2
    return words, sum(map(str.isalpha, text))
