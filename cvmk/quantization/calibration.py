"""What a model's matrices read on calibration text: the largest and mean magnitudes, second moments, and some rows as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cvmk.errors import DataError
from cvmk.nn import CVMTransformer
from cvmk.quantization.sites import Site
from cvmk.text.lines import trimmed
from cvmk.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from cvmk.inference import Translator

ROWS = 1024
"""Rows of inputs that are kept of each matrix."""
_BATCH_TOKENS = 2048
_ALIKE = 0.1  # cosine of two texts' counts of pieces, below which they have nothing in common


@dataclass(frozen=True)
class Half:
    """Of the inputs x of a matrix on half of the sentences: `largest` max |x|, float64 [K], and `rows` float32 [n, K], some of them."""

    largest: Tensor
    rows: Tensor

    def divided(self, scale: Tensor) -> Half:
        """Those of x / scale [K], float64."""
        return Half(self.largest / scale, (self.rows / scale).float())


@dataclass(frozen=True)
class InputStatistics:
    """Of the inputs x [count, K] of a matrix, all on the CPU.

    `largest` max |x|, `mean` mean |x|, both float64 [K]; `moment` float64 [K, K], the mean of x x^T; `rows` float32 [<= ROWS, K], a uniform sample.
    `halves`: of every other sentence and of the rest, so that what is fitted to the one can be judged on the other; without rows where there is none.
    """

    count: int
    largest: Tensor
    mean: Tensor
    moment: Tensor
    rows: Tensor
    halves: tuple[Half, Half]

    def divided(self, scale: Tensor) -> InputStatistics:
        """Those of x / scale."""
        s = scale.double()
        halves = self.halves[0].divided(s), self.halves[1].divided(s)
        moment, rows = self.moment / (s[:, None] * s), (self.rows / s).float()
        return InputStatistics(self.count, self.largest / s, self.mean / s, moment, rows, halves)


Pair = tuple[list[int], list[int]]
"""Piece ids of a source and of its translation, without special ones."""


def read_pairs(texts: Sequence[str], translator: Translator, limit: int) -> list[Pair]:
    """At most `limit` calibration texts, spread over all of them, and what the model says of them: that is what its decoder reads when it works.

    Raises DataError where no text has any content.
    """
    filled = [text for text in texts if trimmed(text)]
    if not filled:
        raise DataError("the calibration text is empty: give sentences of the kind that the model will translate")
    chosen = [filled[index * len(filled) // limit] for index in range(limit)] if len(filled) > limit else filled
    translations = translator.translate(chosen, on_long="truncate")
    longest = translator.engine.max_length - 1
    return [(translator.tokenizer.encode(trimmed(text))[:longest], found.tokens[:longest]) for text, found in zip(chosen, translations, strict=True)]


def collect(model: CVMTransformer, chosen: Sequence[Site], pairs: Sequence[Pair], rows: int = ROWS) -> dict[str, InputStatistics]:
    """The statistics of each matrix that multiplies something, by its name, in one pass; memory does not grow with the number of pairs."""
    gathered = {site.name: _Gathered(rows) for site in chosen if site.module is not None}
    mask: dict[bool, Tensor] = {}
    half = 0

    def watch(site: Site) -> Callable[..., None]:
        def hook(module: object, arguments: tuple[Tensor, ...]) -> None:
            gathered[site.name].add(arguments[0].detach().flatten(0, -2)[mask[site.source_side].flatten()], half)

        return hook

    hooks = [model.get_submodule(site.module).register_forward_pre_hook(watch(site)) for site in chosen if site.module is not None]
    try:
        with torch.no_grad():
            for half in (0, 1):
                for source, target in padded(pairs[half::2], model.pad_id):
                    mask[True], mask[False] = source != model.pad_id, target != model.pad_id
                    model(source, target)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: found.statistics() for name, found in gathered.items()}


def padded(pairs: Sequence[Pair], pad: int) -> list[tuple[Tensor, Tensor]]:
    """Batches (src [B, S], tgt [B, T]) of pairs of similar length, as the model is trained on: EOS behind a source, BOS before a target."""
    found: list[tuple[Tensor, Tensor]] = []
    ordered = sorted(pairs, key=lambda pair: max(map(len, pair)))
    while ordered:
        count = max(1, min(len(ordered), _BATCH_TOKENS // (max(map(len, ordered[-1])) + 1)))
        batch, ordered = ordered[-count:], ordered[:-count]
        sources = [torch.tensor([*source, Tokenizer.EOS]) for source, _ in batch]
        targets = [torch.tensor([Tokenizer.BOS, *target]) for _, target in batch]
        sides = (torch.nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=pad) for side in (sources, targets))
        source, target = sides
        found.append((source, target))
    return found


def check_language(name: str, texts: Sequence[str], sources: Sequence[str], references: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raises DataError where calibration text is not of the language of the evaluation sources: its pieces are more like those of the references, or like
    neither, or it needs twice as many pieces a word as the sources do."""

    if not any(map(trimmed, texts)):
        raise DataError(f"{name} is empty: give sentences of the kind that the model will translate")

    def pieces(lines: Sequence[str]) -> Counter[int]:
        return Counter(piece for line in lines[:1000] for piece in tokenizer.encode(trimmed(line)))

    def likeness(one: Mapping[int, int], other: Mapping[int, int]) -> float:
        norm = (sum(n * n for n in one.values()) * sum(n * n for n in other.values())) ** 0.5
        return sum(n * other.get(piece, 0) for piece, n in one.items()) / norm if norm else 0.0

    def fertility(counts: Mapping[int, int], lines: Sequence[str]) -> float:
        return sum(counts.values()) / max(1, sum(len(line.split()) for line in lines[:1000]))

    own, source, reference = pieces(texts), pieces(sources), pieces(references)
    as_source, as_reference = likeness(own, source), likeness(own, reference)
    remedy = "calibrate with text of the source language"
    if as_reference > max(as_source, _ALIKE):
        raise DataError(
            f"{name} looks like the language that the model writes, not the one that it reads (its pieces are {as_reference:.2f} like the references' and "
            f"{as_source:.2f} like the sources'): {remedy}"
        )
    needed = fertility(own, texts) / max(fertility(source, sources), 1e-9)
    if as_source < _ALIKE or needed > 2:
        raise DataError(
            f"{name} does not look like the language that the model reads (its pieces are {as_source:.2f} like those of the evaluation sources, and it needs "
            f"{needed:.1f} times as many a word): {remedy}"
        )


