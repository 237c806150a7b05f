"""Greedy and beam search over an export to ONNX, in numpy: the sentences, limits and order of `decoding`, with the defaults of `SearchOptions`.

Special pieces are never said, EOS is not the first, and a sentence that reaches its limit is ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cvmk.inference.options import final_score
from cvmk.text.tokenizers import Tokenizer

BOS, EOS = Tokenizer.BOS, Tokenizer.EOS
_NEVER = [Tokenizer.PAD, Tokenizer.UNK, BOS]


@dataclass
class Rows:
    """What the decoder reads of N rows: its inputs but for the tokens, the past with them."""

    inputs: dict[str, np.ndarray]

    def select(self, rows: np.ndarray) -> Rows:
        """These rows (integers, in this order, as often as they are named; or a mask)."""
        return Rows({name: value[rows] for name, value in self.inputs.items()})

    def reorder(self, rows: np.ndarray) -> Rows:
        """Row i goes on from row rows[i] of the same sentence: what is encoded of it stays where it is."""
        return Rows({name: value[rows] if name.startswith("past.") else value for name, value in self.inputs.items()})


class Graphs(Protocol):
    """The encoder and the decoder."""

    def start(self, sources: Sequence[Sequence[int]]) -> Rows:
        """Encode sources (pieces without EOS, at least one source) -> rows that have read nothing."""
        ...

    def extend(self, tokens: np.ndarray, rows: Rows) -> np.ndarray:
        """tokens int64 [N, T], the next of each row -> logits float32 [N, T, V]; the rows have read them."""
        ...


def greedy(graphs: Graphs, sources: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
    """The most probable next piece again and again: the pieces of each source's translation, without EOS, at most limits[b]."""
    said: list[list[int]] = [[] for _ in sources]
    rows, place, tokens = graphs.start(sources), np.arange(len(sources)), np.full(len(sources), BOS, np.int64)
    for length in range(max(limits)):
        logits = _next_logits(graphs, tokens, rows)
        if length == 0:
            logits[:, EOS] = -np.inf
        tokens = logits.argmax(axis=1)
        going = tokens != EOS
        for row, index in enumerate(place.tolist()):
            if going[row]:
                said[index].append(int(tokens[row]))
                going[row] = len(said[index]) < limits[index]
        if not going.any():
            break
        if not going.all():
            rows, place, tokens = rows.select(going), place[going], tokens[going]
    return said


def beam(graphs: Graphs, sources: Sequence[Sequence[int]], limits: Sequence[int], size: int, length_penalty: float = 1.0) -> list[list[int]]:
    """The best hypothesis of a beam search of each source, by sum(log p) / length ** length_penalty."""
    sentences = [_Sentence(limit, [[]] * size) for limit in limits]
    rows, living = graphs.start(sources).select(np.repeat(np.arange(len(sources)), size)), [*sentences]
    tokens, totals = np.full(len(rows.inputs["lengths"]), BOS, np.int64), np.full((len(sources), size), -np.inf)
    totals[:, 0] = 0  # the hypotheses of a sentence begin as one
    for length in range(max(limits) + 1):
        scores = _log_softmax(_next_logits(graphs, tokens, rows))
        if length == 0:
            scores[:, EOS] = -np.inf  # after the softmax: scores stay the model's
        chosen, kept, going = [], [], []
        for index, sentence in enumerate(living):
            best, parents, pieces = _best(totals[index], scores[index * size : (index + 1) * size], sentence.limit == length)
            survivors = sentence.advance(best, parents, pieces, length, size, length_penalty)
            if survivors is not None:
                going.append(sentence)
                kept.append(best[survivors])
                chosen.append((index * size + parents[survivors], pieces[survivors]))
        if not going:
            break
        parents, tokens = (np.concatenate(side) for side in zip(*chosen, strict=True))
        rows = rows.reorder(parents) if len(going) == len(living) else rows.select(parents)
        living, totals = going, np.stack(kept)
    return [min(sentence.found, key=lambda one: (-one[0], one[1]), default=(0.0, list[int]()))[1] for sentence in sentences]


@dataclass(eq=False)
class _Sentence:
    """The most pieces of a translation, the pieces of the hypotheses that live, and the score and pieces of those that are finished."""

    limit: int
    histories: list[list[int]]
    found: list[tuple[float, list[int]]] = field(default_factory=list)

    def advance(self, best: np.ndarray, parents: np.ndarray, pieces: np.ndarray, length: int, size: int, penalty: float) -> np.ndarray | None:
        """Continuations, the best first: their totals, the hypotheses that they extend, and pieces. -> the places of those that live on, [size]; None where
        the sentence is done. `length` is how long the hypotheses were before."""
        for rank in range(size):
            if pieces[rank] == EOS and np.isfinite(best[rank]):
                self.found.append((final_score(float(best[rank]), length, penalty), self.histories[parents[rank]]))
        survivors = np.flatnonzero(pieces != EOS)[:size]
        if len(self.found) >= size or length >= self.limit or not np.isfinite(best[survivors[:1]]).all():
            return None
        if self.found and max(self.found)[0] >= final_score(float(best[survivors[0]]), self.limit, penalty):
            return None
        self.histories = [[*self.histories[parent], piece] for parent, piece in zip(parents[survivors].tolist(), pieces[survivors].tolist(), strict=True)]
        return survivors


def _best(totals: np.ndarray, scores: np.ndarray, ends: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 2 * size best continuations of hypotheses with `totals` [size] by `scores` [size, V], in order, equal ones by hypothesis and piece: totals,
    hypotheses, pieces. `ends`: nothing but EOS may be said."""
    size, vocabulary = scores.shape
    if ends:
        scores = np.where(np.arange(vocabulary) == EOS, scores, -np.inf)
    count = min(2 * size, vocabulary)
    pieces = np.sort(np.argpartition(scores, -count, axis=1)[:, -count:], axis=1)
    found = (totals[:, None] + np.take_along_axis(scores, pieces, axis=1)).ravel()
    order = np.argsort(-found, kind="stable")[: 2 * size]
    return found[order], order // count, pieces.ravel()[order]


def _next_logits(graphs: Graphs, tokens: np.ndarray, rows: Rows) -> np.ndarray:
    """The logits [N, V] behind `tokens` [N], without the special pieces."""
    logits = graphs.extend(tokens[:, None], rows)[:, -1]
    logits[:, _NEVER] = -np.inf
    return logits


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row [N, V], in place."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits
