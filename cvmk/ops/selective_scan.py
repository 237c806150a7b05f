"""Selective scan (the recurrence of Mamba-1) over whole sequences, and the same recurrence one step at a time.

Formulas, for channel d, state n and time t (Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv 2312.00752, section 3 and algorithm 2; zero-order hold for A, Euler for B):

    step_t = softplus(delta_t + delta_bias)       softplus and bias where asked for; softplus(v) = v for v > 20
    a_t    = exp(step_t A)
    x_t    = a_t x_{t-1} + step_t u_t B_t         x_{-1} = initial_state, or 0
    y_t    = sum_n C_t x_t + D u_t
    out_t  = y_t silu(z_t)                        silu(v) = v sigmoid(v)

Gradients, with g the gradient of out, dy = g silu(z) and h_t that of x_t (G is the gradient of the last state):

    h_t     = C_t dy_t + a_{t+1} h_{t+1}          the last one: h_{L-1} = C dy + G
    dC_t    = sum_d dy_t x_t                      dB_t = sum_d h_t step_t u_t         (sums over the channels of a group)
    du_t    = D dy_t + step_t sum_n h_t B_t       dD = sum_{b,t} dy_t u_t             dz_t = g y_t s (1 + z (1 - s)), s = sigmoid(z)
    w_t     = h_t a_t x_{t-1}                     dA = sum_{b,t} step_t w_t
    dstep_t = u_t sum_n h_t B_t + sum_n w_t A     ddelta = dstep sigmoid(delta + delta_bias), d delta_bias = sum_{b,t} ddelta
    d initial_state = a_0 h_0
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvmk.ops._call import Written, make
from cvmk.ops._dtypes import accumulation_dtype, autocast_lower
from cvmk.ops._op import Op
from cvmk.ops._watch import autocast_enabled

_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
SCAN_CHUNK = 64
"""Time steps between two states that the forward pass keeps for the backward pass, which computes those between them again."""



class ScanCall(NamedTuple):
    """Where channels are last, u, delta and z are [batch, length, dim], and B and C [batch, length, groups, state]."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor  # [dim, state] or [batch, groups, state, length], as C
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    delta_softplus: bool
    reverse: bool
    channels_last: bool
    keep_states: bool


class ScanOut(NamedTuple):
    """states [batch, ceil(length / SCAN_CHUNK) * dim, state] holds, in the order of the scan (from the end when reversed), the state before each
    chunk: row c * dim + d is channel d before chunk c. A dimension of the chunks alone would be 1 for short inputs, and torch.export would then
    fix the length to them. No elements unless keep_states, which autograd sets. Packed sequences do not align with chunks."""

    out: Tensor
    last_state: Tensor
    states: Tensor


class UpdateCall(NamedTuple):
    """With heads or without; `with_heads` makes one form of them."""

    state: Written
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool


class UpdateOut(NamedTuple):
    y: Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    channels_last: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective scan along the last dimension; formulas and gradients stand at the top of this module.

    u              [batch, dim, length], floating point: its dtype is the result's.
    delta          [batch, dim, length]: step sizes, before bias and softplus.
    A              [dim, state] real. Any sign is legal; a decay (A < 0) is usual. Keep it in float32.
    B, C           [dim, state] the same at every step, or [batch, groups, state, length], or [batch, state, length] for one group;
                   `groups` divides dim, and channel d belongs to group d // (dim / groups).
    D              [dim], skip connection.
    z              [batch, dim, length], gate.
    delta_bias     [dim], added to delta.
    initial_state  [batch, dim, state]: the state before the first step. Packed: [sequences, dim, state].
    reverse        scan from the end to the start: the result equals that of flipped inputs, flipped. The initial state enters at
                   the end, the last state is the one after position 0. Packed: each sequence is reversed in its place.
    cu_seqlens     [sequences + 1], int32 or int64, on u's device: sequences packed one after the other along `length`, with batch
                   1; sequence i is positions cu_seqlens[i] up to cu_seqlens[i + 1], and no state passes from one to the next. It
                   must rise from 0 to length; empty sequences are legal. On the CPU anything else is refused; a device is not waited
                   for, and makes some division of the length of it.
    channels_last  u, delta, z and out are [batch, length, dim], and B and C [batch, length, state] or [batch, length, groups, state], as linear layers
                   give and take them: the same results, without a transposition on the CPU.

    Returns out [batch, dim, length] in u's dtype and, with return_last_state, (out, last state [batch or sequences, dim, state]).
    The last state is in the dtype of the computation: float32, or float64 where u is float64. An empty sequence's last state is
    its initial state, or zero. Every floating tensor has a gradient, through the last state too.

    Under autocast u, B, C and z are cast as the operands of a matrix product are; step sizes, A and the states keep their dtypes,
    since exponentials and sums run in float32.

    A NaN or an infinity in an argument reaches only what depends on it.
    Raises TypeError for a dtype and ValueError for a shape, a device or (on the CPU) cu_seqlens that do not fit.
    """
    out, last_state, _ = scan_op(
        _prepare_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            delta_softplus,
            initial_state=initial_state,
            return_last_state=return_last_state,
            reverse=reverse,
            cu_seqlens=cu_seqlens,
            channels_last=channels_last,
        )
    )
    return (out, last_state) if return_last_state else out


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Advance the selective scan by one time step: `state` is overwritten with the new state, y is returned.

    state          [batch, dim, state], or with heads [batch, heads, dim, state]; any floating dtype; any strides.
    x, dt, z       [batch, dim], or [batch, heads, dim].
    A              [dim, state], or [heads, dim, state] (expanded, stride 0, for one number a head).
    B, C           [batch, state] or [batch, groups, state]; `groups` divides dim, or heads where there are heads. B or C that
                   are constant, one row a channel, are `B.expand(batch, dim, state)`: as many groups as channels.
    D, dt_bias     [dim], or [heads, dim].

    Returns y [batch, dim] or [batch, heads, dim] in x's dtype. The computation is in float32 (float64 where x is float64); the
    state is rounded to its own dtype only when it is stored. Step by step this equals `selective_scan`.

    A NaN or an infinity in an argument reaches only what depends on it.
    There is no gradient: it is a step of inference. Raises RuntimeError if gradients are on and an argument asks for one,
    TypeError for a dtype and ValueError for a shape or device that does not fit.
    """
    out: Tensor = update_op(_prepare_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus))
    return out


