"""Word embeddings of both sides and the output matrix: one matrix, or three."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvmk.config.schema import ModelConfig
from cvmk.nn.linear import TiedLinear


class Embeddings(nn.Module):
    """`source` [V, d]; with tie_embeddings it is the target embedding and the output matrix as well.

    Untied, `target` and `output` [V, d] are parameters of their own; tied, they are None and nothing is stored twice.
    `projection` is the output layer, a linear layer by the output matrix.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.scale = math.sqrt(config.d_model)
        self.source = nn.Parameter(torch.empty(vocab_size, config.d_model))
        self.target = None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.d_model))
        self.output = None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.d_model))
        for matrix in self.parameters():
            nn.init.normal_(matrix, std=config.d_model**-0.5)
        self.projection = TiedLinear(self, "output_matrix")

    def embed_source(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., d], scaled by sqrt(d)."""
        return F.embedding(ids, self.source) * self.scale

    def embed_target(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., d], scaled by sqrt(d)."""
        return F.embedding(ids, self.source if self.target is None else self.target) * self.scale

    @property
    def output_matrix(self) -> Tensor:
        """The matrix [V, d] that turns hidden states into logits."""
        return self.source if self.output is None else self.output

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> [..., V]."""
        logits: Tensor = self.projection(hidden)
        return logits
