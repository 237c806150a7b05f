"""The short causal convolution (`ops.causal_conv1d`) as mixers use it: a layer with the activation behind it, and its few last inputs as a state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvmk import ops
from cvmk.nn.positions import Span
from cvmk.nn.state import MixerState, StateTensor

WIDTH = 4
"""Of Mamba's filters (Gu and Dao 2023)."""
_WINDOW = "window"


class CausalConv(nn.Module):
    """activation(convolution) of `channels`, each by a filter of `width` taps of its own; weight and bias begin uniform in +-1/sqrt(width), as
    PyTorch's convolutions do."""

    decayed = ("weight",)

    def __init__(self, channels: int, width: int = WIDTH, activation: str | None = "silu") -> None:
        super().__init__()
        self.activation, bound = activation, width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, lengths: Tensor | None = None, reverse: bool = False) -> Tensor:
        """Whole sequences x [N, T, channels] -> the same shape. Behind `lengths` (where they are told) nothing is read and 0 is given, which a convolution
        from the last real position to the first asks for."""
        lengths = None if lengths is None else lengths.to(x.device)
        out = ops.causal_conv1d(x, self.weight, self.bias, activation=self.activation, lengths=lengths, channels_last=True, reverse=reverse)
        assert isinstance(out, Tensor)
        return out

    def layout(self, dtype: torch.dtype) -> dict[str, StateTensor]:
        """The last inputs of a row, oldest first."""
        return {_WINDOW: StateTensor((self.weight.shape[0], self.weight.shape[1] - 1), dtype)}

    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        """The next positions x [N, T, channels] of rows that `state` remembers."""
        window = state[_WINDOW]
        if span.lengths is None and x.shape[1] == 1 and not torch.is_grad_enabled():
            return ops.causal_conv1d_update(window, x[:, 0], self.weight, self.bias, activation=self.activation).unsqueeze(1)
        lengths = None if span.lengths is None else span.lengths.to(x.device)
        out, last = ops.causal_conv1d(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            initial_state=window.clone(),
            lengths=lengths,
            return_last_state=True,
            channels_last=True,
        )
        window.copy_(last)
        return out
