"""Greedy and beam search with a CVMTransformer, over sentences with the same options that are decoded together.

Every rule looks at one sentence alone (its own limit, its own hypotheses, its own end), so the batch only decides how much is
computed at once; sentences that are finished leave it on the way, and others may join. Special pieces but EOS are never produced: they are
taken out before the probabilities are normalised. What is forbidden for other reasons is taken out afterwards, so that scores stay the model's log
probabilities (see `processors`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from cvmk.inference import processors
from cvmk.inference.options import BROKEN, Hypothesis, SearchOptions, final_score
from cvmk.inference.processors import History
from cvmk.inference.scheduler import Entry
from cvmk.inference.shortlist import Shortlist, wanted
from cvmk.nn import AttentionMaps, CVMTransformer, DecoderState
from cvmk.text.tokenizers import Tokenizer

BOS, EOS = Tokenizer.BOS, Tokenizer.EOS
NEVER = (Tokenizer.PAD, Tokenizer.UNK, Tokenizer.BOS)
_LEAVE = 0.25
"""Finished sentences leave the batch when they are at least this share of it; moving the others' states costs too."""
_PREFIX_SCORES = 1 << 24
"""Scores of prefixes that are computed at once."""


def begin(model: CVMTransformer, entries: Sequence[Entry], shortlist: Shortlist | None = None) -> Decoding:
    """Encode the sources of entries with the same options, and read their prefixes."""
    options = entries[0].request.options
    sources = [entry.request.source for entry in entries]
    width = max(map(len, sources)) + 1
    rows = [[*source, EOS, *[model.pad_id] * (width - 1 - len(source))] for source in sources]
    memory = model.encode(torch.tensor(rows, dtype=torch.long, device=next(model.parameters()).device))
    room = model.config.max_length
    least = 0 if options.prefix_bias else 1  # a prefix is said whatever the limit
    sentences = [_Sentence(entry, max(options.limit(len(entry.request.source), room), least * len(entry.request.prefix))) for entry in entries]
    state = model.start(memory, max(sentence.limit for sentence in sentences) + 1, options.beam_size)
    kind = _Sampling if options.temperature else _Greedy if options.beam_size == 1 else _Beam
    lists = wanted(shortlist, options)
    return kind(model, state, sentences, options, [lists.of(entry.request.source, entry.request.prefix) for entry in entries] if lists else [])


