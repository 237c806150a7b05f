"""Selective scan and its single step in plain PyTorch: the law of the fused kernels, and the fallback where there is none.

The recurrence runs step by step, one operation for all channels of a block of the batch; what does not depend on the state before
(decays, input terms, outputs) is computed for SCAN_CHUNK steps at once. Nothing is divided by a product of decays and no
exponential of a sum is taken, so any A is right. On a CPU a Hillis-Steele scan over chunks takes 2 to 8 times as long: its
log2(chunk) passes over memory cost more than one small operation a step.

Within this file states are [batch, groups, state, channels of a group] and what is per step has the time in front, so that the
innermost loop of every operation is over channels. Tensors carry their shape: T time in a chunk, B batch, G groups, N state,
P channels of a group, S packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._dtypes import accumulation_dtype
from cvmk.ops._watch import unobserved
from cvmk.ops.selective_scan import SCAN_CHUNK, ScanCall, ScanOut, UpdateCall, check_boundaries, groups_of, turning, with_heads

_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""How many elements a tensor of one chunk's states may have before the batch is cut into blocks."""


@dataclass
class _Markers:
    """Where packed sequences begin and end in the order of the scan, and which sequence a position belongs to; each [length]."""

    first: Tensor
    final: Tensor
    sequence: Tensor
    count: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, length: int, reverse: bool) -> _Markers:
        if unobserved((cu_seqlens,)) is not None:
            check_boundaries(cu_seqlens, length)
        count = cu_seqlens.shape[0] - 1
        positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        # With empty sequences several begin at one position; the last of them is the one that holds it. The clamp keeps a wrong
        # cu_seqlens from reading outside the tensors.
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True).clamp_(max=max(count - 1, 0))
        first, final = positions == cu_seqlens[:-1][sequence], positions == cu_seqlens[1:][sequence] - 1
        if reverse:
            first, final, sequence = final.flip(0), first.flip(0), sequence.flip(0)
        return cls(first, final, sequence, count)

    def rows(self, mask: Tensor, span: slice) -> Tensor:
        """For each position of the span the sequence it belongs to where `mask` holds, and a row behind all sequences elsewhere."""
        return self.sequence[span].masked_fill(~mask[span], self.count)


@dataclass
class _Chunk:
    """The inputs of one chunk of time; B and C are [T, B, G, N] or constant [G, N, P]."""

    span: slice
    u: Tensor
    raw: Tensor
    step: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None


