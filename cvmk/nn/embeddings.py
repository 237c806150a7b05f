"""Word embeddings of both sides and the output matrix: one matrix, or three."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvmk import ops
from cvmk.config.schema import ModelConfig
from cvmk.nn.linear import TiedLinear
from cvmk.nn.quantized_table import QuantizedTable
from cvmk.nn.residual import probability


class Embeddings(nn.Module):
    """`source` [V, d]; with tie_embeddings it is the target embedding and the output matrix as well.

    Untied, `target` and `output` [V, d] are parameters of their own; tied, they are None and nothing is stored twice.
    `projection` is the output layer, a linear layer by the output matrix. `quantize` puts a quantised matrix in the place of a parameter.
    """

    source: nn.Parameter | QuantizedTable
    target: nn.Parameter | QuantizedTable | None
    output: nn.Parameter | QuantizedTable | None

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.scale = math.sqrt(config.d_model)
        self.source = nn.Parameter(torch.empty(vocab_size, config.d_model))
        self.target = None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.d_model))
        self.output = None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.d_model))
        for matrix in self.parameters():
            nn.init.normal_(matrix, std=config.d_model**-0.5)
        self.projection = TiedLinear(self, "output_layer")

    def quantize(self, name: str, table: QuantizedTable) -> None:
        """Put a quantised matrix in the place of `source`, `target` or `output`. Raises ValueError where there is none of that name and size."""
        before = getattr(self, name, None) if name in ("source", "target", "output") else None
        if before is None:
            raise ValueError(f"the embeddings have no matrix {name!r} of their own")
        shape = before.weight.shape if isinstance(before, QuantizedTable) else tuple(before.shape)
        if table.weight.shape != shape:
            raise ValueError(f"embeddings.{name} is {list(shape)} and the quantised matrix {list(table.weight.shape)}")
        delattr(self, name)
        self.add_module(name, table)

    def embed_source(self, ids: Tensor, positions: Tensor | None = None, dropout: nn.Dropout | None = None) -> Tensor:
        """ids [N, T] -> [N, T, d], scaled by sqrt(d), with positions [T, d] or [N, T, d] added, and dropped."""
        return self._embed(self.source, ids, positions, dropout)

    def embed_target(self, ids: Tensor, positions: Tensor | None = None, dropout: nn.Dropout | None = None) -> Tensor:
        """As `embed_source`, by the target's matrix."""
        return self._embed(self.source if self.target is None else self.target, ids, positions, dropout)

    def _embed(self, matrix: nn.Parameter | QuantizedTable, ids: Tensor, positions: Tensor | None, dropout: nn.Dropout | None) -> Tensor:
        p = probability(dropout)
        if not isinstance(matrix, QuantizedTable) and p < 1:
            return ops.embed(ids, matrix, positions, scale=self.scale, dropout_p=p)
        x = (matrix.rows(ids) if isinstance(matrix, QuantizedTable) else F.embedding(ids, matrix)) * self.scale
        x = x if positions is None else x + positions
        return F.dropout(x, p) if p else x

    @property
    def output_layer(self) -> nn.Parameter | QuantizedTable:
        """What the output matrix is held by."""
        return self.source if self.output is None else self.output

    @property
    def output_matrix(self) -> Tensor:
        """The matrix [V, d] that turns hidden states into logits; made anew at each call where it is quantised."""
        layer = self.output_layer
        return layer.matrix() if isinstance(layer, QuantizedTable) else layer

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> [..., V]."""
        logits: Tensor = self.projection(hidden)
        return logits
