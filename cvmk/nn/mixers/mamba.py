"""Mamba: a convolution, a selective scan and a gate (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cvmk.config.schema import ModelConfig
from cvmk.nn.linear import Linear
from cvmk.nn.mixers.conv import CausalConv
from cvmk.nn.mixers.recurrence import scan, scan_from, state_dtype
from cvmk.nn.mixers.two_directions import DirectedMixer, Direction
from cvmk.nn.positions import Span
from cvmk.nn.state import MixerState, StateLayout, StateTensor

EXPAND = 2
STATES = 16
_STEPS = (1e-3, 1e-1)
"""Between these the steps begin, the paper's range (section 3.6)."""


def step_bias(channels: int) -> Tensor:
    """A bias b [channels] with softplus(b) log-uniform in _STEPS, and no smaller than 1e-4."""
    low, high = (math.log(step) for step in _STEPS)
    steps = torch.empty(channels).uniform_(low, high).exp().clamp(min=1e-4)
    return steps + torch.log(-torch.expm1(-steps))


class SelectiveSpace(Direction):
    """The channels of one direction, E = 2 width of them, with S = 16 states each.

    u, z = in_proj(x); u = silu(conv(u)); delta, B, C = scan_proj(u), delta through a bottleneck of d_model / 16 (rounded up); then the scan over u with
    A = -exp(A_log) and the skip D, times silu(z). As in the paper A begins as -1 ... -16 (real and diagonal, of S4D), D as ones, the bias of the steps
    as `step_bias`, their matrix uniform in +-1/sqrt(bottleneck); A_log, D and biases do not decay.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__(config, width)
        self.outputs = EXPAND * width
        self.rank = math.ceil(config.d_model / 16)
        self.in_proj = Linear(config.d_model, (self.outputs, self.outputs), bias=config.bias)
        self.conv = CausalConv(self.outputs)
        self.scan_proj = Linear(self.outputs, (self.rank, STATES, STATES), bias=False)
        self.step_proj = Linear(self.rank, self.outputs)
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(self.outputs, 1))
        self.D = nn.Parameter(torch.ones(self.outputs))
        with torch.no_grad():
            self.step_proj.weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)
            self.step_proj.bias.copy_(step_bias(self.outputs))

    def _selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u [N, T, E] behind the convolution -> the scan's u, delta, A, B, C and D."""
        steps, B, C = self.scan_proj(u).split((self.rank, STATES, STATES), dim=-1)
        A = -self.A_log.to(state_dtype(self.A_log.dtype)).exp()
        return u, self.step_proj(steps), A, B, C, self.D

    def forward(self, x: Tensor, span: Span) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        return scan(*self._selected(self.conv(u)), z)

    def from_the_end(self, x: Tensor, span: Span) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        return scan(*self._selected(self.conv(u, span.lengths, reverse=True)), z, reverse=True)

    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        return {**self.conv.layout(dtype), "state": StateTensor((self.outputs, STATES), state_dtype(dtype))}

    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        return scan_from(state["state"], *self._selected(self.conv.extend(u, span, state)), z, span)


class Mamba(DirectedMixer):
    """State: 2 d_model channels of 16 numbers in float32 (of a float64 model float64) and of their last 3 inputs in the model's dtype, a row and layer:
    128 d_model + 6 d_model times the bytes of a number, however long the text is."""

    direction = SelectiveSpace
