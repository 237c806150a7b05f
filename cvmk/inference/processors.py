"""What may be said next: a list of processors, each a change of the scores by what was said before.

A processor looks at one row (one hypothesis) at a time, so that the batch never matters. To add one: a class here, its option in `options`, and
its place in `reshaping`, where it changes the probabilities, or in `forbidding`, where it takes pieces out and leaves the others' as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvmk.inference.options import SearchOptions
from cvmk.text.tokenizers import Tokenizer

EOS, PAD = Tokenizer.EOS, Tokenizer.PAD
_FORBIDDEN = float("-inf")


class History:
    """What each of N hypotheses has said so far: `pieces` [N, t], int64, their log probabilities `scores` [N, t], float64, and their attention
    to the source `maps` [N, t, S], float32 (S = 0 where nobody asks), each row's at its right end behind padding.

    Rows stand in groups of `copies`, one group a sentence, whose hypotheses are equally long.
    """

    def __init__(self, sentences: int, copies: int, device: torch.device, source: int = 0) -> None:
        self.pieces = torch.empty((sentences * copies, 0), dtype=torch.long, device=device)
        self.scores = torch.empty((sentences * copies, 0), dtype=torch.float64, device=device)
        self.maps = torch.empty((sentences * copies, 0, source), device=device)
        self._copies = copies
        self._set_missing([0] * sentences)

    def length(self, sentence: int) -> int:
        """Pieces of each hypothesis of a sentence."""
        return self.pieces.shape[1] - self._missing[sentence]

    @property
    def lengths(self) -> Tensor | int:
        """Pieces of each row, [N]; one number where they agree."""
        return self.pieces.shape[1] if self._padding is None else self.pieces.shape[1] - self._padding

    @property
    def shortest(self) -> int:
        return self.pieces.shape[1] - self._most_missing

    @property
    def longest(self) -> int:
        return self.pieces.shape[1] - self._least_missing

    def row(self, row: int) -> list[int]:
        """The pieces of a hypothesis."""
        return self.pieces[row, self._missing[row // self._copies] :].tolist()

    def row_scores(self, row: int) -> list[float]:
        """The log probabilities of its pieces."""
        return self.scores[row, self._missing[row // self._copies] :].tolist()

    def row_maps(self, row: int, source: int) -> tuple[tuple[float, ...], ...]:
        """The attention of its pieces to a source of so many positions."""
        return tuple(map(tuple, self.maps[row, self._missing[row // self._copies] :, :source].tolist()))

    def append(self, pieces: Tensor, scores: Tensor, maps: Tensor) -> None:
        """One more piece a row, [N], its log probability, and its attention [N, S]."""
        self.pieces = torch.cat((self.pieces, pieces[:, None]), dim=1)
        self.scores = torch.cat((self.scores, scores[:, None].to(self.scores.dtype)), dim=1)
        self.maps = torch.cat((self.maps, maps[:, None]), dim=1)

    def append_rows(self, pieces: Sequence[Sequence[int]], scores: Tensor, maps: Tensor) -> None:
        """More pieces of each sentence, the same for all its hypotheses, to an empty history; scores [N, longest] and maps [N, longest, S], each
        row's at its left end."""
        longest = max(map(len, pieces), default=0)
        rows = [[*[PAD] * (longest - len(row)), *row] for row in pieces]
        self.pieces = torch.tensor(rows, dtype=torch.long, device=self.pieces.device).view(len(rows), longest).repeat_interleave(self._copies, dim=0)
        self._set_missing([longest - len(row) for row in pieces])
        columns = torch.arange(longest, device=scores.device)[None] - (0 if self._padding is None else self._padding[:, None])
        columns = columns.clamp(min=0).expand_as(scores)
        self.scores = scores.gather(1, columns).to(self.scores.dtype)
        self.maps = maps.gather(1, columns[:, :, None].expand_as(maps))

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row rows[i] of the same sentence."""
        self.pieces, self.scores, self.maps = (tensor.index_select(0, rows) for tensor in (self.pieces, self.scores, self.maps))

    def select(self, sentences: Sequence[int], rows: Tensor) -> None:
        """Keep these sentences; `rows` are theirs."""
        missing = [self._missing[sentence] for sentence in sentences]
        spare = min(missing, default=0)
        self.pieces, self.scores, self.maps = (tensor.index_select(0, rows)[:, spare:] for tensor in (self.pieces, self.scores, self.maps))
        self._set_missing([count - spare for count in missing])

    def join(self, other: History) -> None:
        """The other's sentences after these."""
        longest, source = max(self.pieces.shape[1], other.pieces.shape[1]), max(self.maps.shape[2], other.maps.shape[2])
        missing, padded, scores, maps = [], [], [], []
        for history in (self, other):
            more = longest - history.pieces.shape[1]
            missing += [count + more for count in history._missing]
            padded.append(torch.nn.functional.pad(history.pieces, (more, 0), value=PAD))
            scores.append(torch.nn.functional.pad(history.scores, (more, 0)))
            maps.append(torch.nn.functional.pad(history.maps, (0, source - history.maps.shape[2], more, 0)))
        self.pieces, self.scores, self.maps = torch.cat(padded), torch.cat(scores), torch.cat(maps)
        self._set_missing(missing)

    def _set_missing(self, missing: list[int]) -> None:
        """How much padding each sentence's rows have."""
        self._missing, self._least_missing, self._most_missing = missing, min(missing, default=0), max(missing, default=0)
        self._padding: Tensor | None = None  # [N], None where no row has any
        if self._most_missing:
            self._padding = torch.tensor(missing, device=self.pieces.device).repeat_interleave(self._copies)