class _Gathered:
    """Running statistics, and a reservoir of rows (algorithm R, Vitter 1985) by a generator of its own."""

    def __init__(self, rows: int) -> None:
        self._limit, self._count = rows, 0
        self._rows: Any = None
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor, half: int) -> None:
        """x [n, K], of sentences of that half (0 or 1)."""
        x = x.float().cpu()
        wide, size = x.double(), x.abs()
        if self._rows is None:
            k = x.shape[1]
            self._rows, self._halves, self._largest, self._sum = x.new_empty(0, k), torch.empty(0, dtype=torch.int64), wide.new_zeros(2, k), wide.new_zeros(k)
            self._moment = wide.new_zeros(k, k)
        if len(x):
            self._largest[half] = torch.maximum(self._largest[half], size.amax(0).double())
        self._sum += size.sum(0, dtype=torch.float64)
        self._moment += wide.T @ wide
        free = self._limit - len(self._rows)
        begun, self._count = self._count, self._count + len(x)
        if free > 0:
            first, x = x[:free], x[free:]
            self._rows, self._halves = torch.cat([self._rows, first]), torch.cat([self._halves, torch.full((len(first),), half)])
            begun += len(first)
        if len(x):
            ranks = torch.arange(begun, begun + len(x), dtype=torch.float64) + 1
            places = (torch.rand(len(x), generator=self._generator, dtype=torch.float64) * ranks).long()
            for place, row in zip(places.tolist(), x, strict=True):
                if place < self._limit:
                    self._rows[place], self._halves[place] = row, half

    def statistics(self) -> InputStatistics:
        count = max(1, self._count)
        one, other = (Half(self._largest[half], self._rows[self._halves == half]) for half in (0, 1))
        return InputStatistics(self._count, self._largest.amax(0), self._sum / count, self._moment / count, self._rows, (one, other))
