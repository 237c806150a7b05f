"""Where sentences end in a text that is still being written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_CLOSING = "\"'”’»«›)]}」』）】"
_END = re.compile(rf"(?P<wide>[。！？｡]+[{re.escape(_CLOSING)}]*)|(?P<spaced>[.!?…؟۔।]+[{re.escape(_CLOSING)}]*)(?=\s)|(?P<line>\n\s*)")
_CLAUSE = re.compile(r"[;:,،；：，、–—]+\s*")
_ORDINALS = frozenset("bs cs da de et fi hr hu is lv nb nn no sk sl sr tr".split())
"""Languages in which a number and a full stop are an ordinal ("3. Mai")."""
_ABBREVIATIONS = frozenset(
    "approx ca cf dr ed eds eg fig figs gen gov hon ie inc jr ltd mr mrs ms mt nr prof resp rev sgt sr st vgl viz vol vs"
    " abb abschn bd bspw bzgl bzw dgl evtl ggf hrsg inkl jh jhd kap mrd sog tel zb zzgl"
    " av chap mgr mlle mm mme ste".split()
)
"""Without those that end sentences as often, such as "etc." and "No."."""

_LONGEST_WORD = 64
"""Characters before a full stop that are looked at."""


@dataclass(frozen=True)
class Sentences:
    """Ends of sentences, decided by what follows them, so that they never move when more is written.

    A sentence ends behind . ! ? … or their like in other scripts, with the quotation marks and brackets that close there, where white space and then no
    small letter follows; behind 。！？ whatever follows; and at the end of a line. A full stop ends none behind an abbreviation, behind a single letter, and
    behind a number where `language` (a BCP 47 tag, "" for none) writes ordinals so.
    """

    language: str = ""

    def end(self, text: str) -> tuple[int, int] | None:
        """Where the first sentence of a text ends, and where the next one begins; None where that is not yet to be seen."""
        for match in _END.finditer(text):
            end = match.end()
            if match["line"]:
                if text[: match.start()].strip():
                    return match.start(), end
                continue
            after = re.compile(r"\s*").match(text, end)
            begin = after.end() if after else end
            if match["wide"] and end < len(text):
                return end, begin
            if begin == len(text) and "\n" not in text[end:]:
                return None  # what follows decides
            if "\n" in text[end:begin] or not (text[begin].islower() or self._goes_on(text, match)):
                return end, begin
        return None

    def end_within(self, window: str, is_rest: bool, fits: Callable[[str], bool], translated: int = 0) -> tuple[int, int] | None:
        """`end`, of a sentence that a model can read whole, as `fits` says, or else where it is cut.

        window      the beginning of the text, beyond which no sentence goes; `is_rest` says that it is all of it.
        translated  characters of which something was committed, so that it is cut behind them; 0 for none. Else it is cut behind a clause.
        """
        place = self.end(window)
        if place is not None and fits(window[: place[0]]):
            return place
        if is_rest and fits(window.rstrip()):
            return None
        low, limit = 1, len(window)
        while low < limit:  # the longest beginning that fits
            middle = (low + limit + 1) // 2
            low, limit = (middle, limit) if fits(window[:middle]) else (low, middle - 1)
        end = translated if 0 < translated <= limit else self.clause(window, limit)
        return end, end

    def clause(self, text: str, limit: int) -> int:
        """Where the last clause within the first `limit` characters of a text ends: behind a mark, else a word; at `limit` where there is neither."""
        marks = [match.end() for match in _CLAUSE.finditer(text, 0, limit) if not (text[: match.start()][-1:].isdigit() and text[match.end() :][:1].isdigit())]
        if marks and marks[-1] >= limit // 2:
            return marks[-1]
        space = max(text.rfind(blank, 1, limit) for blank in " \t\u00a0\u3000")
        return space if space > 0 else limit

    def _goes_on(self, text: str, match: re.Match[str]) -> bool:
        """Whether a mark that is followed by no small letter ends no sentence all the same."""
        if match["spaced"] != ".":
            return False
        word = re.split(r"[\s(\[\"'„“«]", text[max(0, match.start() - _LONGEST_WORD) : match.start()])[-1]
        if word.isdigit():
            return self.language.partition("-")[0] in _ORDINALS
        return len(word) == 1 and word.isalpha() or word.replace(".", "").lower() in _ABBREVIATIONS or re.fullmatch(r"(\w\.)+\w", word) is not None
