"""The simpler simple recurrent unit (Kim et al. 2019, "From Research to Production and Back: Ludicrously Fast Neural Machine Translation")."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn.linear import Linear
from cvmk.nn.mixers.base import Mixer
from cvmk.nn.mixers.recurrence import scan, scan_from, state_dtype
from cvmk.nn.outputs import AttentionMap, MapWish
from cvmk.nn.positions import Span
from cvmk.nn.state import MixerState, StateLayout, StateTensor

_LARGEST = 60.0
"""Of a gate's logit: both sides of the quotient below are normal numbers up to there, and it is 1 to rounding from half of it on."""


class SSRU(Mixer):
    """f_t = sigmoid(W_f x_t + b), c_t = f_t c_{t-1} + (1 - f_t) W x_t, out_t = relu(c_t); W and W_f begin as Glorot's, b at 0.

    As in the paper there is no output projection: `value` is what reaches the residual stream. Where the mixer is not causal the
    second half of the channels runs from the end to the start, with as many parameters.

    The recurrence is the selective scan with one state a channel: a decay of sigmoid(g) is exp(-softplus(-g)), so A = -1, delta = -g
    before softplus, and the scan's input delta u is (1 - f) W x where u = W x (1 - f) / delta. The quotient tends to 1 as f does.
    A cumulative form would divide by products of gates, which underflow; the scan divides by none, and has a fused kernel.

    State: d_model numbers of float32 (of a float64 model float64) a row and layer, 4 d_model bytes, however long the text is.
    Raises ConfigError for an odd d_model where the mixer is not causal.
    """

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__(config, causal)
        self.width = config.d_model
        if not causal and self.width % 2:
            remedy = 'make it even, or model.encoder_direction "causal"'
            raise ConfigError(f"model.d_model is {self.width}, and the mixer ssru gives each direction of a bidirectional encoder half of it: {remedy}")
        self.gate = Linear(self.width, self.width, bias=True)
        self.value = Linear(self.width, self.width, bias=False, residual_output=True)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u and delta [N, T, d], and A and B = C [d, 1] of the scan."""
        value, logits = self.value(x), self.gate(x)
        exact = logits.to(state_dtype(logits.dtype))
        bounded = exact.clamp(max=_LARGEST)
        u = (value * (torch.sigmoid(-bounded) / F.softplus(-bounded))).to(value.dtype)
        ones = exact.new_ones(self.width, 1)
        return u, -logits, -ones, ones

    def forward(self, x: Tensor, span: Span, return_map: MapWish) -> tuple[Tensor, AttentionMap | None]:
        u, delta, A, B = self._inputs(x)
        if self.causal:
            cell = scan(u, delta, A, B, B, None, None)
        else:
            real = span.real(u.device)
            if real is not None:
                u = u.masked_fill(~real[..., None], 0)
            halves = zip(u.chunk(2, -1), delta.chunk(2, -1), A.chunk(2), B.chunk(2), (False, True), strict=True)
            cell = torch.cat([scan(v, d, a, b, b, None, None, reverse=reverse) for v, d, a, b, reverse in halves], dim=-1)
        return cell.relu(), None

    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        return {"cell": StateTensor((self.width, 1), state_dtype(dtype))}

    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        u, delta, A, B = self._inputs(x)
        return scan_from(state["cell"], u, delta, A, B, B, None, None, span).relu()
