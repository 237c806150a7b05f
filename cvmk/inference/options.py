"""How to search for translations, and what a search finds. Shared by every engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from cvmk.errors import ConfigError

MAX_BEAM_SIZE = 1024


@dataclass(frozen=True)
class SearchOptions:
    """Options of one search. Raises ConfigError, naming the option, for a value out of range.

    beam_size        hypotheses a sentence, at most MAX_BEAM_SIZE; 1 is greedy search.
    n_best           hypotheses returned a sentence, at most beam_size.
    length_penalty   a hypothesis is scored by sum(log p) / length ** length_penalty, EOS counted in both.
    no_repeat_ngram  no n-gram of this size occurs twice in a translation; 0 = no limit.
    max_length_a, max_length_b   a translation has at most floor(a * source pieces + b) pieces, and what the model's max_length
                     allows; at the limit the sentence is ended, and the end is scored as any other.
    min_length       pieces that a translation has at least.
    """

    beam_size: int = 1
    n_best: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    max_length_a: float = 2.0
    max_length_b: int = 20
    min_length: int = 1

    def __post_init__(self) -> None:
        for name, least in (("beam_size", 1), ("n_best", 1), ("length_penalty", 0), ("no_repeat_ngram", 0), ("max_length_a", 0), ("max_length_b", 0)):
            value = getattr(self, name)
            if not value >= least or value == float("inf"):
                raise ConfigError(f"{name} is {value}, and must be a number of at least {least}")
        if self.beam_size > MAX_BEAM_SIZE:
            raise ConfigError(f"beam_size is {self.beam_size}, and must be at most {MAX_BEAM_SIZE}")
        if self.n_best > self.beam_size:
            raise ConfigError(f"n_best ({self.n_best}) is more than beam_size ({self.beam_size}): ask for fewer or search with a larger beam")

    def limit(self, source_pieces: int, model_max_length: int) -> int:
        """The most pieces of a translation, EOS not counted; BOS takes one of the model's positions."""
        return max(self.min_length, min(int(self.max_length_a * source_pieces + self.max_length_b), model_max_length - 1))


@dataclass(frozen=True)
class Hypothesis:
    """Pieces without special ids, and the score: sum(log p) / length ** length_penalty with EOS counted."""

    tokens: list[int] = field(default_factory=list)
    score: float = 0.0


def final_score(total: float, pieces: int, length_penalty: float) -> float:
    """The score of a hypothesis of so many pieces whose log probabilities, EOS included, sum to `total`."""
    return total / (pieces + 1) ** length_penalty