class _Scan:
    """The arguments of one call, brought into the layout of this file: flipped when reversed, in the dtype of the computation."""

    def __init__(self, c: ScanCall) -> None:
        self.batch, self.dim, self.length = c.u.shape
        self.groups, self.states = groups_of(c), c.A.shape[1]
        self.width = self.dim // self.groups
        self.dtype, self.device, self.reverse, self.softplus = accumulation_dtype(c.u.dtype), c.u.device, c.reverse, c.delta_softplus
        self.A_GNP = self.inner(c.A)
        self.u, self.delta, self.z = self.ordered(c.u), self.ordered(c.delta), None if c.z is None else self.ordered(c.z)
        self.B = self.ordered(c.B) if c.B.dim() == 4 else self.inner(c.B)
        self.C = self.ordered(c.C) if c.C.dim() == 4 else self.inner(c.C)
        self.D, self.bias = (None if tensor is None else tensor.to(self.dtype).view(self.groups, self.width) for tensor in (c.D, c.delta_bias))
        self.initial = None if c.initial_state is None else self.inner(c.initial_state)
        self.markers = None if c.cu_seqlens is None else _Markers.of(c.cu_seqlens, self.length, c.reverse)

    def ordered(self, tensor: Tensor) -> Tensor:
        """The time in the order of the scan."""
        return tensor.flip(-1) if self.reverse else tensor

    def inner(self, tensor: Tensor) -> Tensor:
        """[..., dim, state] as [..., G, N, P]."""
        apart: Tensor = tensor.to(self.dtype).unflatten(-2, (self.groups, self.width))
        return apart.transpose(-1, -2).contiguous()

    def outer(self, tensor: Tensor) -> Tensor:
        """[..., G, N, P] as [..., dim, state], in fresh memory."""
        return tensor.transpose(-1, -2).clone(memory_format=torch.contiguous_format).flatten(-3, -2)

    def blocks(self) -> list[slice]:
        """Slices of the batch, so that the states of a chunk stay small; one for an empty batch too."""
        row = max(1, min(self.length, SCAN_CHUNK) * self.dim * self.states)
        size = max(1, _BLOCK_ELEMENTS.get(self.device.type, 1 << 24) // row)
        return [slice(start, min(start + size, self.batch)) for start in range(0, max(self.batch, 1), size)]

    def chunk(self, rows: slice, start: int) -> _Chunk:
        span = slice(start, min(start + SCAN_CHUNK, self.length))
        u, raw = self.channels(self.u, rows, span), self.channels(self.delta, rows, span)
        if self.bias is not None:
            raw = raw + self.bias
        step = F.softplus(raw) if self.softplus else raw
        B, C = (tensor if tensor.dim() == 3 else self.time_first(tensor, rows, span) for tensor in (self.B, self.C))
        return _Chunk(span, u, raw, step, B, C, None if self.z is None else self.channels(self.z, rows, span))

    def time_first(self, tensor: Tensor, rows: slice, span: slice) -> Tensor:
        return tensor[rows, ..., span].movedim(-1, 0).to(self.dtype, memory_format=torch.contiguous_format).contiguous()

    def channels(self, tensor_BDL: Tensor, rows: slice, span: slice) -> Tensor:
        apart: Tensor = self.time_first(tensor_BDL, rows, span).unflatten(-1, (self.groups, self.width))
        return apart

    def start(self, rows: slice) -> Tensor:
        """The state before the first step [B, G, N, P]; packed sequences bring theirs in where they begin."""
        if self.initial is not None and self.markers is None:
            return self.initial[rows]
        return self.A_GNP.new_zeros((rows.stop - rows.start, *self.A_GNP.shape))

    def ends(self) -> Tensor | None:
        """Packed: where last states are collected, [S + 1, G, N, P]; the row behind takes what belongs to no sequence's end."""
        if self.markers is None:
            return None
        ends = self.A_GNP.new_zeros((self.markers.count + 1, *self.A_GNP.shape))
        if self.initial is not None:
            ends[:-1] = self.initial
        return ends

    def entries(self, span: slice) -> Tensor | None:
        """Packed: the state with which the sequence of each position begins [T, 1, G, N, P]; None where that is 0."""
        if self.markers is None or self.initial is None:
            return None
        return self.initial[self.markers.sequence[span]].unsqueeze(1)


def _along_states(tensor: Tensor, weights: Tensor) -> Tensor:
    """Sum over N of tensor [T, B, G, N, P] times weights [T, B, G, N] or [G, N, P]: [T, B, G, P]."""
    if weights.dim() == 3:
        return (tensor * weights).sum(-2)
    return torch.matmul(weights.unsqueeze(-2), tensor).squeeze(-2)


def _outer(values: Tensor, weights: Tensor) -> Tensor:
    """values [T, B, G, P] times weights [T, B, G, N] or [G, N, P]: [T, B, G, N, P]."""
    return values.unsqueeze(-2) * (weights if weights.dim() == 3 else weights.unsqueeze(-1))


def _recur(scan: _Scan, chunk: _Chunk, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decays, the states before each step, and those after; each [T, B, G, N, P]. `before` is the state before the chunk."""
    decay = (chunk.step.unsqueeze(-2) * scan.A_GNP).exp_()
    drive = _outer(chunk.step * chunk.u, chunk.B)
    markers, entries = scan.markers, scan.entries(chunk.span)
    tracked = torch.is_grad_enabled() and (decay.requires_grad or drive.requires_grad or before.requires_grad)
    state, previous, after = before, [], []
    reached = None if tracked else drive.new_empty((drive.shape[0] + 1, *drive.shape[1:]))
    if reached is not None and markers is None:
        reached[0] = before
    for t, (decay_t, drive_t) in enumerate(zip(decay.unbind(0), drive.unbind(0), strict=True)):
        if markers is not None:
            entry = state.new_zeros(()) if entries is None else entries[t]
            state = torch.where(markers.first[chunk.span.start + t], entry, state)
            previous.append(state)
        state = torch.addcmul(drive_t, decay_t, state, out=None if reached is None else reached[t + 1])
        after.append(state)
    if reached is None:
        return decay, decay, torch.stack(after)
    return decay, reached[:-1] if markers is None else torch.stack(previous), reached[1:]


def _output(scan: _Scan, chunk: _Chunk, states: Tensor) -> Tensor:
    """y before the gate, [T, B, G, P]."""
    y = _along_states(states, chunk.C)
    return y if scan.D is None else y + scan.D * chunk.u


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _over_time(scan: _Scan, pieces: list[Tensor], shape: Any) -> Tensor:
    """Chunks [T, B, ...] in the order of the scan as one tensor of `shape` [B, ..., length]."""
    if not pieces:
        return scan.A_GNP.new_zeros(shape)
    return scan.ordered(_joined(pieces).movedim(0, -1).reshape(shape))


def scan_forward(c: ScanCall) -> ScanOut:
    """Forward pass; plain operations that autograd can follow, any number of times."""
    scan = _Scan(c)
    outs, lasts, kept = [], [], []
    for rows in scan.blocks():
        state, ends = scan.start(rows), scan.ends()
        pieces, boundaries = [], []
        for start in range(0, scan.length, SCAN_CHUNK):
            chunk = scan.chunk(rows, start)
            if c.keep_states:
                boundaries.append(scan.outer(state))
            _, _, states = _recur(scan, chunk, state)
            y = _output(scan, chunk, states)
            pieces.append((y if chunk.z is None else y * F.silu(chunk.z)).to(c.u.dtype))
            if scan.markers is not None and ends is not None:
                ends.index_copy_(0, scan.markers.rows(scan.markers.final, chunk.span), states.squeeze(1))
            state = states[-1]
        count = rows.stop - rows.start
        outs.append(_over_time(scan, pieces, (count, scan.dim, scan.length)).to(c.u.dtype))
        lasts.append(scan.outer(state if ends is None else ends[:-1]))
        kept.append(torch.cat(boundaries, 1) if boundaries else scan.A_GNP.new_zeros((count, 0, scan.states) if c.keep_states else (0,)))
    return ScanOut(_joined(outs), _joined(lasts), _joined(kept))


class _Gradients:
    """Sums over batch and time, in the layout of this file."""

    def __init__(self, scan: _Scan) -> None:
        self.A = torch.zeros_like(scan.A_GNP)
        self.B, self.C = torch.zeros_like(scan.A_GNP), torch.zeros_like(scan.A_GNP)
        self.D = scan.A_GNP.new_zeros(scan.groups, scan.width)
        self.bias = torch.zeros_like(self.D)


def scan_backward(g: ScanOut, c: ScanCall, saved: ScanOut, needs: Any) -> tuple[Tensor | None, ...]:
    """The gradient by the formulas of `cvmk/ops/selective_scan.py`, the last chunk first. `states` has no gradient of its own."""
    scan = _Scan(c)
    grad_out = scan.ordered(torch.zeros_like(c.u) if g.out is None else g.out)
    grad_last = None if g.last_state is None else scan.inner(g.last_state)
    if scan.markers is not None and grad_last is not None:
        grad_last = torch.cat([grad_last, scan.A_GNP.new_zeros((1, *scan.A_GNP.shape))])
    sums = _Gradients(scan)
    shapes = {"u": c.u.shape, "delta": c.u.shape, "z": c.u.shape, "B": c.B.shape, "C": c.C.shape}
    timed: dict[str, list[Tensor]] = {name: [] for name in shapes}
    entering = []
    for rows in scan.blocks():
        pieces, grad_before = _block_backward(scan, rows, saved.states, grad_out, grad_last, sums, needs)
        entering.append(grad_before)
        for name, found in pieces.items():
            if found or not scan.length:
                timed[name].append(_over_time(scan, found[::-1], (rows.stop - rows.start, *shapes[name][1:])))
    results: tuple[Callable[[], Tensor], ...] = (
        lambda: _joined(timed["u"]),
        lambda: _joined(timed["delta"]),
        lambda: scan.outer(sums.A),
        lambda: _joined(timed["B"]) if c.B.dim() == 4 else scan.outer(sums.B),
        lambda: _joined(timed["C"]) if c.C.dim() == 4 else scan.outer(sums.C),
        lambda: sums.D.reshape(-1),
        lambda: _joined(timed["z"]),
        lambda: sums.bias.reshape(-1),
        lambda: scan.outer(_joined(entering)),
    )
    return tuple(None if tensor is None or not needed else result().to(tensor.dtype) for tensor, needed, result in zip(c[:9], needs, results, strict=True))


def _block_backward(
    scan: _Scan, rows: slice, states: Tensor, grad_out: Tensor, grad_last: Tensor | None, sums: _Gradients, needs: Any
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """The gradients of what is per step, a list of chunks each, the last first; and that of the initial states."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in ("u", "delta", "z", "B", "C")}
    carry = scan.A_GNP.new_zeros((rows.stop - rows.start, *scan.A_GNP.shape))
    starts = None
    if scan.markers is not None:
        # An empty sequence hands its initial state on; the others are overwritten at their first step.
        starts = carry.new_zeros((scan.markers.count + 1, *scan.A_GNP.shape)) if grad_last is None else grad_last.clone()
    elif grad_last is not None:
        carry += grad_last[rows]
    for index, start in reversed(list(enumerate(range(0, scan.length, SCAN_CHUNK)))):
        chunk = scan.chunk(rows, start)
        before, g = scan.inner(states[rows, index * scan.dim : (index + 1) * scan.dim]), scan.channels(grad_out, rows, chunk.span)
        carry = _chunk_backward(scan, chunk, before, carry, g, grad_last, starts, sums, pieces, needs)
    return pieces, carry if starts is None else starts[:-1]


def _chunk_backward(
    scan: _Scan,
    chunk: _Chunk,
    before: Tensor,
    carry: Tensor,
    g: Tensor,
    grad_last: Tensor | None,
    starts: Tensor | None,
    sums: _Gradients,
    pieces: dict[str, list[Tensor]],
    needs: Any,
) -> Tensor:
    """Add the gradients of one chunk to `sums` and `pieces`; return the gradient of the state before it, `carry` being that after."""
    decay, previous, after = _recur(scan, chunk, before)
    dy = g
    if chunk.z is not None:
        gate = torch.sigmoid(chunk.z)
        dy = g * chunk.z * gate
        if needs.z:
            pieces["z"].append(g * _output(scan, chunk, after) * gate * (1 + chunk.z * (1 - gate)))
    h = _adjoint(scan, chunk, decay, carry, dy, grad_last)
    for needed, constant, name, total, factor, values in (
        (needs.B, chunk.B.dim() == 3, "B", sums.B, h, chunk.step * chunk.u),
        (needs.C, chunk.C.dim() == 3, "C", sums.C, after, dy),
    ):
        if needed and constant:
            total += (factor * values.unsqueeze(-2)).sum((0, 1))
        elif needed:
            pieces[name].append(torch.matmul(factor, values.unsqueeze(-1)).squeeze(-1))
    from_input = _along_states(h, chunk.B)
    if needs.u:
        du = from_input * chunk.step
        pieces["u"].append(du if scan.D is None else du.addcmul_(dy, scan.D))
    if needs.D:
        sums.D += (dy * chunk.u).sum((0, 1))
    through = h.mul_(decay)
    carry = through[0].clone()
    if scan.markers is not None and starts is not None:
        starts.index_copy_(0, scan.markers.rows(scan.markers.first, chunk.span), through.squeeze(1))
        carry.masked_fill_(scan.markers.first[chunk.span.start], 0)
    w = through.mul_(previous)
    if needs.delta or needs.delta_bias:
        ddelta = from_input.mul_(chunk.u).add_(_along_states(w, scan.A_GNP))
        if scan.softplus:
            ddelta *= torch.where(chunk.raw > 20, 1.0, torch.sigmoid(chunk.raw))
        pieces["delta"].append(ddelta)
        sums.bias += ddelta.sum((0, 1))
    if needs.A:
        sums.A += w.mul_(chunk.step.unsqueeze(-2)).sum((0, 1))
    return carry


def _adjoint(scan: _Scan, chunk: _Chunk, decay: Tensor, carry: Tensor, dy: Tensor, grad_last: Tensor | None) -> Tensor:
    """h [T, B, G, N, P], the gradients of the states after each step; `carry` is what comes back from the next chunk."""
    h = _outer(dy, chunk.C)
    markers = scan.markers
    if markers is not None and grad_last is not None:
        h += grad_last[markers.rows(markers.final, chunk.span)].unsqueeze(1)
    h[-1] += carry
    for t in reversed(range(h.shape[0] - 1)):
        if markers is None:
            h[t].addcmul_(decay[t + 1], h[t + 1])
        else:
            h[t] += (decay[t + 1] * h[t + 1]).masked_fill_(markers.first[chunk.span.start + t + 1], 0)
    return h


def update_forward(c: UpdateCall) -> Tensor:
    """One step; `state` is overwritten."""
    state, x, dt, A, B, C, D, z, dt_bias, softplus = with_heads(c)
    dtype, heads = accumulation_dtype(x.dtype), state.shape[1]
    step, value = dt.to(dtype), x.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if softplus:
        step = F.softplus(step)
    # Groups are laid out over the heads: [batch, heads, 1, state].
    B_BH1N, C_BH1N = (tensor.to(dtype).repeat_interleave(heads // tensor.shape[1], 1).unsqueeze(2) for tensor in (B, C))
    new = (step.unsqueeze(-1) * A.to(dtype)).exp_().mul_(state.to(dtype)).addcmul_((step * value).unsqueeze(-1), B_BH1N)
    state.copy_(new)
    y = new.mul_(C_BH1N).sum(-1)
    if D is not None:
        y = y.addcmul_(value, D.to(dtype))
    if z is not None:
        y = y.mul_(F.silu(z.to(dtype)))
    return y.to(x.dtype).view(c.x.shape)


BACKENDS = (
    Backend("selective_scan", "reference", *turning(scan_forward, scan_backward)),
    Backend("selective_state_update", "reference", update_forward),
)
