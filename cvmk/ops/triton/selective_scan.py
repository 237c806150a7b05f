"""Selective scan and its single step by Triton kernels (kernels/selective_scan*.py say how they work).

They compute in float32 whatever the inputs' dtypes are; float64 inputs go to the reference. Time has stride 1 in what the kernels read: other
layouts are copied. Whether a sequence is cut into segments depends on how many channels there are in the whole batch, so the
last bit of a result may depend on the size of the batch; it never depends on what the other rows hold, nor on the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import triton
from cvmk.ops._backend import Backend
from cvmk.ops.selective_scan import SCAN_CHUNK, ScanCall, ScanOut, UpdateCall, groups_of, scan_op, sequences_of, turning, with_heads
from cvmk.ops.triton import _launch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STATES = 256
_STEPS = 8
"""Steps of a tile."""
_KEPT = 4
"""Steps between two states that the backward pass keeps of the chunk it is in."""


def _power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _readable(tensor: Tensor) -> Tensor:
    """In a dtype that the kernels read."""
    return tensor if tensor.dtype in _DTYPES else tensor.float()


def _rows(tensor: Tensor) -> Tensor:
    """In a dtype that the kernels read, time with stride 1."""
    tensor = _readable(tensor)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _plain(tensor: Tensor | None) -> Tensor | None:
    """In float32 and contiguous."""
    return None if tensor is None else tensor.float().contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


class _Scan:
    """The arguments of a call as the kernels take them."""

    def __init__(self, c: ScanCall) -> None:
        self.batch, self.dim, self.length = c.u.shape
        self.states, self.groups, self.sequences = c.A.shape[1], groups_of(c), sequences_of(c)
        self.chunks = -(-self.length // SCAN_CHUNK)
        self.block_n = _power_of_2(self.states)
        self.u, self.delta, self.z = _rows(c.u), _rows(c.delta), None if c.z is None else _rows(c.z)
        self.A, self.D, self.bias, self.initial = _plain(c.A), _plain(c.D), _plain(c.delta_bias), _plain(c.initial_state)
        self.timed = {"B": c.B.dim() == 4, "C": c.C.dim() == 4}
        self.B, self.C = self._weights(c.B), self._weights(c.C)
        self.cu_seqlens = None if c.cu_seqlens is None else c.cu_seqlens.contiguous()
        self.options: dict[str, Any] = {"N": self.states, "BLOCK_N": self.block_n, "SOFTPLUS": c.delta_softplus, "REVERSE": c.reverse}

    def _weights(self, weights: Tensor) -> Tensor:
        """[dim, state], or [batch, groups, length + 16, BLOCK_N] with zeros around: a step's weights are one load without a mask."""
        weights = weights.float()
        if weights.dim() == 2:
            return weights.contiguous()
        return torch.nn.functional.pad(weights.transpose(2, 3), (0, self.block_n - self.states, _STEPS, _STEPS))

    def whole(self, *tensors: Tensor | None) -> bool:
        """Whether a thread loads 8 steps of a channel at once: 16 bytes, aligned."""
        there = [tensor for tensor in tensors if tensor is not None]
        return all(t.element_size() == 2 and t.stride(1) % 16 == 0 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in there)

    def tile(self, states_of_a_warp: int, smallest: int, most: int = 512) -> tuple[int, int]:
        """(channels, warps) of a program."""
        channels = max(min(most // self.block_n, 64, _power_of_2(self.dim // self.groups)), smallest)
        return channels, max(1, min(16, channels * self.block_n // states_of_a_warp))

    def programs(self, channels: int) -> int:
        return self.sequences * self.groups * -(-(self.dim // self.groups) // channels)

    def segmentation(self, channels: int, warps: int) -> tuple[int, int]:
        """(segments, steps of a segment). One segment where two warps a multiprocessor have work without: segments cost a second pass."""
        programs, places = self.programs(channels), _launch.multiprocessors(self.u.device)
        segments = 1
        if self.cu_seqlens is None and 0 < programs * warps < 2 * places:
            segments = min(self.chunks, -(-8 * places // (programs * warps)))
        steps = max(1, -(-self.chunks // max(segments, 1))) * SCAN_CHUNK
        return max(1, -(-self.length // steps)), steps

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def starts(self, values: Tensor, z: Tensor | None, initial: Tensor | None, segments: int, steps: int, adjoint: bool) -> Tensor:
        """The state with which each segment starts, [batch, segments, dim, state]; of the adjoint scan, the one with which it ends."""
        ends, decays = (self.empty(self.batch, segments, self.dim, self.states) for _ in range(2))
        weights, timed = (self.C, self.timed["C"]) if adjoint else (self.B, self.timed["B"])
        whole = self.whole(values, self.delta, z)
        channels, warps = self.tile(512 if whole else 256, 16)
        _launch.launch(
            _launch.kernels("selective_scan").segment_ends,
            (self.programs(channels), segments),
            *(values, self.delta, z, self.A, self.bias, weights, ends, decays),
            *(self.dim, self.groups, self.length, steps, *_strides(values), *_strides(self.delta), *_strides(z)),
            num_warps=warps,
            BLOCK_D=channels,
            WHOLE=whole,
            TIMED=timed,
            ADJOINT=adjoint,
            **self.options,
        )
        size = self.dim * self.states
        _launch.launch(
            _launch.kernels("selective_scan").segment_starts,
            (-(-self.batch * size // 256),),
            *(ends, decays, initial, segments, size, self.batch * size),
            BLOCK=256,
            ADJOINT=adjoint,
        )
        return ends


def scan_forward(c: ScanCall) -> ScanOut:
    scan = _Scan(c)
    out = torch.empty(c.u.shape, dtype=c.u.dtype, device=c.u.device)
    last = scan.empty(scan.sequences, scan.dim, scan.states)
    kept = scan.empty(scan.batch, scan.chunks * scan.dim, scan.states) if c.keep_states else None
    whole = scan.whole(scan.u, scan.delta, scan.z, out)
    channels, warps = scan.tile(512 if whole else 256, 16)
    segments, steps = scan.segmentation(channels, warps)
    starts = scan.initial if segments == 1 else scan.starts(scan.u, None, scan.initial, segments, steps, adjoint=False)
    _launch.launch(
        _launch.kernels("selective_scan").scan_forward,
        (scan.programs(channels), segments),
        *(scan.u, scan.delta, scan.z, out, scan.A, scan.D, scan.bias, scan.B, scan.C, starts, scan.cu_seqlens, last, kept),
        *(scan.dim, scan.groups, scan.length, scan.chunks, steps, *_strides(scan.u), *_strides(scan.delta), *_strides(scan.z)),
        num_warps=warps,
        BLOCK_D=channels,
        WHOLE=whole,
        TIMED_B=scan.timed["B"],
        TIMED_C=scan.timed["C"],
        **scan.options,
    )
    return ScanOut(out, last, scan.empty(0) if kept is None else kept)


def scan_backward(g: ScanOut, c: ScanCall, saved: ScanOut, needs: Any) -> tuple[Tensor | None, ...]:
    scan = _Scan(c)
    grad = torch.zeros_like(scan.u) if g.out is None else _rows(g.out)
    channels, warps = scan.tile(256, 16, most=256)
    segments, steps = scan.segmentation(channels, warps)
    ends = _plain(g.last_state)
    if segments > 1:
        ends = scan.starts(grad, scan.z, ends, segments, steps, adjoint=True)
    dims, pieces = (scan.dim, scan.states), scan.sequences * segments
    blocks = -(-scan.dim // scan.groups // channels)
    of_step = (scan.batch, scan.groups, blocks, scan.length, scan.block_n)
    du, ddelta = torch.empty_like(c.u, memory_format=torch.contiguous_format), torch.empty(c.u.shape, dtype=scan.delta.dtype, device=c.u.device)
    dz = None if scan.z is None else torch.empty(c.u.shape, dtype=scan.z.dtype, device=c.u.device)
    dA = scan.empty(pieces, *dims)
    dB, dC = (scan.empty(*of_step) if timed else scan.empty(pieces, *dims) for timed in scan.timed.values())
    dD, dbias = (None if tensor is None else scan.empty(pieces, scan.dim) for tensor in (c.D, c.delta_bias))
    dinitial = None if c.initial_state is None else scan.empty(scan.sequences, *dims)
    scratch = scan.empty(scan.programs(channels) * segments, SCAN_CHUNK // _KEPT, channels, scan.block_n)
    _launch.launch(
        _launch.kernels("selective_scan_backward").scan_backward,
        (scan.programs(channels), segments),
        *(grad, scan.u, scan.delta, scan.z, scan.A, scan.D, scan.bias, scan.B, scan.C, scan.initial, ends, scan.cu_seqlens, saved.states.contiguous(), scratch),
        *(du, ddelta, dz, dA, dB, dC, dD, dbias, dinitial),
        *(scan.dim, scan.groups, scan.length, scan.chunks, steps),
        *(*_strides(grad), *_strides(scan.u), *_strides(scan.delta), *_strides(scan.z)),
        num_warps=warps,
        BLOCK_D=channels,
        TIMED_B=scan.timed["B"],
        TIMED_C=scan.timed["C"],
        **scan.options,
    )

    def weights(found: Tensor) -> Tensor:
        return found.sum(0) if found.dim() == 3 else found.sum(2)[..., : scan.states].transpose(2, 3)

    results: tuple[Callable[[], Any], ...] = (
        lambda: du,
        lambda: ddelta,
        lambda: dA.sum(0),
        lambda: weights(dB),
        lambda: weights(dC),
        lambda: dD.sum(0),  # type: ignore[union-attr]
        lambda: dz,
        lambda: dbias.sum(0),  # type: ignore[union-attr]
        lambda: dinitial,
    )
    return tuple(None if tensor is None or not needed else result().to(tensor.dtype) for tensor, needed, result in zip(c[:9], needs, results, strict=True))


def update_forward(c: UpdateCall) -> Tensor:
    state, x, dt, A, B, C, D, z, dt_bias, softplus = with_heads(c)
    batch, heads, dim, states = state.shape
    dt, A, B, C = (_readable(tensor) for tensor in (dt, A, B, C))
    D, z, dt_bias = (None if tensor is None else _readable(tensor) for tensor in (D, z, dt_bias))
    y = torch.empty((batch, heads, dim), dtype=x.dtype, device=x.device)
    block_n = _power_of_2(states)
    block = max(1, min(512 // block_n, _power_of_2(heads * dim)))
    _launch.launch(
        _launch.kernels("selective_state_update").state_update,
        (batch * -(-heads * dim // block),),
        *(state, x, dt, A, B, C, D, z, dt_bias, y),
        *(heads, dim, B.shape[1], *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride()),
        *((0, 0) if D is None else D.stride()),
        *((0, 0, 0) if z is None else z.stride()),
        *((0, 0) if dt_bias is None else dt_bias.stride()),
        num_warps=4 if block * block_n >= 512 else 1,
        N=states,
        BLOCK_N=block_n,
        BLOCK=block,
        SOFTPLUS=softplus,
    )
    return y.view(c.x.shape)


def update_limits(which: str, c: UpdateCall) -> list[str]:
    found = [] if c.state.dtype in _DTYPES else [f"state is {c.state.dtype}, not one of {', '.join(map(str, _DTYPES))}"]
    if not 1 <= c.state.shape[-1] <= 4096:
        found.append(f"a row has {c.state.shape[-1]} states, not 1 ... 4096")
    return found


def limits(which: str, c: ScanCall) -> list[str]:
    states = c.A.shape[-1]
    return [f"A has {states} states, the kernels hold 1 ... {MAX_STATES} in registers"] if not 1 <= states <= MAX_STATES else []


_OPTIONS: dict[str, Any] = {"dtypes": _DTYPES, "devices": triton.DEVICES, "unavailable": triton.reason, "by_default": triton.by_default}
BACKENDS = (
    Backend("selective_scan", "triton", *turning(scan_forward, scan_backward), limits=limits, **_OPTIONS),
    Backend("selective_state_update", "triton", update_forward, limits=update_limits, **_OPTIONS),
)


# -- calls that are compiled and timed ---------------------------------------------------------------------------------------------
def _case(
    name: str,
    batch: int,
    dim: int,
    length: int,
    states: int,
    dtype: torch.dtype,
    *,
    constant: bool = False,
    options: bool = True,
    packed: int = 0,
    reverse: bool = False,
) -> _launch.Case:
    def run(device: torch.device) -> None:
        def sample(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
            return _launch.sample(shape, kind, device, scale)

        u, delta, grad = (sample(batch, dim, length, scale=0.5) for _ in range(3))
        A = -sample(dim, states, kind=torch.float32).exp()
        B, C = (sample(dim, states) if constant else sample(batch, 1, states, length) for _ in range(2))
        D, bias = (sample(dim, kind=torch.float32) if options else None for _ in range(2))
        z = sample(batch, dim, length) if options else None
        bounds = torch.linspace(0, length, packed + 1, device=device).to(torch.int32) if packed else None
        c = ScanCall(u, delta, A, B, C, D, z, bias, None, bounds, options, reverse, False, True)
        scan_backward(ScanOut(grad, None, None), c, scan_forward(c), scan_op.needs(*[True] * 9))  # type: ignore[arg-type]

    return _launch.Case(name, run)


def _step_case(name: str, batch: int, rows: tuple[int, int], states: int, dtype: torch.dtype, state_dtype: torch.dtype) -> _launch.Case:
    def run(device: torch.device) -> None:
        def sample(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return _launch.sample(shape, kind, device)

        A, D = -sample(*rows, states, kind=torch.float32).exp(), sample(*rows, kind=torch.float32)
        B, C = sample(batch, 1, states), sample(batch, 1, states)
        x, dt, z = (sample(batch, *rows) for _ in range(3))
        update_forward(UpdateCall(sample(batch, *rows, states, kind=state_dtype), x, dt, A, B, C, D, z, D, True))

    return _launch.Case(name, run)


CASES = (
    _step_case("step bf16", 64, (4096, 1), 16, torch.bfloat16, torch.float32),
    _step_case("step bf16 heads", 64, (64, 64), 128, torch.bfloat16, torch.bfloat16),
    _step_case("step fp32", 1, (2048, 1), 16, torch.float32, torch.float32),
    _case("bf16", 8, 2048, 2048, 16, torch.bfloat16),
    _case("bf16 few channels", 1, 512, 2048, 16, torch.bfloat16),
    _case("bf16 odd length reversed", 8, 2048, 1999, 16, torch.bfloat16, reverse=True),
    _case("bf16 packed", 1, 2048, 8192, 16, torch.bfloat16, packed=32),
    _case("bf16 64 states", 8, 2048, 2048, 64, torch.bfloat16),
    _case("bf16 5 states, constant B and C", 8, 2048, 2048, 5, torch.bfloat16, constant=True),
    _case("fp16", 8, 2048, 2048, 16, torch.float16),
    _case("fp32", 8, 2048, 2048, 16, torch.float32),
    _case("fp32 plain", 8, 2048, 2048, 16, torch.float32, options=False),
)
