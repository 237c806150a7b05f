"""Greedy and beam search over a batch of sentences with a CVMTransformer.

Every rule looks at one sentence alone (its own limit, its own hypotheses, its own end), so the batch only decides how much is
computed at once; sentences that are finished leave it on the way. Special pieces but EOS are never produced: they are taken out
before the probabilities are normalised. What is forbidden for other reasons (repeated n-grams, too short, too long) is taken out
afterwards, so that scores stay the model's log probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cvmk.inference.options import Hypothesis, SearchOptions, final_score
from cvmk.nn import CVMTransformer, DecoderState, Memory
from cvmk.text.tokenizers import Tokenizer

BOS, EOS = Tokenizer.BOS, Tokenizer.EOS
NEVER = (Tokenizer.PAD, Tokenizer.UNK, Tokenizer.BOS)
BROKEN = Hypothesis([], float("-inf"))
"""What is found where the model's numbers are not finite."""
_LEAVE = 0.25
"""Finished sentences leave the batch when they are at least this share of it; moving the others' states costs too."""


def search(model: CVMTransformer, src: Tensor, limits: list[int], options: SearchOptions) -> list[list[Hypothesis]]:
    """The n_best translations of each row of src [B, S], best first; row b gets at most limits[b] pieces (EOS not counted)."""
    if not limits:
        return []
    memory = model.encode(src)
    if options.beam_size == 1:
        return [[hypothesis] for hypothesis in _Greedy(model, memory, limits, options).run()]
    return _Beam(model, memory, limits, options).run()


# -- what may follow --------------------------------------------------------------------------------------------------------------
def next_scores(logits: Tensor) -> Tensor:
    """Logits [N, V], the special pieces at -inf, in float32 or wider; in place where they are that already."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits[:, NEVER] = float("-inf")
    return logits


def forbid(scores: Tensor, history: Tensor, limits: Tensor, shortest_limit: int, options: SearchOptions) -> None:
    """Set to -inf, in scores [N, V], what must not follow history [N, t]: limits [N] are the most pieces of each row."""
    length = history.shape[1]
    if length < options.min_length:
        scores[:, EOS] = float("-inf")
    if 0 < options.no_repeat_ngram <= length:
        _forbid_repeats(scores, history, options.no_repeat_ngram)
    if length >= shortest_limit:
        end = scores[:, EOS].clone()
        scores.masked_fill_((length >= limits)[:, None], float("-inf"))
        scores[:, EOS] = end


def _forbid_repeats(scores: Tensor, history: Tensor, size: int) -> None:
    """Set to -inf each piece that would complete an n-gram that history [N, t] has already."""
    windows = history.unfold(1, size, 1)
    last = history[:, history.shape[1] - size + 1 :]
    seen = (windows[:, :, :-1] == last[:, None]).all(dim=-1)
    completing = windows[:, :, -1].masked_fill(~seen, Tokenizer.PAD)
    scores.scatter_(1, completing, float("-inf"))


class _Search:
    """The sentences still in the batch, and the decoder's state of them."""

    def __init__(self, model: CVMTransformer, memory: Memory, limits: list[int], options: SearchOptions) -> None:
        self.model, self.options = model, options
        self.device = memory.output.device
        self.state: DecoderState = model.start(memory, max(limits) + 1, options.beam_size)
        self.sentences = list(range(len(limits)))
        self.limits = limits
        self.done = [False] * len(limits)
        self.row_limits = torch.tensor(limits, device=self.device).repeat_interleave(options.beam_size)
        self.tokens = torch.full((self.state.rows,), BOS, device=self.device)
        self.history = torch.empty((self.state.rows, 0), dtype=torch.long, device=self.device)

    def scores(self) -> tuple[Tensor, Tensor]:
        """For each row and piece, the logit where the piece may follow, else -inf [N, V]; and the normaliser [N]."""
        scores = next_scores(self.model.step(self.tokens, self.state))
        normaliser = scores.logsumexp(dim=1)
        forbid(scores, self.history, self.row_limits, min(self.limits[b] for b in self.sentences), self.options)
        return scores, normaliser

    def hypothesis(self, row: int, total: float) -> Hypothesis:
        """The row's history as a finished hypothesis; a broken one where the model gives no finite numbers."""
        pieces = self.history[row].tolist()
        return Hypothesis(pieces, final_score(total, len(pieces), self.options.length_penalty)) if math.isfinite(total) else BROKEN

    def leave(self) -> Tensor | None:
        """Drop finished sentences when they are many: the indices, in the batch, of those that stay; None when all do."""
        staying = [index for index, b in enumerate(self.sentences) if not self.done[b]]
        if not staying or len(self.sentences) - len(staying) < max(1.0, _LEAVE * len(self.sentences)):
            return None
        kept = torch.tensor(staying, device=self.device)
        self.state.select(kept)
        self.sentences = [self.sentences[index] for index in staying]
        copies = self.options.beam_size
        self.tokens, self.row_limits, self.history = (_select(x, kept, copies) for x in (self.tokens, self.row_limits, self.history))
        return kept


