"""The selective scan (`ops.selective_scan`) as mixers use it: whole sequences in one direction or in both, or from a state onwards."""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk import ops
from cvmk.nn.positions import Span

_STAYS = -1e4
"""A step size before softplus whose softplus is 0 in every dtype: the state stays as it is, bit for bit."""


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    *,
    reverse: bool = False,
) -> Tensor:
    """Whole sequences u, delta (before softplus) and z [N, T, D] -> [N, T, D]; A [D, S], B and C [D, S] or [N, T, S].

    A reversed scan comes through the padding first: u must be 0 there, so that the state is 0 at each row's last real position.
    """
    out = ops.selective_scan(u, delta, A, B, C, D, z, delta_softplus=True, reverse=reverse, channels_last=True)
    assert isinstance(out, Tensor)
    return out


def scan_from(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, span: Span
) -> Tensor:
    """As `scan`, onwards from `state` [N, D, S], which is overwritten with that behind each row's last real position."""
    real = span.real(u.device)
    if real is None and u.shape[1] == 1 and not torch.is_grad_enabled():
        B, C = (weights.expand(u.shape[0], *weights.shape) if weights.dim() == 2 else weights[:, 0] for weights in (B, C))
        gate = None if z is None else z[:, 0]
        return ops.selective_state_update(state, u[:, 0], delta[:, 0], A, B, C, D, gate, dt_softplus=True).unsqueeze(1)
    if real is not None:
        padding = ~real[..., None]
        u, delta = u.masked_fill(padding, 0), delta.masked_fill(padding, _STAYS)
    before = state.clone()
    out, last = ops.selective_scan(
        u, delta, A, B, C, D, z, delta_softplus=True, initial_state=before, return_last_state=True, channels_last=True
    )
    state.copy_(last)
    return out


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a recurrent state in a model of this dtype: no coarser than float32, for a state is a sum over all that was."""
    return torch.promote_types(dtype, torch.float32)
