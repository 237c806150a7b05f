"""`flash_attention` in Triton: float32, bfloat16 and float16 with sums in float32, all options, any head sizes up to 256.

Forward: one launch; few rows (a step of decoding) go over chunks of keys of a fixed size and a second launch that adds those up.
Backward: short sequences in one launch; else the gradient of the queries (and D_i on the way), then that of keys and values. The gradient
of a bias takes one more. Where there is a bias, each is followed by a launch for the rows that it moves out of float32's reach. What a row
gives depends on its own keys and on the sizes of the tensors, not on the rest of the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import triton
from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import not_needed
from cvmk.ops.attention import Call, Out, op, row_bias_gradient
from cvmk.ops.triton import _attention_coarse, _launch
from cvmk.ops.triton._attention_blocks import BIAS, FORWARD, KEYS, QUERIES, SHORT_BACKWARD
from cvmk.ops.triton._attention_call import DTYPES, SHORT, WIDEST, Given, Sizes, masks, padded, rows_contiguous, sizes, strides

CHUNK = 256
"""Keys of one program where few rows see many keys."""
FEW = 16
"""Most rows (queries times the query heads of a key head) that are split over their keys."""


def forward(c: Call) -> Out:
    """(out, lse) of `cvmk.ops.flash_attention`."""
    c = c._replace(q=rows_contiguous(c.q), k=rows_contiguous(c.k), v=rows_contiguous(c.v))
    q, k, v, bias, size, dv = c.q, c.k, c.v, c.bias, sizes(c), c.v.shape[-1]
    out, lse = size.empty(dv), size.statistic()
    if out.numel() == 0:
        return Out(out, lse.fill_(-math.inf) if size.keys == 0 else lse)
    rows = size.rows * size.group
    few = rows <= FEW and not size.packed
    one = few or (size.keys <= SHORT and not size.packed)
    key = f"{size.width} few" if few else size.one_tile if one else size.long
    config, chunk = FORWARD.config(key, q.device), CHUNK if few else 0
    chunks = -(-size.keys // chunk) if few else 1
    kernels = _launch.kernels("attention_forward")
    grid = (size.pairs * -(-rows // config["BLOCK_M"]), max(1, chunks))
    o_strides = size.out_strides(dv)
    ends = (*size.strides, *o_strides, *size.bias_strides, *size.numbers, size.keep_scale, size.pairs)
    options = {**size.constants, **config, "ONE": one, "CHUNK": chunk}
    if chunks <= 1:
        _launch.launch(kernels.forward, grid, q, k, v, bias, *masks(c), out, lse, None, *ends, **options)
        return _with_coarse_rows(c, size, Out(out, lse))
    parts = torch.empty((chunks, lse.numel(), dv), dtype=torch.float32, device=q.device)
    tops, totals = (torch.empty((chunks, lse.numel()), dtype=torch.float32, device=q.device) for _ in range(2))
    _launch.launch(kernels.forward, grid, q, k, v, bias, *masks(c), parts, tops, totals, *ends, **options)
    _launch.launch(
        kernels.combine, (lse.numel(),), parts, tops, totals, out, lse, *o_strides, size.heads, size.rows, chunks, lse.numel(), size.keep_scale,
        DV=dv, DV_PADDED=size.constants["DV_PADDED"], num_warps=1,
    )  # fmt: skip
    return _with_coarse_rows(c, size, Out(out, lse))


def _with_coarse_rows(c: Call, size: Sizes, made: Out) -> Out:
    if c.bias is not None:
        _attention_coarse.forward(size, (c.q, c.k, c.v, c.bias, *masks(c)), *made)
    return made


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and bias."""
    c = c._replace(q=rows_contiguous(c.q), k=rows_contiguous(c.k), v=rows_contiguous(c.v))
    bias, want_bias = c.bias, c.bias is not None and needs.bias
    out, lse = saved.out.contiguous(), saved.lse.contiguous()
    grad_out = torch.zeros_like(out) if grads.out is None else rows_contiguous(grads.out)
    grad_lse = None if grads.lse is None else grads.lse.contiguous()
    wanted: list[Tensor | None] = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None for t, needed in zip((c.q, c.k, c.v), needs, strict=False)
    ]
    dbias = None
    if c.q.numel() == 0 or c.k.numel() == 0 or out.numel() == 0:
        wanted = [None if t is None else t.zero_() for t in wanted]
        dbias = torch.zeros_like(bias) if want_bias else None  # type: ignore[arg-type]
    else:
        # The sum over a row's keys needs no kernel; a bias without any broadcasting comes with the queries' gradient.
        by_row = want_bias and (bias.dim() == 0 or bias.shape[-1] == 1)  # type: ignore[union-attr]
        size = sizes(c)
        given = Given((c.q, c.k, c.v, bias, *masks(c)), bias, grad_out, grad_lse, out, lse, c.scale)
        dbias, delta, known = _launch_gradients(size, given, wanted, want_bias and not by_row)
        if by_row:
            dbias = row_bias_gradient(bias, lse, grad_lse)  # type: ignore[arg-type]
        elif want_bias and dbias is None:
            dbias = bias_gradient(size, given, delta, known)  # type: ignore[arg-type]
    dq, dk, dv = (not_needed(c.q) if t is None else t for t in wanted)
    return dq, dk, dv, not_needed(c.q) if dbias is None else dbias