def _select(x: Tensor, sentences: Tensor, copies: int) -> Tensor:
    """The rows of x [B * copies, ...] that belong to these sentences."""
    return x.unflatten(0, (-1, copies)).index_select(0, sentences).flatten(0, 1)


# -- greedy -----------------------------------------------------------------------------------------------------------------------
class _Greedy(_Search):
    def run(self) -> list[Hypothesis]:
        found: list[Hypothesis] = [Hypothesis()] * len(self.limits)
        totals = torch.zeros(len(self.limits), dtype=torch.float64, device=self.device)
        while True:
            scores, normaliser = self.scores()
            best, self.tokens = scores.max(dim=1)
            totals += best - normaliser
            for index in (self.tokens == EOS).nonzero().flatten().tolist():
                b = self.sentences[index]
                if not self.done[b]:
                    found[b] = self.hypothesis(index, totals[index].item())
                    self.done[b] = True
            if all(self.done):
                return found
            self.history = torch.cat((self.history, self.tokens[:, None]), dim=1)
            kept = self.leave()
            if kept is not None:
                totals = totals.index_select(0, kept)


# -- beam -------------------------------------------------------------------------------------------------------------------------
class _Beam(_Search):
    """Beam search. Of the 2 * beam best continuations of a sentence, those that end it and are among the first `beam` are
    finished, and the best others live on. A sentence is done when `beam` hypotheses are finished, when none that lives can
    still come among the n_best, or at its limit."""

    def run(self) -> list[list[Hypothesis]]:
        beam = self.options.beam_size
        finished: list[list[Hypothesis]] = [[] for _ in self.limits]
        live = torch.full((len(self.limits), beam), float("-inf"), device=self.device, dtype=torch.float64)
        live[:, 0] = 0.0
        while True:
            scores, normaliser = self.scores()
            totals = (live.view(-1, 1) + (scores - normaliser[:, None])).view(len(self.sentences), -1)
            best, parents, pieces = self._best(totals, scores.shape[1])
            self._finish(best, parents, pieces, finished)
            live, rows, self.tokens = self._survivors(best, parents, pieces)
            self._mark_done(live, finished)
            if all(self.done):
                return [sorted(ended, key=lambda h: (-h.score, h.tokens))[: self.options.n_best] or [BROKEN] for ended in finished]
            self.state.reorder(rows)
            self.history = torch.cat((self.history.index_select(0, rows), self.tokens[:, None]), dim=1)
            kept = self.leave()
            if kept is not None:
                live = live.index_select(0, kept)

    def _best(self, totals: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        """The 2 * beam best of totals [B, beam * V] in order, equal ones by parent and piece: their totals, parents, pieces."""
        best, index = totals.topk(min(2 * self.options.beam_size, totals.shape[1]), dim=1)
        index, order = index.sort(dim=1)
        best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
        index = index.gather(1, order)
        return best, index // vocabulary, index % vocabulary

    def _finish(self, best: Tensor, parents: Tensor, pieces: Tensor, finished: list[list[Hypothesis]]) -> None:
        beam = self.options.beam_size
        ending = (pieces[:, :beam] == EOS) & best[:, :beam].isfinite()
        for index, rank in ending.nonzero().tolist():
            b = self.sentences[index]
            if not self.done[b]:
                finished[b].append(self.hypothesis(index * beam + int(parents[index, rank]), best[index, rank].item()))

    def _survivors(self, best: Tensor, parents: Tensor, pieces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first `beam` continuations of each sentence that do not end it: totals [B, beam], the rows that they extend, pieces."""
        beam = self.options.beam_size
        first = (pieces == EOS).sort(dim=1, stable=True).indices[:, :beam]
        rows = parents.gather(1, first) + beam * torch.arange(len(self.sentences), device=self.device)[:, None]
        return best.gather(1, first), rows.flatten(), pieces.gather(1, first).flatten()

    def _mark_done(self, live: Tensor, finished: list[list[Hypothesis]]) -> None:
        options, length = self.options, self.history.shape[1]
        for b, best in zip(self.sentences, live[:, 0].tolist(), strict=True):
            ended = finished[b]
            if len(ended) >= options.beam_size or length >= self.limits[b] or best == float("-inf"):
                self.done[b] = True
            elif len(ended) >= options.n_best:
                worst = sorted((hypothesis.score for hypothesis in ended), reverse=True)[options.n_best - 1]
                self.done[b] = worst >= final_score(best, self.limits[b], options.length_penalty)
