"""How to search for translations, and what a search finds: the one definition of each option, for every engine and every interface."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from cvmk.errors import ConfigError
from cvmk.text.tokenizers import Tokenizer

MAX_BEAM_SIZE = 1024
FIRST_PIECE = len(Tokenizer.SPECIAL_PIECES)
"""Ids below are special: they are no pieces of a translation."""


def _option(default: Any, least: float, most: float | None, help: str) -> Any:
    """An option, its limits (both allowed), and its meaning in one line, which interfaces show."""
    return field(default=default, metadata={"least": least, "most": most, "help": help})


@dataclass(frozen=True)
class SearchOptions:
    """Options of one search. Raises ConfigError, naming the option, for a value of another type or out of range.

    beam_size        hypotheses a sentence, at most MAX_BEAM_SIZE; 1 is greedy search.
    n_best           hypotheses returned a sentence, at most beam_size.
    length_penalty   a hypothesis is scored by sum(log p) / length ** length_penalty, EOS counted in both.
    no_repeat_ngram  no n-gram of this size occurs twice in a translation; 0 = no limit.
    max_length_a, max_length_b   a translation has at most floor(a * source pieces + b) pieces, and what the model's max_length
                     allows; at the limit the sentence is ended, and the end is scored as any other.
    min_length       pieces that a translation has at least, as far as the model's max_length allows.
    repetition_penalty  logits of pieces that the translation has already are divided by it where they are positive and multiplied where
                     negative, before they become probabilities (Keskar et al. 2019); scores are of these probabilities. 1 = none.
    suppressed       ids of pieces that no translation contains. Scores stay the model's own.
    patience         a beam search ends when patience * beam_size hypotheses are finished (Kasai et al. 2022).
    temperature      0: search for the most probable. Above: draw each piece at random, from probabilities sharpened (< 1) or flattened (> 1) by it;
                     the beam_size hypotheses are draws of their own, and scores are the model's probabilities at temperature 1.
    top_k, top_p     draw from the top_k most probable pieces (0: all), and of those from the fewest that have top_p of the probability together
                     (Holtzman et al. 2020).
    seed             of the draws: the same sentence, options and seed give the same draws.
    prefix_bias      0: a request's prefix is what its hypotheses begin with. Above: as long as a hypothesis says what the prefix says, its next piece
                     has (1 - prefix_bias) of its probability, plus prefix_bias for the prefix's next piece (Arivazhagan et al. 2020).
    shortlist        whether to choose only among the pieces that the model's shortlist (`cvmk shortlist`) has for the source: probabilities are of these.
    scores           whether to tell scores. Without them (they are NaN, and none a piece) greedy search computes no probabilities, and is faster.
    alignments       whether to tell how much of the last cross-attention each piece gave to each piece of the source.
    """

    beam_size: int = _option(1, 1, MAX_BEAM_SIZE, "hypotheses a sentence; 1 is greedy search")
    n_best: int = _option(1, 1, None, "hypotheses returned a sentence")
    length_penalty: float = _option(1.0, 0, 50, "scores are divided by length ** X")
    no_repeat_ngram: int = _option(0, 0, None, "no N pieces in a row twice in a translation; 0: no limit")
    max_length_a: float = _option(2.0, 0, None, "a translation has at most A * source pieces + B pieces")
    max_length_b: int = _option(20, 0, None, "see max_length_a")
    min_length: int = _option(1, 0, None, "pieces that a translation has at least")
    repetition_penalty: float = _option(1.0, 0.001, 1000, "logits of pieces that were said already are divided by X, or multiplied where negative; 1: none")
    suppressed: Sequence[int] = field(default=(), metadata={"help": "ids of pieces that no translation contains"})
    patience: float = _option(1.0, 0.001, 1000, "a beam search ends when X * beam size hypotheses are finished")
    temperature: float = _option(0.0, 0, 1000, "0: the most probable; above: draw pieces at random, from probabilities flattened by X")
    top_k: int = _option(0, 0, None, "draw from the K most probable pieces; 0: all")
    top_p: float = _option(1.0, 1e-6, 1, "draw from the fewest pieces that have P of the probability together")
    seed: int = _option(0, 0, 2**63 - 1, "of the draws")
    prefix_bias: float = _option(0.0, 0, 0.999999, "0: a prefix is kept; above: how much a prefix adds to the probability of its pieces")
    shortlist: bool = field(default=False, metadata={"help": "choose only among the pieces of the model's shortlist"})
    scores: bool = field(default=True, metadata={"help": "tell scores; greedy search is faster without"})
    alignments: bool = field(default=False, metadata={"help": "tell the cross-attention of each piece"})

    def __post_init__(self) -> None:
        for option in scalar_options():
            value = getattr(self, option.name)
            if value != option.default or type(value) is not type(option.default):  # most are what they are by default
                self._check_scalar(option)
        for name in ("shortlist", "alignments"):
            if isinstance(value := getattr(self, name), float) or value not in (0, 1):
                raise ConfigError(f"{name} is {value!r}, and must be True or False")
            object.__setattr__(self, name, bool(value))
        if self.n_best > self.beam_size:
            raise ConfigError(f"n_best ({self.n_best}) is more than beam_size ({self.beam_size}): ask for fewer or search with a larger beam")
        self._check_suppressed()

    def _check_scalar(self, option: Field[Any]) -> None:
        whole = isinstance(option.default, int)
        number = checked_number(option.name, getattr(self, option.name), option.metadata["least"], option.metadata["most"], whole)
        object.__setattr__(self, option.name, number)

    def _check_suppressed(self) -> None:
        try:
            ids = tuple(sorted({id.__index__() for id in self.suppressed}))
        except (AttributeError, TypeError):
            raise ConfigError(f"suppressed is {self.suppressed!r}, and must be a list of ids of pieces") from None
        if ids and ids[0] < FIRST_PIECE:
            raise ConfigError(f"suppressed names the special id {ids[0]}: ids of pieces begin at {FIRST_PIECE} (for longer translations set min_length)")
        object.__setattr__(self, "suppressed", ids)

    def limit(self, source_pieces: int, model_max_length: int) -> int:
        """The most pieces of a translation, EOS not counted; BOS takes one of the model's positions."""
        room = model_max_length - 1
        return min(room, max(self.min_length, int(min(self.max_length_a * source_pieces + min(self.max_length_b, room), room))))