def _launch_gradients(
    size: Sizes, given: Given, wanted: list[Tensor | None], want_bias: bool
) -> tuple[Tensor | None, Tensor | None, _attention_coarse.Statistics | None]:
    """Fill `wanted`, the gradients of q, k and v. Returns the bias's where it fell off, D - (gradient of lse) where it was made, and, with a bias,
    what is known of coarse rows."""
    dq, dk, dv = wanted
    rows, bias, grad = size.rows * size.group, given.bias, given.grad
    ends = (*size.bias_strides, *size.numbers, size.keep_scale, given.scale)
    needed = bias is not None and (want_bias or any(x is not None for x in wanted))
    short = SHORT // 2 if size.dtype == torch.float32 else SHORT
    if not size.packed and rows <= short and size.keys <= short:
        delta = size.statistic() if want_bias else None
        _launch.launch(
            _launch.kernels("attention_short").short_backward, (size.pairs,), *given.inputs, grad, given.lse, given.grad_lse, delta,
            dq, dk, dv, *size.strides, *strides(grad), *ends, **size.constants,
            **{"BLOCK_M": padded(rows), "BLOCK_N": padded(size.keys), **SHORT_BACKWARD.config(size.one_tile, size.device)},
        )  # fmt: skip
        return None, delta, _attention_coarse.gradients(size, given, wanted, None) if needed else None
    kernels = _launch.kernels("attention_backward")
    whole = want_bias and bias is not None and bias.numel() == size.pairs * rows * size.keys
    dbias = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device) if whole and bias is not None else None
    if whole and dq is None:
        dq = size.empty(size.constants["D"])
    delta = size.statistic()
    if dq is not None or dk is not None or want_bias:
        config = QUERIES.config(size.long, size.device)
        _launch.launch(
            kernels.query_gradient, (size.pairs * -(-rows // config["BLOCK_M"]),), *given.inputs, grad, given.out, given.lse, given.grad_lse,
            delta, dq, dbias, *size.strides, *strides(grad), *size.out_strides(size.constants["DV"]), *size.out_strides(size.constants["D"]), *ends,
            **size.constants, **config,
        )  # fmt: skip
    if dk is not None or dv is not None:
        config = KEYS.config(size.long, size.device)
        _launch.launch(
            kernels.key_gradient, (size.pairs * -(-size.keys // config["BLOCK_N"]),), *given.inputs, grad, given.lse, delta, dk, dv,
            *size.strides, *strides(grad), *(strides(dk) if dk is not None else (0, 0, 0)), *(strides(dv) if dv is not None else (0, 0, 0)), *ends,
            **size.constants, **config,
        )  # fmt: skip
    return dbias, delta, _attention_coarse.gradients(size, given, [dq, dk, dv], dbias) if needed else None


def bias_gradient(size: Sizes, given: Given, delta: Tensor, known: _attention_coarse.Statistics) -> Tensor:
    """The gradient of a bias that is broadcast over batch items, heads or rows (not over keys)."""
    bias = given.bias
    assert bias is not None
    config = BIAS.config(f"{size.width} bias", size.device)
    numbers, (tiles, shares) = _bias_units(size, bias, config, 2 * _launch.multiprocessors(size.device))
    sums = torch.empty((shares, *bias.shape), dtype=torch.float32, device=bias.device)
    ends = (*size.strides, *strides(given.grad), *size.bias_strides, *size.numbers, size.keep_scale)
    by_rows = (1, *bias.shape)[-2] == size.rows
    _launch.launch(
        _launch.kernels("attention_bias").bias_gradient, (tiles, shares), *given.inputs, given.grad, given.lse, delta, sums, *ends, *numbers,
        ROWS=by_rows, **size.constants, **config,
    )  # fmt: skip
    config = _attention_coarse.blocks(size)
    numbers, grid = _bias_units(size, bias, config, 2 * _launch.multiprocessors(size.device), shares)
    _launch.launch(
        _launch.kernels("attention_coarse").coarse_bias_gradient, grid, *given.inputs, given.grad, given.lse, known.delta, known.top, known.log, sums,
        *ends, *numbers, ROWS=by_rows, **size.constants, **config,
    )  # fmt: skip
    return (sums[0] if shares == 1 else sums.sum(0)).to(bias.dtype)


def _bias_units(size: Sizes, bias: Tensor, config: dict[str, int], programs: int, most: int = 1 << 30) -> tuple[tuple[int, ...], tuple[int, int]]:
    """own_batch to share of `bias_gradient`, and its grid: about `programs`, in at most so many shares."""
    own_batch, own_heads, own_rows, _ = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    row_tiles = -(-size.rows // config["BLOCK_M"])
    by_rows = own_rows == size.rows
    own_tiles, all_tiles = (row_tiles, 1) if by_rows else (1, row_tiles)
    all_heads = size.heads // own_heads
    units = size.batch // own_batch * all_heads * all_tiles
    tiles = own_batch * own_heads * own_tiles * -(-size.keys // config["BLOCK_N"])
    share = -(-units // max(1, min(units, -(-programs // tiles), most)))
    return (own_batch, own_heads, own_tiles, all_heads, all_tiles, units, share), (tiles, -(-units // share))


TUNED = (FORWARD, QUERIES, KEYS, SHORT_BACKWARD, BIAS)


# -- what is taken ------------------------------------------------------------------------------------------------------------------------
def _limits(which: str, c: Call) -> list[str]:
    return [f"{name} has head size {x.shape[-1]}, more than {WIDEST}" for name, x in (("q", c.q), ("v", c.v)) if x.shape[-1] > WIDEST]


BACKENDS = (
    Backend(
        "flash_attention", "triton", forward, backward, dtypes=DTYPES, devices=triton.DEVICES,
        limits=_limits, unavailable=triton.reason, by_default=triton.by_default,
    ),
)  # fmt: skip


# -- what the compile gate and the tuner run -------------------------------------------------------------------------------------------
def _case(
    name: str, dtype: torch.dtype, sizes: tuple[int, int, int, int, int, int], dv: int | None = None, backwards: bool = True, **options: Any
) -> _launch.Case:
    """sizes: batch, heads, heads of keys, rows, keys, head size; options: flash_attention's, a shape for bias, True for key_lengths, `packed` sequences."""
    batch, heads, kv_heads, rows, keys, d = sizes

    def run(device: torch.device) -> None:
        q, k, v = (
            _launch.sample((batch, n, t, size), dtype, device) for n, t, size in ((heads, rows, d), (kv_heads, keys, d), (kv_heads, keys, dv or d))
        )
        bias = _launch.sample(options["bias"], dtype, device) if "bias" in options else None
        lengths = torch.full((batch,), keys, dtype=torch.int32, device=device) if "key_lengths" in options else None
        cu = None
        if "packed" in options:
            q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
            cu = torch.arange(options["packed"] + 1, dtype=torch.int32, device=device) * (rows // options["packed"])
        p = options.get("dropout_p", 0.0)
        seed = torch.zeros(2, dtype=torch.int64, device=device) if p > 0 else None
        right = 0 if "causal" in options else -1
        call = Call(q, k, v, bias, lengths, None, cu, cu, seed, options.get("left", -1), right, options.get("softcap", 0.0), d**-0.5, p)
        out = forward(call)
        if backwards:
            backward(Out(out.out, None), call, out, op.needs(True, True, True, bias is not None))  # type: ignore[arg-type]

    return _launch.Case(name, run)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    _case("bf16 d64 causal", _BF16, (4, 16, 16, 2048, 2048, 64), causal=True),
    _case("bf16 d128 groups, lengths", _BF16, (4, 32, 8, 1024, 1024, 128), key_lengths=True),
    _case("bf16 d256 causal", _BF16, (1, 16, 16, 2048, 2048, 256), causal=True),
    _case("fp16 d64 all options", _FP16, (4, 16, 16, 1024, 1024, 64), causal=True, left=255, dropout_p=0.1, bias=(1, 16, 1024, 1024), softcap=20.0),
    _case("bf16 d128 bias of keys", _BF16, (4, 16, 16, 1024, 1024, 128), bias=(4, 1, 1, 1024)),
    _case("bf16 d64 packed", _BF16, (1, 8, 8, 4096, 4096, 64), packed=2, causal=True),
    _case("bf16 d64 packed, short", _BF16, (1, 8, 8, 8192, 8192, 64), packed=256),
    _case("fp32 d64 causal", _FP32, (4, 8, 8, 1024, 1024, 64), causal=True),
    _case("bf16 d64 short", _BF16, (512, 8, 8, 64, 64, 64), key_lengths=True),
    _case("bf16 d32 short causal", _BF16, (512, 8, 8, 32, 32, 32), causal=True, key_lengths=True),
    _case("fp32 d32 short", _FP32, (64, 8, 8, 32, 32, 32), key_lengths=True),
    _case("fp32 d32 short, bias of keys", _FP32, (64, 8, 8, 32, 32, 32), bias=(64, 1, 1, 32)),
    _case("bf16 d64 one query", _BF16, (8, 32, 8, 1, 8192, 64), backwards=False, causal=True, key_lengths=True),
    _case("bf16 d128 one query", _BF16, (8, 32, 8, 1, 8192, 128), backwards=False),
)
