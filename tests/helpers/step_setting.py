"""One optimiser step on tiny models: what tests of steps and of optimisers drive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvmk.config import DistillationConfig, ModelConfig
from cvmk.distill import DistillationObjective
from cvmk.nn import CVMTransformer
from cvmk.text.batching import Batch, collate
from cvmk.text.cache import TokenizedCorpus
from cvmk.text.corpus import CorpusReport
from cvmk.training.optimizers import Optimizer
from cvmk.training.step import TrainingStep
from cvmk.training.world import World

VOCABULARY = 50
MODEL = ModelConfig(d_model=16, ffn=32, heads=2, encoder_layers=1, decoder_layers=1, max_length=32, dropout=0.0)
TEACHER = ModelConfig(d_model=24, ffn=32, heads=2, encoder_layers=2, decoder_layers=1, max_length=32, dropout=0.0)


def corpus(pairs: int = 12) -> TokenizedCorpus:
    random = np.random.default_rng(1)
    lengths = random.integers(2, 9, size=2 * pairs)
    ids = random.integers(4, VOCABULARY, size=lengths.sum()).astype(np.uint16)
    return TokenizedCorpus(np.arange(pairs), np.concatenate([[0], np.cumsum(lengths)]), ids, CorpusReport())


class Setting:
    def __init__(self, *, teacher: bool = False, seed: int = 1, clip_norm: float = 0.0, vocabulary: int = VOCABULARY, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = CVMTransformer(MODEL, vocabulary, 0)
        self.teacher = CVMTransformer(TEACHER, vocabulary, 0).eval() if teacher else None
        distillation = DistillationConfig(beta=0.5, gamma=0.5) if teacher else DistillationConfig(alpha=0.0)
        self.objective = DistillationObjective(
            distillation, label_smoothing=0.1, student=MODEL, teacher=TEACHER if teacher else None, vocab_size=vocabulary
        )
        self._options = {"precision": "float32", "clip_norm": clip_norm, "world": options.pop("world", World())}
        self.driven_by(Optimizer(torch.optim.SGD([*self.model.parameters(), *self.objective.parameters()], lr=0.5)))

    def driven_by(self, optimizer: Optimizer) -> Setting:
        self.optimizer = optimizer
        self.step = TrainingStep(self.model, self.teacher, self.objective, optimizer, **self._options)
        return self

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in [*self.model.parameters(), *self.objective.parameters()]]


def batches(groups: Sequence[Sequence[int]]) -> list[Batch]:
    found = corpus()
    return [collate(found, group) for group in groups]
