"""Hyena (Poli et al. 2023, "Hyena Hierarchy: Towards Larger Convolutional Language Models", arXiv 2302.10866): gates and long convolutions."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvmk.config.schema import ModelConfig
from cvmk.nn.linear import Linear
from cvmk.nn.mixers.conv import CausalConv
from cvmk.nn.mixers.exact import exact
from cvmk.nn.mixers.recurrence import state_dtype
from cvmk.nn.mixers.two_directions import DirectedMixer, Direction
from cvmk.nn.positions import Span
from cvmk.nn.state import GROWS, MixerState, StateLayout, StateTensor

_ORDER = 2
"""Long convolutions, each with a gate behind it."""
_SHORT = 3
"""Taps of the short filter behind the projections."""
_BANDS, _HIDDEN, _FREQUENCY = 16, 64, 14.0
"""Of the implicit filter: frequencies of its features of the position, its width, and the initial frequency of its sines."""


class _ImplicitFilter(nn.Module):
    """Taps h_t of `channels` filters as a function of t: exp(-rate t / length) W_3 s(W_2 s(W_1 s(W_0 features(t)))), s(x) = sin(frequency x).

    features(t) [1 + 2 bands]: t / length, and cosines and sines of 2 pi f t / length for frequencies f from 1e-4 to bands - 1.

    Sines of sines make a rounding of the first some thousand times larger. So taps are computed in float64, that those of a step are those of
    training, and in a model that is cast to less than float32 the parameters here are not: bfloat16 would change the taps by a third.
    """

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.channels, self.length = channels, length
        sizes = [1 + 2 * _BANDS, _HIDDEN, _HIDDEN, _HIDDEN]
        self.weights = nn.ParameterList([torch.empty(out, into) for into, out in zip(sizes, [*sizes[1:], channels], strict=True)])
        self.biases = nn.ParameterList([torch.empty(size) for size in sizes[1:]])
        self.frequency = nn.Parameter(torch.full((_HIDDEN,), _FREQUENCY))
        for weight in self.weights:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for weight, bias in zip(self.weights, self.biases, strict=False):
            nn.init.uniform_(bias, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)

    def forward(self, positions: Tensor) -> Tensor:
        """positions [...], integers -> taps [..., channels] in the dtype of a state."""
        time = positions.double().unsqueeze(-1) / self.length
        angles = 2 * math.pi * time * torch.linspace(1e-4, _BANDS - 1, _BANDS, dtype=time.dtype, device=time.device)
        hidden, frequency = torch.cat((time, angles.cos(), -angles.sin()), dim=-1), self.frequency.double()
        for weight, bias in zip(self.weights, self.biases, strict=False):
            hidden = torch.sin(frequency * F.linear(hidden, weight.double(), bias.double()))
        taps = F.linear(hidden, self.weights[-1].double()) * torch.exp(-time * self._rates(time))
        return taps.to(state_dtype(self.frequency.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def wide(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype.itemsize >= min(4, tensor.dtype.itemsize) else tensor.to(moved.device)

        return super()._apply(wide, recurse)  # type: ignore[no-untyped-call]

    def _rates(self, like: Tensor) -> Tensor:
        """Rates [channels] of the window: of one convolution from a fall to 1 % in 1.5 lengths to one in 0.3 lengths; no parameters, as published."""
        each = torch.linspace(-math.log(0.01) / 1.5, -math.log(0.01) / 0.3, self.channels // _ORDER, dtype=like.dtype, device=like.device)
        return each.repeat(_ORDER)


class _Hyena(Direction):
    """One direction. `project` has the rows [v; x_1; x_2], `short` their filters from the oldest tap to that of the present; `skip` has the b_n."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__(config, width)
        self.outputs = width
        self.project = Linear(config.d_model, (width,) * (1 + _ORDER), bias=config.bias)
        self.short = CausalConv((1 + _ORDER) * width, _SHORT, None)
        self.filter = _ImplicitFilter(_ORDER * width, config.max_length)
        self.skip = nn.Parameter(torch.randn(_ORDER, width))

    def _taps(self, count: int, device: torch.device) -> list[Tensor]:
        """The first `count` taps of each convolution, [count, w]."""
        return list(self.filter(torch.arange(count, device=device)).chunk(_ORDER, dim=-1))

    def forward(self, x: Tensor, span: Span) -> Tensor:
        projected = self.project(x)
        z, *gates = exact(*self.short(projected).chunk(1 + _ORDER, dim=-1))
        real, skips, taps = span.real(x.device), exact(self.skip)[0], self._taps(x.shape[1], x.device)
        for order, gate in enumerate(gates):
            if real is not None:  # through the transforms padding would reach what is before it, by rounding
                z = z.masked_fill(~real.unsqueeze(-1), 0)
            z = gate * (long_convolution(z, taps[order]) + skips[order] * z)
        return z.to(projected.dtype)

    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        layout = self.short.layout(dtype)
        for kind in ("taps", "inputs"):
            layout |= {f"{kind}.{order}": StateTensor((GROWS, self.outputs), state_dtype(dtype)) for order in range(_ORDER)}
        return layout

    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        projected, steps = self.project(x), span.count == 1 and span.lengths is None
        z, *gates = exact(*self.short.extend(projected, span, state).chunk(1 + _ORDER, dim=-1))
        taps = self._append_taps(span, state, x)
        whole = taps if steps else self._taps(span.end, x.device)
        skips = exact(self.skip)[0]
        for order, gate in enumerate(gates):
            inputs = state.append(f"inputs.{order}", z, span)
            mixed = _at_the_end(inputs, whole[order], span) if steps else _from_the_start(inputs, whole[order], span)
            z = gate * (mixed + skips[order] * z)
        return z.to(projected.dtype)

    def _append_taps(self, span: Span, state: MixerState, x: Tensor) -> list[Tensor]:
        """The taps of each convolution up to span.end, [N, end, w], of which a row has as many as positions."""
        at = torch.arange(span.count, device=x.device)
        at = span.start + at if isinstance(span.start, int) else span.indices()
        new = self.filter(at).expand(x.shape[0], -1, -1).chunk(_ORDER, dim=-1)
        return [state.append(f"taps.{order}", one, span) for order, one in enumerate(new)]


