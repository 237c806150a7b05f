"""The time mixing of RWKV-6 "Finch" (Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv 2404.05892)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvmk.config.schema import ModelConfig
from cvmk.nn.linear import Linear, linear
from cvmk.nn.mixers.exact import exact, exactly
from cvmk.nn.mixers.recent import after_recent, after_zeros
from cvmk.nn.mixers.recurrence import state_dtype
from cvmk.nn.mixers.two_directions import DirectedMixer, Direction, split_heads
from cvmk.nn.positions import Span
from cvmk.nn.state import MixerState, StateLayout, StateTensor

_CHUNK = 8
"""Positions whose scores are computed at once, with a decay a channel of each pair of them; what came before them is read from a state."""
_LARGEST = 20.0
"""Of the logarithm of a decay's logarithm: exp(-exp(20)) is 0 in every dtype, and its gradient is too."""
_MIXED = 5
"""What is made of x_t and x_{t-1}: receptance, key, value, gate and decay."""
_DEPTH = 0.5
"""Where in the model a layer is taken to stand, from 0 to 1: the published initial values run with the depth, and these are those of its middle."""


class _TimeMix(Direction):
    """The heads of one direction, normalised and gated. In the formulas of `RWKV`: m is `mix_first` and the m_i `mix`, A_i `mix_down` and B_i `mix_up`,
    d_0 `decay`, A `decay_down` and B `decay_up`, u `bonus`."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__(config, width)
        d = config.d_model
        self.heads, self.size = split_heads(config, width)
        self.outputs = width
        mix_rank, decay_rank = (64, 128) if d >= 4096 else (min(32, max(1, d // 8)), min(64, max(1, d // 4)))
        self.receptance, self.key, self.value, self.gate = (Linear(d, width, bias=False) for _ in range(4))
        self.mix_first = nn.Parameter(torch.empty(d))
        self.mix = nn.Parameter(torch.empty(_MIXED, d))
        self.mix_down, self.mix_up = nn.Parameter(torch.empty(_MIXED * mix_rank, d)), nn.Parameter(torch.empty(_MIXED, d, mix_rank))
        self.decay = nn.Parameter(torch.empty(width))
        self.decay_down, self.decay_up = nn.Parameter(torch.empty(decay_rank, d)), nn.Parameter(torch.empty(width, decay_rank))
        self.bonus = nn.Parameter(torch.empty(width))
        self.norm = nn.GroupNorm(self.heads, width, eps=64e-5)
        self._begin(d, width)

    @torch.no_grad()
    def _begin(self, d: int, width: int) -> None:
        """The published initial values, those of a layer in the middle of the model."""
        place, channel = torch.arange(d) / d, torch.arange(width) / max(1, width - 1)
        late = 1 - _DEPTH
        self.mix_first.copy_(1 - place**late)
        half = 1 - place ** (0.5 * late)
        self.mix.copy_(torch.stack((half, 1 - place**late, 1 - place**late - 0.3 * _DEPTH, half, 1 - place**late)))
        self.decay.copy_(-6 + 5 * channel ** (0.7 + 1.3 * _DEPTH))
        self.bonus.copy_(_DEPTH * (1 - channel) + 0.1 * ((torch.arange(width) + 1) % 3 - 1))
        for down, up in ((self.mix_down, self.mix_up), (self.decay_down, self.decay_up)):
            down.zero_()
            nn.init.uniform_(up, -0.01, 0.01)

    def _project(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [N, T, d] and the input before each -> r, k, v and log decays [N, H, T, D], in the dtype of the state, and the gate [N, T, w]."""
        apart = before - x
        low = torch.tanh(linear(x + apart * self.mix_first, self.mix_down, None, None)).unflatten(-1, (_MIXED, -1))
        lora = torch.einsum("ntmr,mdr->mntd", low, self.mix_up.to(low.dtype))
        r, k, v, g, w = (x + apart * (self.mix[part] + lora[part]) for part in range(_MIXED))
        (decay,) = exact(linear(torch.tanh(linear(w, self.decay_down, None, None)), self.decay_up, None, None))
        log_decay = -torch.exp((decay + self.decay).clamp(max=_LARGEST))
        parts = *exact(self.receptance(r), self.key(k), self.value(v)), log_decay
        r, k, v, log_decay = (part.unflatten(-1, (self.heads, self.size)).transpose(1, 2) for part in parts)
        return r, k, v, log_decay, self.gate(g)

    def _read(self, x: Tensor, before: Tensor, memory: Tensor | None, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """The results [N, T, w], and the state behind the last position that is real."""
        r, k, v, log_decay, gate = self._project(x, before)
        if real is not None:  # what neither adds nor decays leaves the state as it is
            padding = ~real[:, None, :, None]
            k, log_decay = k.masked_fill(padding, 0), log_decay.masked_fill(padding, 0)
        with exactly(r):
            bonus, scale, shift = exact(self.bonus.view(self.heads, self.size), self.norm.weight, self.norm.bias)
            mixed, after = wkv(r, k, v, log_decay, bonus, memory)
            together = mixed.transpose(1, 2).flatten(2)
            normed = F.group_norm(together.flatten(0, 1), self.heads, scale, shift, self.norm.eps).view(together.shape)
        return F.silu(gate) * normed.to(gate.dtype), after

    def forward(self, x: Tensor, span: Span) -> Tensor:
        return self._read(x, after_zeros(x, 1)[:, :-1], None, None)[0]

    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        width = self.receptance.in_features
        return {"before": StateTensor((1, width), dtype), "memory": StateTensor((self.heads, self.size, self.size), state_dtype(dtype))}

    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        before = after_recent(x, span, state, "before")[:, :-1]
        mixed, after = self._read(x, before, state["memory"], span.real(x.device))
        state["memory"].copy_(after)
        return mixed


class RWKV(DirectedMixer):
    """For r (receptance), k, v, g (gate) and d (decay), each of its own mixture of a token and the one before it (0 before the first):

        mix_i(x_t)  = x_t + (x_{t-1} - x_t) * (m_i + tanh((x_t + (x_{t-1} - x_t) * m) A_i) B_i)
        r, k, v, g  = mix_i(x_t) W_i
        w_t         = exp(-exp(d_0 + tanh(mix_d(x_t) A) B))                decay of each channel of the keys
        y_t         = r_t (S_{t-1} + diag(u) k_t^T v_t)                    per head of D channels; u is the bonus of the present token
        S_t         = diag(w_t) S_{t-1} + k_t^T v_t                        S [D, D], the state
        out         = W_O (silu(g_t) * norm(y_t))                          a group norm with a group a head, eps 64e-5, scale and shift

    It is the time mixing alone. Channel mixing is RWKV's feed-forward layer, and the block has one of its own (`model.activation`,
    without token shift), which stands in its place. The paper's heads have 64 channels; here they have d_model / heads.

    Whole sequences go in chunks of 8 positions. Inside them every pair of positions has its decays as the exponential of their sum from
    the one to the other, so that nothing is divided by a product of decays, however small it is: all exponents are sums of
    numbers <= 0, none a difference, and float32 is enough.

    Initial values are the published ones of a layer in the middle of the model (a mixer does not know its depth); the ranks of the A and B
    are 32 and 64 (of d_model from 4096 on 64 and 128), and at most d_model / 8 and d_model / 4. Only the matrices W decay, as published.

    Where it is not causal: two directions of half the heads each (`two_directions`).

    State a row and layer: heads * D * D numbers of float32 (of a float64 model float64), and the last input, d_model numbers of the model's
    dtype: in a model of float32 4 d_model^2 / heads + 4 d_model bytes, however long the text is. A step reads and writes them once.
    Parameters: 5 d_model^2 in matrices that decay (attention: 4).
    """

    direction = _TimeMix


def wkv(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = r_t (S_{t-1} + diag(bonus) k_t^T v_t) with S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t, and the last S.

    r, k and log_decay (<= 0) [N, H, T, Dk], v [N, H, T, Dv], bonus [H, Dk], memory = S_{-1} [N, H, Dk, Dv] (None: 0) -> [N, H, T, Dv], [N, H, Dk, Dv].
    """
    if memory is None:
        memory = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    found = []
    for start in range(0, r.shape[2], _CHUNK):
        part = slice(start, start + _CHUNK)
        chunk, memory = _chunk(r[:, :, part], k[:, :, part], v[:, :, part], log_decay[:, :, part], bonus, memory)
        found.append(chunk)
    return (torch.cat(found, dim=2) if found else v), memory


def _chunk(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """`wkv` of a few positions."""
    present = (r * bonus[:, None] * k).sum(-1, keepdim=True) * v
    if r.shape[2] == 1:
        return r @ memory + present, torch.exp(log_decay).transpose(-1, -2) * memory + k.transpose(-1, -2) @ v
    before = F.pad(log_decay, (0, 0, 1, 0))[:, :, :-1]  # of position t - 1
    since = before.cumsum(2)  # from the start up to and with t - 1
    at = torch.arange(r.shape[2], device=r.device)
    earlier = at[:, None] > at  # [t, s]: s < t
    between = before.unsqueeze(3).masked_fill(~(at[:, None] > at + 1)[..., None], 0).cumsum(2)  # [.., t, s, D]: sum over s < j < t
    weighted = torch.exp(between) * k.unsqueeze(2)
    scores = (weighted @ r.unsqueeze(-1)).squeeze(-1).masked_fill(~earlier, 0)
    mixed = scores @ v + present + (r * torch.exp(since)) @ memory
    behind = log_decay.flip(2).cumsum(2).flip(2)  # from t on to the end
    until = F.pad(behind[:, :, 1:], (0, 0, 0, 1))  # behind t to the end
    after = torch.exp(behind[:, :, :1]).transpose(-1, -2) * memory + (k * torch.exp(until)).transpose(-1, -2) @ v
    return mixed, after