class Processor:
    """Changes scores [N, V] in place, before the next piece is chosen. The special pieces but EOS are out already."""

    def __call__(self, history: History, scores: Tensor) -> None:
        raise NotImplementedError

    def select(self, sentences: Sequence[int], rows: Tensor) -> None:
        """Keep these sentences; `rows` are theirs. For processors that hold something a row."""

    def join(self, other: Processor) -> None:
        """The sentences of another of the same class after these."""


class RepetitionPenalty(Processor):
    """Logits of pieces that were said: divided by the penalty where positive, multiplied where negative (Keskar et al. 2019 §4.1)."""

    def __init__(self, penalty: float) -> None:
        self._penalty = penalty

    def __call__(self, history: History, scores: Tensor) -> None:
        said = scores.gather(1, history.pieces)
        scores.scatter_(1, history.pieces, torch.where(said > 0, said / self._penalty, said * self._penalty))


class Listed(Processor):
    """Nothing but the pieces of a sentence's shortlist."""

    def __init__(self, listed: Sequence[Sequence[int]], vocab_size: int, copies: int, device: torch.device) -> None:
        others = torch.ones((len(listed), vocab_size), dtype=torch.bool)
        for row, ids in zip(others, listed, strict=True):
            row[list(ids)] = False
        self._others, self._copies = others.to(device), copies

    def __call__(self, history: History, scores: Tensor) -> None:
        scores.view(-1, self._copies, scores.shape[1]).masked_fill_(self._others[:, None], _FORBIDDEN)

    def select(self, sentences: Sequence[int], rows: Tensor) -> None:
        self._others = self._others[list(sentences)]

    def join(self, other: Processor) -> None:
        assert isinstance(other, Listed)
        self._others = torch.cat((self._others, other._others))


class Suppressed(Processor):
    """These pieces are never said."""

    def __init__(self, ids: Sequence[int], device: torch.device) -> None:
        self._ids = torch.tensor(ids, device=device)

    def __call__(self, history: History, scores: Tensor) -> None:
        scores.index_fill_(1, self._ids, _FORBIDDEN)


class MinLength(Processor):
    """No end before so many pieces."""

    def __init__(self, least: int) -> None:
        self._least = least

    def __call__(self, history: History, scores: Tensor) -> None:
        if history.longest < self._least:
            scores[:, EOS] = _FORBIDDEN
        elif history.shortest < self._least:
            scores[:, EOS].masked_fill_(history.lengths < self._least, _FORBIDDEN)  # type: ignore[arg-type]


class NoRepeatNgram(Processor):
    """No n-gram of this size twice: the pieces that would complete one are out."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, history: History, scores: Tensor) -> None:
        size, pieces = self._size, history.pieces
        if size > history.longest:
            return
        windows = pieces.unfold(1, size, 1)
        last = pieces[:, pieces.shape[1] - size + 1 :]
        seen = (windows[:, :, :-1] == last[:, None]).all(dim=-1)
        scores.scatter_(1, windows[:, :, -1].masked_fill(~seen, PAD), _FORBIDDEN)  # padding is out already


class MaxLength(Processor):
    """Nothing but the end from a sentence's limit on."""

    def __init__(self, limits: Sequence[int], copies: int, device: torch.device) -> None:
        self._copies, self._device = copies, device
        self._set(list(limits))

    def _set(self, limits: list[int]) -> None:
        self._limits, self._shortest = limits, min(limits, default=0)
        self._rows = torch.tensor(limits, device=self._device).repeat_interleave(self._copies)

    def __call__(self, history: History, scores: Tensor) -> None:
        if history.longest < self._shortest:
            return
        end = scores[:, EOS].clone()
        scores.masked_fill_((self._rows <= history.lengths)[:, None], _FORBIDDEN)
        scores[:, EOS] = end

    def select(self, sentences: Sequence[int], rows: Tensor) -> None:
        self._set([self._limits[sentence] for sentence in sentences])

    def join(self, other: Processor) -> None:
        assert isinstance(other, MaxLength)
        self._set([*self._limits, *other._limits])


def reshaping(options: SearchOptions, listed: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> list[Processor]:
    """The processors that change the model's probabilities: they see the logits, before these are normalised. listed[b] has the only pieces of sentence b,
    where the options ask for a shortlist."""
    found: list[Processor] = [Listed(listed, vocab_size, options.beam_size, device)] if options.shortlist else []
    return [*found, RepetitionPenalty(options.repetition_penalty)] if options.repetition_penalty != 1 else found


def forbidding(options: SearchOptions, limits: Sequence[int], device: torch.device) -> list[Processor]:
    """The processors that take pieces out; limits[b] is the most pieces of sentence b. The last one lets every sentence end."""
    found: list[Processor] = []
    if options.suppressed:
        found.append(Suppressed(options.suppressed, device))
    if options.min_length:
        found.append(MinLength(min(options.min_length, max(limits, default=0))))  # it exceeds a limit only where the model has no room
    if options.no_repeat_ngram:
        found.append(NoRepeatNgram(options.no_repeat_ngram))
    return [*found, MaxLength(limits, options.beam_size, device)]
