"""Recovery of a quantised model: a short distillation from the model that it was made of, through the rounding (`quantization.straight_through`).

The loss is the divergence of the next piece's distribution from the teacher's (forward KL, of the logits), on pairs or on text and what the teacher makes
of it. Every `every` steps it is measured on pairs that are held out, and the weights that are best there are kept; those before the first
step are among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from cvmk.config import DistillationConfig, OptimizerConfig, ScheduleConfig
from cvmk.distill import DistillationObjective
from cvmk.errors import ConfigError, DataError
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer
from cvmk.quantization.calibration import Pair, check_language, read_pairs
from cvmk.quantization.model import Quantized, Say
from cvmk.quantization.straight_through import quantized_again, trainable
from cvmk.text.batching import TokenBatchSampler, collate
from cvmk.text.cache import TokenizedCorpus
from cvmk.text.lines import trimmed
from cvmk.training.optimizers import build_optimizer
from cvmk.training.schedule import learning_rate_factor
from cvmk.training.step import TrainingStep
from cvmk.training.world import World

SENTENCES = 16384
"""Of calibration text that are used where there are no pairs; the teacher has to translate them."""
HELD_OUT = 256
"""Pairs to validate on, at most a tenth of all."""
_OBJECTIVE = DistillationConfig(alpha=1.0)


@dataclass(frozen=True)
class Recovery:
    """How to recover; what `quantization.quantize` takes as `recover`.

    steps, every   optimiser steps, and how many of them lie between two validations.
    pairs          sources and their translations to train on; None: the calibration text (SENTENCES of it) and what the teacher says.
    learning_rate  its peak, after a warm-up of a tenth of the steps (at most 100); a cosine down to a twentieth of it.
    max_tokens     of a batch: pairs times the longest side.
    seed           of the batches' order. The same seed gives the same model.

    Raises ConfigError for numbers that are out of range, DataError for pairs with unequal sides.
    """

    steps: int
    every: int = 500
    pairs: tuple[Sequence[str], Sequence[str]] | None = None
    learning_rate: float = 1e-4
    max_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "every", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of the recovery is {getattr(self, name)}, and must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate of the recovery is {self.learning_rate}, and must be above 0, such as 1e-4")
        if self.pairs is not None and len(self.pairs[0]) != len(self.pairs[1]):
            raise DataError(f"the recovery has {len(self.pairs[0])} sources and {len(self.pairs[1])} translations to train on: give one for each")

    def __call__(
        self, quantized: Quantized, translator: Translator, calibration: Sequence[str], pairs: Sequence[Pair], say: Say
    ) -> tuple[Quantized, dict[str, Any]]:
        """The recovered model, and what the report says of it: steps, every, learning_rate, seed, text, pairs, held_out, `best` (a step) and `history`, the
        divergence in nats a piece at each validation. The translator is that of the model before; `pairs` are those of the calibration.

        Raises DataError for sources of another language than the calibration text, and where there are fewer than two pairs to train and validate on.
        """
        if self.pairs is not None:
            decode = translator.tokenizer.decode
            check_language("the text to train on", self.pairs[0], calibration, [decode(said) for _, said in pairs], translator.tokenizer)
        train, held = self._split(translator, calibration)
        teacher, student = quantized.model, trainable(quantized)
        most = max(self.max_tokens, 1 + max(int(one.lengths.max()) for one in (train, held)))
        objective = DistillationObjective(
            _OBJECTIVE, label_smoothing=0.0, student=student.config, teacher=teacher.config, vocab_size=student.vocab_size, pad_id=student.pad_id
        )
        optimizer = build_optimizer(OptimizerConfig(learning_rate=self.learning_rate, weight_decay=0.0), [student])
        step = TrainingStep(student, teacher, objective, optimizer, precision="float32", clip_norm=1.0, world=World())
        schedule = ScheduleConfig(kind="cosine", warmup=min(100, self.steps // 10))
        sampler = TokenBatchSampler(train.lengths, most, self.seed)
        say(f"recovering: {self.steps} steps on {len(train)} pairs, validated on {len(held)}")
        history = [{"step": 0, "divergence": _divergence(objective, student, teacher, held, most)}]
        best, weights = history[0], _copied(student)
        for number in range(1, self.steps + 1):
            with parametrize.cached():
                found = step([collate(train, next(sampler))], learning_rate_factor(schedule, number, self.steps))
            if not math.isfinite(found.loss) or not math.isfinite(found.norm):
                say(f"the recovery's loss is not finite in step {number}: it ends here")
                break
            if number % self.every == 0 or number == self.steps:
                history.append({"step": number, "divergence": _divergence(objective, student, teacher, held, most)})
                say(f"step {number}: divergence {history[-1]['divergence']:.4f} nats a piece, {history[0]['divergence']:.4f} before")
                if history[-1]["divergence"] < best["divergence"]:
                    best, weights = history[-1], _copied(student)
        student.load_state_dict(weights)
        facts = {"steps": self.steps, "every": self.every, "learning_rate": self.learning_rate, "seed": self.seed}
        data = {"text": "calibration" if self.pairs is None else "pairs", "pairs": len(train), "held_out": len(held)}
        return quantized_again(quantized, student, pairs), {**facts, **data, "best": best["step"], "history": history}

    def _split(self, translator: Translator, calibration: Sequence[str]) -> tuple[TokenizedCorpus, TokenizedCorpus]:
        """To train on and to validate on; the latter evenly spread."""
        found = read_pairs(calibration, translator, SENTENCES) if self.pairs is None else _encoded(translator, *self.pairs)
        found = [pair for pair in found if all(pair)]
        if len(found) < 2:
            raise DataError(f"a recovery needs two pairs at least, one of them to validate on, and has {len(found)}: give more text")
        count = max(1, min(HELD_OUT, len(found) // 10))
        held = {index * len(found) // count for index in range(count)}
        parts = ([pair for index, pair in enumerate(found) if (index in held) == kept] for kept in (False, True))
        train, valid = map(TokenizedCorpus.of_pairs, parts)
        return train, valid


def _encoded(translator: Translator, sources: Sequence[str], targets: Sequence[str]) -> list[Pair]:
    """Piece ids, cut to what the model takes."""
    longest = translator.engine.max_length - 1
    sides = ([ids[:longest] for ids in translator.tokenizer.encode_many([trimmed(text) for text in side])] for side in (sources, targets))
    return list(zip(*sides, strict=True))


@torch.no_grad()
def _divergence(objective: DistillationObjective, student: CVMTransformer, teacher: CVMTransformer, held: TokenizedCorpus, max_tokens: int) -> float:
    """Of the student from the teacher, the mean over the target pieces of the held-out pairs, in nats."""
    student.eval()
    sampler, total, tokens = TokenBatchSampler(held.lengths, max_tokens), 0.0, 0
    with parametrize.cached():
        while sampler.epoch == 0:
            batch = collate(held, next(sampler))
            outputs = (model.forward_unprojected(batch.src, batch.tgt_in) for model in (student, teacher))
            total += float(objective(*outputs, batch).parts["logits"]) * batch.tokens
            tokens += batch.tokens
    return total / tokens


def _copied(model: CVMTransformer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
