"""Mamba-2: state space duality (Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060): one decay a head, so that chunks are products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvmk import ops
from cvmk.config.schema import ModelConfig
from cvmk.nn.linear import Linear
from cvmk.nn.mixers.conv import CausalConv
from cvmk.nn.mixers.exact import exact, exactly
from cvmk.nn.mixers.mamba import EXPAND, step_bias
from cvmk.nn.mixers.recurrence import state_dtype
from cvmk.nn.mixers.two_directions import DirectedMixer, Direction, split_heads
from cvmk.nn.positions import Span
from cvmk.nn.state import MixerState, StateLayout, StateTensor

STATES = 64
"""Numbers that a channel has where there is one direction."""
_CHUNK = 64
"""Positions whose scores are computed at once; what came before them is read from a state."""


class DualSpace(Direction):
    """The heads of one direction: H of P = 2 d_model / heads channels, E = H P in all, with S states (64, or 32 each of two directions).

    z, xBC, delta = in_proj(x); xBC = silu(conv(xBC)) has u [E], B [S] and C [S], which all heads share. With a_t = exp(-exp(A_log) softplus(delta_t)):

        S_t = a_t S_{t-1} + softplus(delta_t) u_t B_t^T        y_t = S_t C_t + D u_t        out = norm(y silu(z)), an RMSNorm with a scale

    Begins as in the paper's code: A uniform in 1 ... 16, D as ones, the bias of the steps as `mamba.step_bias`; these do not decay.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__(config, width)
        self.heads, size = split_heads(config, width)
        self.size, self.outputs, self.states = EXPAND * size, EXPAND * width, STATES * width // config.d_model
        self.parts = (self.outputs, self.outputs + 2 * self.states, self.heads)
        self.in_proj = Linear(config.d_model, self.parts, bias=config.bias)
        self.conv = CausalConv(self.parts[1])
        self.step_bias = nn.Parameter(step_bias(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.outputs, eps=config.norm_eps)

    def _split(self, xBC: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u [N, T, H, P], B and C [N, T, S], the steps behind softplus [N, T, H] and the log decays [N, T, H], in the dtype of the state."""
        u, B, C, steps, bias, A_log = exact(*xBC.split((self.outputs, self.states, self.states), dim=-1), steps, self.step_bias, self.A_log)
        steps = F.softplus(steps + bias)
        return u.unflatten(-1, (self.heads, self.size)), B, C, steps, -A_log.exp() * steps

    def _gated(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        """y and u [N, T, H, P], z [N, T, E] -> [N, T, E] in the dtype of z."""
        D, gate = exact(self.D, z)
        mixed = (y + D[:, None] * u).flatten(2) * F.silu(gate)
        normed = F.rms_norm(mixed, (self.outputs,), self.norm.weight.to(mixed.dtype), self.norm.eps)
        return normed.to(z.dtype)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        z, xBC, steps = self.in_proj(x).split(self.parts, dim=-1)
        u, B, C, steps, decays = self._split(self.conv(xBC), steps)
        with exactly(u):
            y, _ = dual_scan(u * steps[..., None], decays, B, C, None)
        return self._gated(y, u, z)

    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        return {**self.conv.layout(dtype), "state": StateTensor((self.heads, self.size, self.states), state_dtype(dtype))}

    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        z, xBC, raw = self.in_proj(x).split(self.parts, dim=-1)
        mixed = self.conv.extend(xBC, span, state)
        memory, real = state["state"], span.real(x.device)
        if real is None and x.shape[1] == 1 and not torch.is_grad_enabled():
            return self._step(mixed[:, 0], raw[:, 0], z, memory)
        u, B, C, steps, decays = self._split(mixed, raw)
        if real is not None:  # a step of 0 leaves the state as it is
            u, B, steps, decays = (part.masked_fill(~real.view(*real.shape, *[1] * (part.dim() - 2)), 0) for part in (u, B, steps, decays))
        with exactly(u):
            y, last = dual_scan(u * steps[..., None], decays, B, C, memory)
        memory.copy_(last)
        return self._gated(y, u, z)

    def _step(self, mixed: Tensor, raw: Tensor, z: Tensor, memory: Tensor) -> Tensor:
        """One position: xBC behind the convolution [N, E + 2 S], delta [N, H] and z [N, 1, E]."""
        u, B, C = mixed.split((self.outputs, self.states, self.states), dim=-1)
        u = exact(u)[0].unflatten(-1, (self.heads, self.size))
        bias, A_log = exact(self.step_bias, self.A_log)
        A = -A_log.exp()[:, None, None].expand(self.heads, self.size, self.states)
        delta, wide_bias = raw[..., None].expand(u.shape), bias[:, None].expand(self.heads, self.size)
        y = ops.selective_state_update(memory, u, delta, A, B, C, None, None, wide_bias, dt_softplus=True)
        return self._gated(y.unsqueeze(1), u.unsqueeze(1), z)


def dual_scan(drive: Tensor, decays: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_t = S_t C_t with S_t = exp(decays_t) S_{t-1} + drive_t B_t^T, chunk by chunk.

    drive [N, T, H, P], decays [N, T, H] (logarithms, 0 or less), B and C [N, T, S], state [N, H, P, S] or None for zeros -> y as drive, and the last state.
    Within a chunk (C B^T masked by the decays between) drive; what came before it by its state. Only differences of sums of logarithms within a chunk are
    exponentiated, none above 0: nothing overflows, and nothing is divided.
    """
    if state is None:
        state = drive.new_zeros(drive.shape[0], *drive.shape[2:], B.shape[-1])
    found = []
    for start in range(0, drive.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        v, b, c, total = drive[:, part], B[:, part], C[:, part], decays[:, part].cumsum(1).mT
        count = v.shape[1]
        later = torch.ones(count, count, dtype=torch.bool, device=v.device).triu(1)
        between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
        scores = (c @ b.mT)[:, None] * between
        v = v.transpose(1, 2)
        inside = scores @ v
        before = (c[:, None] @ state.mT) * total.exp()[..., None]
        found.append((inside + before).transpose(1, 2))
        rest = (total[..., -1:] - total).exp()[..., None]
        state = total[..., -1].exp()[..., None, None] * state + (v * rest).mT @ b[:, None]
    return (torch.cat(found, dim=1) if found else drive), state


class Mamba2(DirectedMixer):
    """State: 2 d_model channels of 64 numbers in float32 (of a float64 model float64) and the last 3 inputs of 2 d_model + 128 channels in the model's
    dtype, a row and layer: 512 d_model + (6 d_model + 384) times the bytes of a number, however long the text is. Heads are those of `model.heads`."""

    direction = DualSpace
