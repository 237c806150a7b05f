"""Multi-scale retention (Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language Models", arXiv 2307.08621)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn.linear import Linear
from cvmk.nn.mixers.exact import exact, exactly
from cvmk.nn.mixers.recurrence import state_dtype
from cvmk.nn.mixers.two_directions import DirectedMixer, Direction, split_heads
from cvmk.nn.positions import Rotary, Span
from cvmk.nn.state import MixerState, StateLayout, StateTensor

_CHUNK = 64
"""Positions whose scores are computed at once; what came before them is read from a state."""


class _Retention(Direction):
    """The heads of one direction, normalised and gated; `qkvg` has the rows [q; k; v; g]."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__(config, width)
        self.heads, self.size = split_heads(config, width)
        if self.size % 2:
            raise ConfigError(f"model.heads is {config.heads}, and retnet turns pairs: its heads of {self.size} channels need an even number of them")
        self.outputs = 2 * width
        self.parts = (width, width, self.outputs, self.outputs)
        self.qkvg = Linear(config.d_model, self.parts, bias=config.bias)
        self.angles = Rotary(config, self.size)
        self.eps = config.norm_eps

    def _project(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (scaled) and k [N, H, T, D], v [N, H, T, 2 D], in the dtype of the state, and the gate [N, T, 2 w] in that of the projection."""
        q, k, v, gate = self.qkvg(x).split(self.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in exact(q, k, v))
        span = self.angles.place(span)[1]
        return span.rotate(q) * self.size**-0.5, span.rotate(k), v, gate

    def _gated(self, retained: Tensor, gate: Tensor) -> Tensor:
        """[N, H, T, 2 D] -> [N, T, 2 w]."""
        normed = F.layer_norm(retained, retained.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2)
        return F.silu(gate) * normed.to(gate.dtype)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        q, k, v, gate = self._project(x, span)
        with exactly(q):
            return self._gated(retention(q, k, v, log_decays(self.heads, q)), gate)

    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        return {"memory": StateTensor((self.heads, self.size, 2 * self.size), state_dtype(dtype))}

    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        q, k, v, gate = self._project(x, span)
        decays, memory = log_decays(self.heads, q), state["memory"]
        with exactly(q):
            after = remembered(k, v, decays, memory, span.lengths)
            retained = q @ after if span.count == 1 else retention(q, k, v, decays, memory)  # one position reads what is remembered with it
        memory.copy_(after)
        return self._gated(retained, gate)


class RetNet(DirectedMixer):
    """Per head h, with d_k channels of queries and keys and d_v = 2 d_k of values (the paper's width, section 2 and 3):

        gamma_h = 1 - 2^(-5 - h)
        S_t     = gamma_h S_{t-1} + k_t^T v_t              S [d_k, d_v], the state
        o_t     = q_t S_t / sqrt(d_k)
        out     = W_O (silu(W_G x) * norm_h(o))            norm_h: mean and variance of each head's d_v channels, without scale and shift

    in parallel o = ((q k^T / sqrt(d_k)) * D) v with D_nm = gamma^(n - m) for n >= m. Queries and keys are turned by their position
    (xPos, Sun et al. 2022, of which gamma is the decay), whatever model.positions says; model.rotary_base is its base. Whole
    sequences go in chunks: the parallel form inside them, the state from one to the next. The paper divides the rows of scores
    by sums, which the norm makes good again, against overflow in half precision; sums are of float32 here and need none of it.

    Where it is not causal: two directions of half the heads each (`two_directions`), as the paper's decay has one direction.

    State a row and layer: heads * d_k * 2 d_k numbers of float32 (of a float64 model float64), so 8 d_model^2 / heads bytes,
    however long the text is. A step reads and writes them once.
    Parameters: 8 d_model^2 (attention: 4). All matrices decay (`cvmk.nn.decays`), and gamma is no parameter.
    """

    direction = _Retention


def log_decays(heads: int, like: Tensor) -> Tensor:
    """log(gamma_h) [H], in the dtype and on the device of `like`."""
    return torch.log1p(-torch.exp2(-5 - torch.arange(heads, dtype=like.dtype, device=like.device)))


def retention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, memory: Tensor | None = None) -> Tensor:
    """o_t = sum over s <= t of gamma^(t - s) (q_t k_s) v_s + gamma^(t + 1) q_t memory.

    q and k [N, H, T, Dk], v [N, H, T, Dv], log_decay [H] (log gamma), memory [N, H, Dk, Dv] from before the first position -> [N, H, T, Dv].
    """
    found = []
    for start in range(0, q.shape[2], _CHUNK):
        qs, ks, vs = (x[:, :, start : start + _CHUNK] for x in (q, k, v))
        at = torch.arange(qs.shape[2], device=q.device)
        apart = at[:, None] - at
        decays = torch.exp(log_decay[:, None, None] * apart.clamp(min=0)).masked_fill(apart < 0, 0)
        chunk = (qs @ ks.transpose(-1, -2) * decays) @ vs
        if memory is not None:
            chunk = chunk + torch.exp(log_decay[:, None] * (at + 1)).unsqueeze(-1) * (qs @ memory)
        found.append(chunk)
        if start + _CHUNK < q.shape[2]:
            memory = remembered(ks, vs, log_decay, memory, None)
    return torch.cat(found, dim=2) if found else v


def remembered(k: Tensor, v: Tensor, log_decay: Tensor, memory: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The state behind the first lengths [N] (None: all) of T positions: sum of gamma^(last - s) k_s^T v_s + gamma^length memory, [N, H, Dk, Dv]."""
    ends: Tensor | int = k.shape[2]
    if lengths is not None:
        ends = lengths[:, None, None]  # [N, 1, 1]
        padding = torch.arange(k.shape[2], device=k.device) >= ends
        k, v = (x.masked_fill(padding.unsqueeze(-1), 0) for x in (k, v))
    apart = (ends - 1 - torch.arange(k.shape[2], device=k.device)).clamp(min=0)  # [T] or [N, 1, T]
    new = (k * torch.exp(log_decay[:, None] * apart).unsqueeze(-1)).transpose(-1, -2) @ v
    if memory is None:
        return new
    kept = torch.exp(log_decay * (ends if isinstance(ends, int) else ends[..., 0]))  # [H] or [N, H]
    return kept[..., None, None] * memory + new