def next_scores(logits: Tensor) -> Tensor:
    """Logits [N, V], the special pieces at -inf, in float32 or wider; in place where they are that already."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits[:, NEVER] = float("-inf")
    return logits


@dataclass(eq=False)
class _Sentence:
    """A sentence in the batch: its entry, the most pieces of its translation, what was found for it, and whether that is all."""

    entry: Entry
    limit: int
    found: list[Hypothesis] = field(default_factory=list)
    done: bool = False


class Decoding(ABC):
    """The sentences in the batch and the decoder's state of their hypotheses: those of sentence b are the rows b * beam_size ... of every tensor.

    The next step feeds `tokens` [N]; `totals` [B, beam_size] are sums of log probabilities, in float64.
    """

    def __init__(
        self, model: CVMTransformer, state: DecoderState, sentences: list[_Sentence], options: SearchOptions, listed: Sequence[Sequence[int]]
    ) -> None:
        self.model, self.state, self.sentences, self.options = model, state, sentences, options
        self.device = state.memory.output.device
        self.tokens = torch.full((state.rows,), BOS, device=self.device)
        self.history = History(len(sentences), options.beam_size, self.device, state.memory.output.shape[1] if options.alignments else 0)
        self.maps = self._maps(None, 1)[:, 0]  # the attention of the next pieces
        self.totals = torch.zeros((len(sentences), options.beam_size), dtype=torch.float64, device=self.device)
        self.reshaping = processors.reshaping(options, listed, model.vocab_size, self.device)
        self.forbidding = processors.forbidding(options, [sentence.limit for sentence in sentences], self.device)
        # The large tensors of a step stay until those of the next are there: else the allocator gives their memory back to the system in between.
        self._kept: tuple[Tensor, ...] = ()
        if not options.prefix_bias and any(sentence.entry.request.prefix for sentence in sentences):
            self._read_prefixes([list(sentence.entry.request.prefix) for sentence in sentences])

    # -- what a scheduler asks for -----------------------------------------------------------------------------------------------
    @abstractmethod
    def advance(self) -> list[tuple[Entry, list[Hypothesis]]]: ...

    def partial(self, entry: Entry) -> list[int]:
        index = next(index for index, sentence in enumerate(self.sentences) if sentence.entry is entry)
        return self.history.row(index * self.options.beam_size)

    def drop(self, entries: Sequence[Entry]) -> None:
        for sentence in self.sentences:
            sentence.done = sentence.done or sentence.entry in entries
        self._leave(share=0)

    def join(self, other: Self) -> None:
        self._leave(share=0)
        self.state = DecoderState.join([self.state, other.state])
        self.sentences += other.sentences
        self.tokens, self.totals = torch.cat((self.tokens, other.tokens)), torch.cat((self.totals, other.totals))
        self.history.join(other.history)
        for mine, theirs in zip((*self.reshaping, *self.forbidding), (*other.reshaping, *other.forbidding), strict=True):
            mine.join(theirs)

    # -- a step ------------------------------------------------------------------------------------------------------------------
    def _scores(self) -> tuple[Tensor, Tensor]:
        """For each row and piece, the logit where the piece may follow, else -inf [N, V]; and the normaliser [N]."""
        attended = AttentionMaps() if self.options.alignments else None
        scores, normaliser = self._normalised(self.model.step(self.tokens, self.state, attended), self.history)
        self.maps = self._maps(attended, 1)[:, 0]
        agreeing = self._agreeing() if self.options.prefix_bias else []
        chances = [(row, piece, math.exp(float(scores[row, piece]) - float(normaliser[row]))) for row, piece in agreeing]
        for processor in self.forbidding:
            processor(self.history, scores)
        for row, piece, chance in chances:  # Arivazhagan et al. 2020
            bias = self.options.prefix_bias
            scores[row] = (scores[row] - normaliser[row]) + math.log1p(-bias)
            scores[row, piece] = math.log((1 - bias) * chance + bias)
            normaliser[row] = 0
        return scores, normaliser

    def _maps(self, attended: AttentionMaps | None, positions: int) -> Tensor:
        """The weights of the last cross-attention, their mean over the heads, of so many positions of each row: [N, positions, S]."""
        if attended is None:
            return self.history.maps.new_empty((self.state.rows, positions, self.history.maps.shape[2]))
        return attended.cross[-1].probabilities().mean(dim=1).view(self.state.rows, positions, -1).to(self.history.maps.dtype)

    def _agreeing(self) -> list[tuple[int, int]]:
        """The rows that have said what their prefix says so far, with its next piece."""
        found = []
        for index, sentence in enumerate(self.sentences):
            prefix, length = sentence.entry.request.prefix, self.history.length(index)
            if length < min(len(prefix), sentence.limit):
                rows = range(index * self.options.beam_size, (index + 1) * self.options.beam_size)
                found += [(row, prefix[length]) for row in rows if self.history.row(row) == list(prefix[:length])]
        return found

    def _normalised(self, logits: Tensor, history: History) -> tuple[Tensor, Tensor]:
        scores = next_scores(logits)
        for processor in self.reshaping:
            processor(history, scores)
        return scores, scores.logsumexp(dim=1)

    def _hypothesis(self, row: int, total: float, *end: float) -> Hypothesis:
        """The row's history as a finished hypothesis (with the end's log probability), or as it is by now; a broken one where the model gives
        no finite numbers."""
        pieces = self.history.row(row)
        score = final_score(total, len(pieces), self.options.length_penalty)
        if not math.isfinite(total):
            return BROKEN
        source = self.sentences[row // self.options.beam_size].entry.request.source
        alignment = self.history.row_maps(row, len(source) + 1) if self.options.alignments else ()
        return Hypothesis(pieces, score, (*self.history.row_scores(row), *end), alignment)

    def so_far(self, entry: Entry) -> list[Hypothesis]:
        """The n best of what an entry that is in it has found and is at."""
        index = next(index for index, sentence in enumerate(self.sentences) if sentence.entry is entry)
        rows = range(index * self.options.beam_size, (index + 1) * self.options.beam_size)
        living = [self._hypothesis(row, total) for row, total in zip(rows, self.totals[index].tolist(), strict=True) if math.isfinite(total)]
        return self._ranked([*self.sentences[index].found, *living])

    def _ranked(self, found: list[Hypothesis]) -> list[Hypothesis]:
        return self._told(sorted(found, key=lambda hypothesis: (-hypothesis.score, hypothesis.tokens))[: self.options.n_best] or [BROKEN])

    def _told(self, found: list[Hypothesis]) -> list[Hypothesis]:
        """Without their scores where the options ask for none."""
        return found if self.options.scores else [one if one is BROKEN else replace(one, score=math.nan, scores=()) for one in found]

    def _go_on(self, scores: Tensor) -> None:
        """The pieces that were chosen, `tokens`, are said, with these log probabilities; finished sentences leave when they are many, or have no
        room for another piece."""
        self.history.append(self.tokens, scores, self.maps)
        self._leave(_LEAVE if self.history.longest < self.state.max_length else 0)

    def _leave(self, share: float) -> None:
        """Drop finished sentences when they are at least this share of the batch, unless that leaves none."""
        staying = [index for index, sentence in enumerate(self.sentences) if not sentence.done]
        if not staying or len(self.sentences) - len(staying) < max(1.0, share * len(self.sentences)):
            return
        kept, copies = torch.tensor(staying, device=self.device), self.options.beam_size
        rows = (kept[:, None] * copies + torch.arange(copies, device=self.device)).flatten()
        self.state.select(kept)
        self.sentences = [self.sentences[index] for index in staying]
        self.tokens, self.totals = self.tokens.index_select(0, rows), self.totals.index_select(0, kept)
        self.history.select(staying, rows)
        for processor in (*self.reshaping, *self.forbidding):
            processor.select(staying, rows)

    # -- prefixes ----------------------------------------------------------------------------------------------------------------
    def _read_prefixes(self, prefixes: list[list[int]]) -> None:
        """Feed all pieces of the prefixes [B] but the last, which the first step feeds, and add up their log probabilities."""
        copies, longest = self.options.beam_size, max(map(len, prefixes))
        pieces = self._rows([[*prefix, *[Tokenizer.PAD] * (longest - len(prefix))] for prefix in prefixes])
        lengths = self._rows([len(prefix) for prefix in prefixes])
        fed = torch.cat((self.tokens[:, None], pieces[:, :-1]), dim=1)
        at_once = max(1, _PREFIX_SCORES // (len(pieces) * self.model.vocab_size))
        totals, read = self.totals.flatten(), History(len(prefixes), copies, self.device)
        told, maps = torch.zeros(pieces.shape, dtype=torch.float64, device=self.device), []
        for start in range(0, longest, at_once):
            part = fed[:, start : start + at_once]
            attended = AttentionMaps() if self.options.alignments else None
            logits = self.model.extend(part, self.state, (lengths - start).clamp(0, part.shape[1]), attended)
            maps.append(self._maps(attended, part.shape[1]))
            for t in range(start, start + part.shape[1]):
                read.pieces = pieces[:, :t]
                scores, normaliser = self._normalised(logits[:, t - start], read)
                told[:, t] = torch.where(t < lengths, scores.gather(1, pieces[:, t : t + 1])[:, 0] - normaliser, 0.0)
                totals += told[:, t]
        self.totals = totals.view(-1, copies)
        self.history.append_rows(prefixes, told, torch.cat(maps, dim=1))
        self.tokens = torch.where(lengths > 0, pieces.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0], self.tokens)

    def _rows(self, values: list[list[int]] | list[int]) -> Tensor:
        """One value a sentence as one a row."""
        return torch.tensor(values, device=self.device).repeat_interleave(self.options.beam_size, dim=0)


# -- greedy -----------------------------------------------------------------------------------------------------------------------
class _Greedy(Decoding):
    def advance(self) -> list[tuple[Entry, list[Hypothesis]]]:
        scores, normaliser = self._scores()
        self._kept = (scores,)
        best, self.tokens = scores.max(dim=1)
        said = best - normaliser
        self.totals += said[:, None]
        ended = []
        for index in (self.tokens == EOS).nonzero().flatten().tolist():
            sentence = self.sentences[index]
            if not sentence.done:
                sentence.done = True
                ended.append((sentence.entry, self._told([self._hypothesis(index, self.totals[index, 0].item(), said[index].item())])))
        self._go_on(said)
        return ended


# -- beam -------------------------------------------------------------------------------------------------------------------------
class _Beam(Decoding):
    """Beam search. Of the 2 * beam best continuations of a sentence, those that end it and are among the first `beam` are
    finished, and the best others live on. A sentence is done when `beam` hypotheses are finished, when none that lives can
    still come among the n_best, or at its limit."""

    def __init__(
        self, model: CVMTransformer, state: DecoderState, sentences: list[_Sentence], options: SearchOptions, listed: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(model, state, sentences, options, listed)
        self.totals[:, 1:] = float("-inf")  # the hypotheses of a sentence begin as one

    def advance(self) -> list[tuple[Entry, list[Hypothesis]]]:
        scores, normaliser = self._scores()
        scores -= normaliser[:, None]
        totals = (self.totals.view(-1, 1) + scores).view(len(self.sentences), -1)
        self._kept = scores, totals
        best, parents, pieces = self._best(totals, scores.shape[1])
        self._finish(best, parents, pieces, scores)
        self.totals, rows, self.tokens = self._survivors(best, parents, pieces)
        said = scores[rows, self.tokens]
        ended = self._ended()
        if all(sentence.done for sentence in self.sentences):
            return ended
        self.state.reorder(rows)
        self.history.reorder(rows)
        self.maps = self.maps.index_select(0, rows)
        self._go_on(said)
        return ended

    def _best(self, totals: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        """The 2 * beam best of totals [B, beam * V] in order, equal ones by parent and piece: their totals, parents, pieces."""
        best, index = totals.topk(min(2 * self.options.beam_size, totals.shape[1]), dim=1)
        index, order = index.sort(dim=1)
        best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
        index = index.gather(1, order)
        return best, index // vocabulary, index % vocabulary

    def _finish(self, best: Tensor, parents: Tensor, pieces: Tensor, scores: Tensor) -> None:
        """Keep what ends a sentence among the first `beam` continuations."""
        beam = self.options.beam_size
        ending = (pieces[:, :beam] == EOS) & best[:, :beam].isfinite()
        for index, rank in ending.nonzero().tolist():
            if not self.sentences[index].done:
                row = index * beam + int(parents[index, rank])
                self.sentences[index].found.append(self._hypothesis(row, best[index, rank].item(), scores[row, EOS].item()))

    def _survivors(self, best: Tensor, parents: Tensor, pieces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first `beam` continuations of each sentence that do not end it: totals [B, beam], the rows that they extend, pieces."""
        beam = self.options.beam_size
        first = (pieces == EOS).sort(dim=1, stable=True).indices[:, :beam]
        rows = parents.gather(1, first) + beam * torch.arange(len(self.sentences), device=self.device)[:, None]
        return best.gather(1, first), rows.flatten(), pieces.gather(1, first).flatten()

    def _ended(self) -> list[tuple[Entry, list[Hypothesis]]]:
        """The sentences that are done now, with the best of what was found for them."""
        ended = []
        for index, (sentence, best) in enumerate(zip(self.sentences, self.totals[:, 0].tolist(), strict=True)):
            if not sentence.done and self._is_done(sentence, best, self.history.length(index)):
                sentence.done = True
                ended.append((sentence.entry, self._ranked(sentence.found)))
        return ended

    def _is_done(self, sentence: _Sentence, best: float, length: int) -> bool:
        """`best` is the total of the best hypothesis that lives, `length` the pieces of those that ended just now."""
        options, found = self.options, sentence.found
        if len(found) >= options.beam_size * options.patience or length >= sentence.limit or best == float("-inf"):
            return True
        if len(found) < options.n_best:
            return False
        worst = sorted((hypothesis.score for hypothesis in found), reverse=True)[options.n_best - 1]
        return worst >= final_score(best, sentence.limit, options.length_penalty)