def checked_number(name: str, value: Any, least: float, most: float | None = None, whole: bool = True) -> int | float:
    """`value` as a number of Python's. Raises ConfigError, with the name, for what is none, or none from `least` to `most` (None: no limit)."""
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not hasattr(value, "__index__" if whole else "__float__"):
        raise ConfigError(f"{name} is {value!r}, and must be {kind}")
    number: int | float = value.__index__() if whole else float(value)
    if not number >= least or number == math.inf:
        raise ConfigError(f"{name} is {value}, and must be {kind} of at least {least}")
    if most is not None and number > most:
        raise ConfigError(f"{name} is {value}, and must be at most {most}")
    return number


@functools.cache
def scalar_options() -> tuple[Field[Any], ...]:
    """The options that are one number: their names, defaults and, as metadata, `least`, `most` (None: no limit) and `help`."""
    return tuple(option for option in fields(SearchOptions) if "least" in option.metadata)


def option_help(name: str) -> str:
    """The meaning of an option in one line."""
    found: Mapping[str, str] = next(option.metadata for option in fields(SearchOptions) if option.name == name)
    return found["help"]


@dataclass(frozen=True)
class Hypothesis:
    """Pieces without special ids, and the score: sum(log p) / length ** length_penalty with EOS counted; NaN where the options ask for no scores.

    scores     log p of each piece and, where the hypothesis ended, of EOS; none where the options ask for none.
    alignment  where asked for, a row a piece: the weights of the last cross-attention, their mean over the heads, for each piece of the source and EOS.
    """

    tokens: list[int] = field(default_factory=list)
    score: float = 0.0
    scores: Sequence[float] = field(default=(), compare=False)
    alignment: Sequence[Sequence[float]] = field(default=(), compare=False)


BROKEN = Hypothesis([], float("-inf"))
"""What is found where the model's numbers are not finite."""


def final_score(total: float, pieces: int, length_penalty: float) -> float:
    """The score of a hypothesis of so many pieces whose log probabilities, EOS included, sum to `total`."""
    length: float = (pieces + 1) ** length_penalty
    return total / length