# -- the scan ------------------------------------------------------------------------------------------------------------------
def _fake_scan(c: ScanCall) -> ScanOut:
    batch, dim, length = sizes_of(c)
    dtype, states = accumulation_dtype(c.u.dtype), c.A.shape[1]
    last_state = c.u.new_empty((sequences_of(c), dim, states), dtype=dtype)
    chunks = (length + SCAN_CHUNK - 1) // SCAN_CHUNK
    kept = c.u.new_empty((batch, chunks * dim, states) if c.keep_states else (0,), dtype=dtype)
    return ScanOut(c.u.new_empty(c.u.shape), last_state, kept)


def sequences_of(c: ScanCall) -> int:
    """How many sequences there are: rows of the batch, or packed ones."""
    return c.u.shape[0] if c.cu_seqlens is None else c.cu_seqlens.shape[0] - 1


def sizes_of(c: ScanCall) -> tuple[int, int, int]:
    """(batch, dim, length)."""
    batch, dim, length = c.u.shape
    return (batch, length, dim) if c.channels_last else (batch, dim, length)


def groups_of(c: ScanCall) -> int:
    """How many groups B and C have; 1 where neither varies over time. Channels are not last."""
    return c.B.shape[1] if c.B.dim() == 4 else c.C.shape[1] if c.C.dim() == 4 else 1


def _turned(tensor: Any) -> Any:
    """[batch, length, dim] <-> [batch, dim, length], and [batch, length, groups, state] -> [batch, groups, state, length]; constants stay."""
    if tensor is None or tensor.dim() < 3:
        return tensor
    return tensor.mT if tensor.dim() == 3 else tensor.permute(0, 2, 3, 1)


def time_last(c: ScanCall) -> ScanCall:
    """The same scan of views of its arguments, with channels not last."""
    return c._replace(u=c.u.mT, delta=c.delta.mT, B=_turned(c.B), C=_turned(c.C), z=_turned(c.z), channels_last=False)


def turning(forward: Any, backward: Any) -> tuple[Any, Any]:
    """The passes of a backend that knows time last only, for either order."""

    def either_forward(c: ScanCall) -> ScanOut:
        if not c.channels_last:
            found: ScanOut = forward(c)
            return found
        out, last_state, states = forward(time_last(c))
        return ScanOut(out.mT, last_state, states)

    def either_backward(g: ScanOut, c: ScanCall, saved: ScanOut, needs: Any) -> tuple[Tensor | None, ...]:
        if not c.channels_last:
            grads: tuple[Tensor | None, ...] = backward(g, c, saved, needs)
            return grads
        du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = backward(g._replace(out=_turned(g.out)), time_last(c), saved, needs)
        dB, dC = (grad.permute(0, 3, 1, 2) if grad is not None and grad.dim() == 4 else grad for grad in (dB, dC))
        return _turned(du), _turned(ddelta), dA, dB, dC, dD, _turned(dz), dbias, dinitial

    return either_forward, either_backward


scan_op = Op(
    "selective_scan",
    ScanCall,
    ScanOut,
    fake_forward=_fake_scan,
    differentiable=("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"),
    saved=("states",),
    keeps="keep_states",
)


@scan_op.prepared_by
def _prepare_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    channels_last: bool = False,
) -> ScanCall:
    device, tensors = u.device, (u, delta, A, B, C, D, z, delta_bias, initial_state)
    for tensor in tensors:
        if tensor is not None and (tensor.dtype not in _FLOATS or tensor.device != device):
            _check_tensors("selective_scan", dict(zip(ScanCall._fields, tensors, strict=False)), device)
    shape, rates = u.shape, A.shape
    of_steps = "[batch, length, dim]" if channels_last else "[batch, dim, length]"
    if len(shape) != 3:
        raise ValueError(f"u must be {of_steps}, not of shape {_shape(u)}")
    batch, dim, length = shape
    if channels_last:
        dim, length = length, dim
    if len(rates) != 2 or rates[0] != dim:
        raise ValueError(f"A must be [dim, state] with dim {dim} as u has it, not of shape {_shape(A)}")
    state = rates[1]
    if delta.shape != shape or (z is not None and z.shape != shape):
        _check_shape("delta", delta, f"{of_steps} as u is", shape)
        _check_shape("z", z, f"{of_steps} as u is", shape)
    if D is not None and D.shape != rates[:1]:
        _check_shape("D", D, "[dim]", (dim,))
    if delta_bias is not None and delta_bias.shape != rates[:1]:
        _check_shape("delta_bias", delta_bias, "[dim]", (dim,))
    B, B_groups = _with_groups("B", B, batch, dim, state, length, channels_last)
    C, C_groups = _with_groups("C", C, batch, dim, state, length, channels_last)
    if B_groups != C_groups and B_groups and C_groups:
        raise ValueError(f"B has {B_groups} groups and C has {C_groups}; give both the same number (expand the smaller one)")
    sequences = batch
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, u, length)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None and initial_state.shape != (sequences, dim, state):
        _check_shape("initial_state", initial_state, "[batch (packed: sequences), dim, state]", (sequences, dim, state))
    if autocast_enabled():
        u, B, C, z = autocast_lower(u, B, C, z)
    return make(ScanCall, (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, channels_last, False))


def _with_groups(name: str, tensor: Tensor, batch: int, dim: int, state: int, length: int, channels_last: bool) -> tuple[Tensor, int]:
    """B or C as [batch, groups, state, length] (channels last: [batch, length, groups, state]) with its groups, or as [dim, state] and 0."""
    sizes = tensor.shape
    if len(sizes) == 2:
        _check_shape(name, tensor, "[dim, state]", (dim, state))
        return tensor, 0
    if len(sizes) == 3:
        tensor = tensor.unsqueeze(2 if channels_last else 1)
        sizes = tensor.shape
    wanted = (batch, length, state) if channels_last else (batch, state, length)
    if len(sizes) != 4 or (sizes[0], sizes[1 if channels_last else 2], sizes[3]) != wanted:
        names = ("[batch, length, state]", "[batch, length, groups, state]") if channels_last else ("[batch, state, length]", "[batch, groups, state, length]")
        raise ValueError(
            f"{name} must be [dim, state], {names[0]} or {names[1]} with batch {batch}, dim {dim}, "
            f"state {state}, length {length}, not of shape {_shape(tensor)}"
        )
    groups = sizes[2 if channels_last else 1]
    if groups != 1:
        _check_groups(name, groups, dim, "dim")
    return tensor, groups


def check_boundaries(cu_seqlens: Tensor, length: int) -> None:
    """ValueError where packed sequences do not rise from 0 to `length`. For backends, where the numbers can be read without waiting for a device."""
    found = cu_seqlens.tolist()
    for i, (before, at) in enumerate(zip([0, *found], found, strict=False)):
        if not before <= at <= length or (i == 0 and at != 0) or (i == len(found) - 1 and at != length):
            raise ValueError(f"selective_scan: cu_seqlens must rise from 0 to {length}, the length, but element {i} is {at}")