# -- sampling ---------------------------------------------------------------------------------------------------------------------
class _Sampling(Decoding):
    """Every row draws its own pieces; a sentence is done when all its rows have ended. Rows that ended go on idle until then."""

    def advance(self) -> list[tuple[Entry, list[Hypothesis]]]:
        scores, normaliser = self._scores()
        beam, said = self.options.beam_size, torch.zeros(scores.shape[0], dtype=torch.float64, device=self.device)
        totals, tokens = self.totals.flatten(), torch.full_like(self.tokens, EOS)
        ended = []
        for index, sentence in enumerate(self.sentences):
            for copy in range(beam):
                row = index * beam + copy
                if sentence.done or not math.isfinite(totals[row]):  # it has ended
                    continue
                piece = draw(scores[row], self.options, uniform(self.options.seed, copy, self.history.length(index)))
                said[row] = scores[row, piece] - normaliser[row] if piece is not None else float("nan")
                totals[row] += said[row]
                if piece == EOS and math.isfinite(totals[row]):
                    sentence.found.append(self._hypothesis(row, totals[row].item(), said[row].item()))
                    totals[row] = float("-inf")
                elif piece is not None:
                    tokens[row] = piece
            if not sentence.done and not totals[index * beam : (index + 1) * beam].isfinite().any():
                sentence.done = True
                ended.append((sentence.entry, self._ranked(sentence.found)))
        self.totals, self.tokens = totals.view(-1, beam), tokens
        self._go_on(said)
        return ended


def draw(scores: Tensor, options: SearchOptions, place: float) -> int | None:
    """The piece at `place` (0 to 1) of the distribution of a row's logits [V], pieces in falling order of probability, as the options cut it; None where
    nothing may be said."""
    logits, ids = scores.double().sort(descending=True, stable=True)
    count = int((logits > float("-inf")).sum())
    if not count or not math.isfinite(logits[0]):
        return None
    count = min(count, options.top_k or count)
    mass = ((logits[:count] - logits[0]) / options.temperature).exp().cumsum(0)
    if options.top_p < 1:
        count = min(int(torch.searchsorted(mass, options.top_p * mass[-1])) + 1, count)
    found = int(torch.searchsorted(mass[:count].contiguous(), place * mass[count - 1], right=True))
    return int(ids[min(found, count - 1)])


def uniform(seed: int, stream: int, step: int) -> float:
    """A number in [0, 1) of a seed, a hypothesis and its length: SplitMix64 (Steele, Lea & Flood 2014)."""
    x, mask = seed, (1 << 64) - 1
    for part in (stream, step):
        x = (x + 0x9E3779B97F4A7C15 + part) & mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        x ^= x >> 31
    return (x >> 11) * 2.0**-53