class Hyena(DirectedMixer):
    """Of order 2, with v, x_1 and x_2 projections of the input behind causal filters of three taps, one a channel:

        z_1     = v
        z_{n+1} = x_n * (h_n conv z_n + b_n z_n)         n = 1, 2; conv is causal, one long filter h_n a channel
        out     = W_O z_3
        h_n(t)  = exp(-a t / L) FFN(t / L, cos and sin of 2 pi f t / L), for t = 0 ... L - 1, L = model.max_length

    FFN has three hidden layers of 64 sines, and rates a from a fall to 1 % in 1.5 L to one in 0.3 L over the channels (the published settings for
    language). As the filter is a function of t / L, a model's L belongs to its weights. Convolutions are computed by Fourier transforms of twice the
    sequence's length in float32 (of a float64 model float64): O(T log T) for T positions, causal to rounding.

    It is causal. Where that is not asked for: two directions of half the width each (`two_directions`), with filters of their own.

    There is no state of fixed size: a step is a sum over all positions so far and costs O(t), as attention's does, and what is kept grows. It is the
    input of both convolutions and, so that a step need not compute them all again, their taps: 4 d_model numbers of float32 a row and
    layer for each position, 16 d_model t bytes, and 6 d_model numbers of the model's dtype. Several positions at once cost a transform of all so far.
    Initial values are the published ones. Parameters: 4 d_model^2 in matrices that decay (attention: 4); long filters and skips do not decay, as published.
    """

    direction = _Hyena
    reads_max_length: ClassVar[bool] = True


def long_convolution(z: Tensor, taps: Tensor) -> Tensor:
    """y_t = sum over s <= t of h_{t - s} z_s for each channel: z [N, T, C], h [T, C] -> [N, T, C]."""
    count = z.shape[1]
    if not z.numel():
        return z * taps
    size = 2 * count
    product = torch.fft.rfft(z, n=size, dim=1) * torch.fft.rfft(taps, n=size, dim=0)
    convolved: Tensor = torch.fft.irfft(product, n=size, dim=1)
    return convolved[:, :count]


def _at_the_end(inputs: Tensor, taps: Tensor, span: Span) -> Tensor:
    """The convolution at the one new position of each row, [N, 1, C], from inputs and taps [N, end, C] that are there up to it."""
    if isinstance(span.start, int):
        return (inputs * taps[:1].flip(1)).sum(1, keepdim=True)  # all rows have the same taps
    apart = span.start[:, None] - torch.arange(span.end, device=inputs.device)
    rows = torch.arange(inputs.shape[0], device=inputs.device)[:, None]
    return (inputs * taps[rows, apart.clamp(min=0)]).masked_fill((apart < 0).unsqueeze(-1), 0).sum(1, keepdim=True)


def _from_the_start(inputs: Tensor, taps: Tensor, span: Span) -> Tensor:
    """The convolution at all new positions, [N, T, C], from inputs [N, end, C] that are there up to each row's last real one and taps [end, C]."""
    count, start = span.count if span.lengths is None else span.lengths, span.start
    ends = torch.as_tensor(start + count, device=inputs.device).reshape(-1, 1)
    there = torch.arange(span.end, device=inputs.device) < ends
    mixed = long_convolution(inputs.masked_fill(~there.unsqueeze(-1), 0), taps)
    if isinstance(start, int):
        return mixed[:, start : start + span.count]
    rows = torch.arange(inputs.shape[0], device=inputs.device)[:, None]
    return mixed[rows, span.indices().clamp(max=max(span.end - 1, 0))]