def _check_cu_seqlens(cu_seqlens: Tensor, u: Tensor, length: int) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, not {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [sequences + 1], not of shape {_shape(cu_seqlens)}")
    if cu_seqlens.device != u.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and u on {u.device}; move it there")
    if u.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences along the length of a batch of 1, but u has batch {u.shape[0]}; concatenate along length")
    if cu_seqlens.shape[0] < 2 and length > 0:
        raise ValueError(f"cu_seqlens has {cu_seqlens.shape[0]} element, so it names no sequence, but u has length {length}")


# -- the single step -----------------------------------------------------------------------------------------------------------
update_op = Op("selective_state_update", UpdateCall, UpdateOut, fake_forward=lambda c: UpdateOut(c.x.new_empty(c.x.shape)), principal="x")


@update_op.prepared_by
def _prepare_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> UpdateCall:
    device, gradients, tensors = x.device, torch.is_grad_enabled(), (state, x, dt, A, B, C, D, z, dt_bias)
    for tensor in tensors:
        if tensor is not None and (tensor.dtype not in _FLOATS or tensor.device != device or (gradients and tensor.requires_grad)):
            _check_constants(dict(zip(UpdateCall._fields, tensors, strict=False)), device, gradients)
    sizes = state.shape
    if len(sizes) not in (3, 4):
        raise ValueError(f"state must be [batch, dim, state] or [batch, heads, dim, state], not of shape {_shape(state)}")
    steps, rows = sizes[:-1], sizes[1:-1]
    if x.shape != steps or dt.shape != steps or A.shape != sizes[1:] or (z is not None and z.shape != steps):
        names = "[batch, heads, dim]" if len(sizes) == 4 else "[batch, dim]"
        for name, tensor in (("x", x), ("dt", dt), ("z", z)):
            _check_shape(name, tensor, names, steps)
        _check_shape("A", A, names.replace("batch, ", "").replace("]", ", state]"), sizes[1:])
    if (D is not None and D.shape != rows) or (dt_bias is not None and dt_bias.shape != rows):
        for name, tensor in (("D", D), ("dt_bias", dt_bias)):
            _check_shape(name, tensor, "[heads, dim]" if len(sizes) == 4 else "[dim]", rows)
    flat = (sizes[0], sizes[-1])
    if B.shape != flat or C.shape != flat:
        for name, tensor in (("B", B), ("C", C)):
            have = tensor.shape
            if len(have) not in (2, 3) or have[0] != sizes[0] or have[-1] != sizes[-1]:
                wanted = f"[batch, state] or [batch, groups, state] with batch {sizes[0]} and state {sizes[-1]}"
                raise ValueError(f"{name} must be {wanted}, not of shape {_shape(tensor)}")
            if len(have) == 3:
                _check_groups(name, have[1], sizes[1], "heads" if len(sizes) == 4 else "dim")
    if autocast_enabled():
        x, B, C, z = autocast_lower(x, B, C, z)
    return make(UpdateCall, (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus))


def with_heads(c: UpdateCall) -> UpdateCall:
    """A single step with heads and groups: state [batch, heads, dim, state]; x, dt, z [batch, heads, dim];
    A [heads, dim, state]; B, C [batch, groups, state] with the same groups; D, dt_bias [heads, dim]. Without heads each channel is a head of
    dim 1.
    """
    state, x, dt, A, B, C, D, z, dt_bias, _ = c
    if state.dim() == 3:
        state, A, x, dt = state.unsqueeze(2), A.unsqueeze(1), x.unsqueeze(-1), dt.unsqueeze(-1)
        D, z, dt_bias = (None if tensor is None else tensor.unsqueeze(-1) for tensor in (D, z, dt_bias))
    B, C = (tensor.unsqueeze(1) if tensor.dim() == 2 else tensor for tensor in (B, C))
    if B.shape[1] != C.shape[1]:
        B, C = (tensor.repeat_interleave(state.shape[1] // tensor.shape[1], 1) for tensor in (B, C))
    return UpdateCall(state, x, dt, A, B, C, D, z, dt_bias, c.dt_softplus)


# -- checks --------------------------------------------------------------------------------------------------------------------
def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def _check_tensors(op: str, tensors: dict[str, Tensor | None], device: torch.device) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{op} needs real floating point numbers, but {name} is {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, not on {device} as the input is; move it there")


def _check_constants(tensors: dict[str, Tensor | None], device: torch.device, gradients: bool) -> None:
    _check_tensors("selective_state_update", tensors, device)
    for name, tensor in tensors.items():
        if gradients and tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"selective_state_update has no gradient, but {name} requires one; call it under torch.no_grad() or detach {name}")


def _check_shape(name: str, tensor: Tensor | None, meaning: str, shape: Any) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {meaning}, here [{', '.join(str(size) for size in shape)}], not of shape {_shape(tensor)}")


def _check_groups(name: str, groups: int, channels: int, what: str) -> None:
    if groups < 1 or channels % groups:
        raise ValueError(f"{name} has {groups} groups, which do not divide {what} {channels}")
