"""A recurrent mixer with a state of fixed size, as plain as it gets: what the contract of mixers must have room for."""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.config.schema import ModelConfig
from cvmk.nn.linear import Linear
from cvmk.nn.mixers import Mixer
from cvmk.nn.outputs import AttentionMap
from cvmk.nn.positions import Span
from cvmk.nn.state import MixerState, StateLayout, StateTensor


class RunningMixer(Mixer):
    """c_t = f_t c_{t-1} + (1 - f_t) w_t with f = sigmoid(...), w = ...; out(relu(c)). Both directions, summed, where it is not causal."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__(config, causal)
        self.width = config.d_model
        self.gate_value = Linear(config.d_model, (config.d_model, config.d_model))
        self.out = Linear(config.d_model, config.d_model, residual_output=True)

    def _scan(self, x: Tensor, real: Tensor, cell: Tensor, order: range) -> tuple[Tensor, Tensor]:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        gate, cells = gate.sigmoid(), [cell] * x.shape[1]
        for t in order:
            moved = gate[:, t] * cell + (1 - gate[:, t]) * value[:, t]
            cell = torch.where(real[:, t, None], moved, cell)
            cells[t] = cell
        return (torch.stack(cells, dim=1) if cells else x), cell

    def _real(self, x: Tensor, span: Span) -> Tensor:
        real = span.real(x.device)
        return torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real

    def forward(self, x: Tensor, span: Span, return_map: bool) -> tuple[Tensor, AttentionMap | None]:
        real, cell = self._real(x, span), x.new_zeros(x.shape[0], self.width)
        mixed, _ = self._scan(x, real, cell, range(x.shape[1]))
        if not self.causal:
            mixed = mixed + self._scan(x, real, cell, range(x.shape[1])[::-1])[0]
        return self.out(mixed.relu()), None

    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        return {"cell": StateTensor((self.width,), dtype)}

    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        mixed, cell = self._scan(x, self._real(x, span), state["cell"], range(x.shape[1]))
        state["cell"].copy_(cell)
        return self.out(mixed.relu())
