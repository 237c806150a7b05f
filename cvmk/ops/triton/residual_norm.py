"""`residual_norm` in Triton: one launch forward, one backward and a sum over its programs. Rows of up to 16384."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import triton
from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops.reference import residual_norm as reference
from cvmk.ops.residual_norm import Call, Out, op, prepare, sum_dtype
from cvmk.ops.triton._launch import Case, kernels, launch, multiprocessors, sample
from cvmk.ops.triton._tuning import Config, Tuned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16384
"""Numbers of a row that the threads of a block hold at once."""


# -- block sizes --------------------------------------------------------------------------------------------------------------
def _config(key: str, capability: tuple[int, int]) -> Config:
    """Sixteen numbers a thread, in four warps or more."""
    n = int(key.rpartition("n")[2])
    return {"R": max(1, 2048 // n), "num_warps": max(4, min(32, n // 512)), "num_stages": 1}


def _candidates(key: str, capability: tuple[int, int]) -> list[Config]:
    n = int(key.rpartition("n")[2])
    tiles = [(elements, warps) for elements in (1024, 2048, 4096, 8192) for warps in (1, 2, 4, 8, 16) if elements >= n]
    return [{"R": elements // n, "num_warps": warps, "num_stages": 1} for elements, warps in tiles if 4 <= elements // (32 * warps) <= 32]


FORWARD = Tuned("residual_forward", _config, _candidates)
BACKWARD = Tuned("residual_backward", _config, _candidates)
TUNED = (FORWARD, BACKWARD)


@functools.cache
def _width(n: int) -> int:
    """The tile's: a power of two."""
    return max(16, 1 << (n - 1).bit_length())


def _key(dtype: torch.dtype, n: int) -> str:
    return f"{str(dtype).removeprefix('torch.')} n{_width(n)}"


# -- launches -------------------------------------------------------------------------------------------------------------------
def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _seed(c: Call) -> Tensor | None:
    return None if c.dropout_p <= 0 or c.branch is None else _contiguous(c.dropout_seed)


def forward(c: Call) -> Out:
    x, n = c.x.contiguous(), c.x.shape[-1]
    rows, dtype = x.numel() // n, sum_dtype(c)
    total = x.new_empty(0) if c.branch is None else torch.empty_like(x, dtype=dtype)
    normed = torch.empty_like(x, dtype=c.normed_dtype)
    stats = x.new_empty((2, *x.shape[:-1]) if c.keep_stats else (0,), dtype=torch.float32)
    config = FORWARD.config(_key(dtype, n), x.device)
    launch(
        kernels("residual_norm").residual_forward,
        (-(-rows // config["R"]),),
        x,
        _contiguous(c.branch),
        c.weight.contiguous(),
        _contiguous(c.bias),
        _seed(c),
        None if c.branch is None else total,
        normed,
        stats if c.keep_stats else None,
        rows,
        n,
        c.eps,
        1 / (1 - c.dropout_p),
        int(c.dropout_p * 2**32),
        RMS=c.rms,
        N=_width(n),
        **config,
    )
    return Out(total, normed, stats)


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    if grads.normed is None:  # nothing but dropout
        return reference.backward(grads, c, saved, needs)
    n = c.x.shape[-1]
    total = (c.x if c.branch is None else saved.sum).contiguous()
    rows = total.numel() // n
    dx = c.x.new_empty(c.x.shape) if needs.x else None
    dbranch = c.branch.new_empty(c.branch.shape) if needs.branch and c.branch is not None else None
    config = BACKWARD.config(_key(total.dtype, n), total.device)
    programs = min(-(-rows // config["R"]), 2 * multiprocessors(total.device))
    parts = total.new_empty((2, programs, n), dtype=torch.float32)
    launch(
        kernels("residual_norm").residual_backward,
        (programs,),
        total,
        saved.stats.contiguous(),
        c.weight.contiguous(),
        _seed(c),
        None if c.branch is None else _contiguous(grads.sum),
        grads.normed.contiguous(),
        dx,
        dbranch,
        parts,
        rows,
        n,
        1 / (1 - c.dropout_p),
        int(c.dropout_p * 2**32),
        RMS=c.rms,
        N=_width(n),
        **config,
    )
    dweight = parts[0].sum(0).to(c.weight.dtype) if needs.weight else None
    dbias = parts[1].sum(0).to(c.bias.dtype) if needs.bias and c.bias is not None else None
    return dx, dbranch, dweight, dbias


def _limits(which: str, c: Call) -> list[str]:
    named = {"branch": c.branch, "weight": c.weight, "bias": c.bias}
    wrong = [(name, tensor.dtype) for name, tensor in named.items() if tensor is not None and tensor.dtype not in DTYPES]
    found = [f"{name} is {dtype}, not float32, bfloat16 or float16" for name, dtype in wrong]
    return found + ([f"rows have {c.x.shape[-1]} numbers, more than {WIDEST}"] if c.x.shape[-1] > WIDEST else [])


_COMMON: dict[str, Any] = {"dtypes": DTYPES, "devices": triton.DEVICES, "unavailable": triton.reason, "by_default": triton.by_default}
BACKENDS = (Backend("residual_norm", "triton", forward, backward, limits=_limits, **_COMMON),)


# -- what the compile gate and `cvmk bench --tune` run --------------------------------------------------------------------------------
def _case(rows: int, n: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], norm: str = "layer", p: float = 0.1, branch: bool = True) -> Case:
    """dtypes: of x, of branch, and of weight and bias."""

    def run(device: torch.device) -> Any:
        x, b = (sample((rows, n), dtype, device) for dtype in dtypes[:2])
        weight, bias = (sample((n,), dtypes[2], device) for _ in range(2))
        c = prepare(x, b if branch else None, weight, bias if norm == "layer" else None, norm=norm, dropout_p=p)
        seed = torch.zeros(2, dtype=torch.int64, device=device) if c.dropout_p > 0 else None
        c = c._replace(dropout_seed=seed, keep_stats=True)
        out = forward(c)
        return backward(Out(out.sum if branch else None, out.normed, None), c, out, op.needs(*[True] * 4))  # type: ignore[arg-type]

    names = "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Case(f"{names} {rows}x{n} {norm} dropout {p:g}" + ("" if branch else " alone"), run)


_HALF, _SINGLE = torch.bfloat16, torch.float32
CASES = (
    _case(8192, 512, (_SINGLE, _HALF, _SINGLE)),
    _case(8192, 512, (_HALF, _HALF, _HALF)),
    _case(8192, 1024, (_HALF, _HALF, _SINGLE), p=0.0),
    _case(8192, 128, (_SINGLE, _SINGLE, _SINGLE)),
    _case(4096, 4096, (_HALF, _HALF, _HALF), norm="rms"),
    _case(2048, 16384, (_HALF, _HALF, _HALF), norm="rms", p=0.0),
    _case(8192, 512, (torch.float16, torch.float16, torch.float16), branch=False),
)
