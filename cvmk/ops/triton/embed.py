"""`embed` in Triton: a launch forward; one backward, and PyTorch's sum of rows by id, which has one order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops import triton
from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops.embed import Call, Out, op, prepare
from cvmk.ops.reference.embed import sum_rows
from cvmk.ops.triton._launch import Case, kernels, launch, sample
from cvmk.ops.triton._tuning import Config, Tuned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# -- block sizes --------------------------------------------------------------------------------------------------------------
def _config(key: str, capability: tuple[int, int]) -> Config:
    """Sixteen numbers a thread of four warps."""
    n = int(key.removeprefix("n"))
    return {"R": 2048 // n, "N": n, "num_warps": 4, "num_stages": 1}


def _candidates(key: str, capability: tuple[int, int]) -> list[Config]:
    n = int(key.removeprefix("n"))
    return [{"R": elements // n, "N": n, "num_warps": warps, "num_stages": 1} for elements in (1024, 2048, 4096) for warps in (2, 4, 8) if elements >= n]


ROWS = Tuned("embed_rows", _config, _candidates)
TUNED = (ROWS,)


def _tiles(rows: int, n: int, device: torch.device) -> tuple[tuple[int, int], Config]:
    """The grid, and the configuration by the next power of two of a row's length, up to 1024."""
    config = ROWS.config(f"n{min(1024, max(16, 1 << (n - 1).bit_length()))}", device)
    return (-(-rows // config["R"]), -(-n // config["N"])), config


# -- launches -------------------------------------------------------------------------------------------------------------------
def _dropout(c: Call) -> tuple[float, int]:
    """The factor of what stays, and the limit under which an element is dropped."""
    return 1 / (1 - c.dropout_p), int(c.dropout_p * 2**32)


def _seed(c: Call) -> Tensor | None:
    return None if c.dropout_seed is None or c.dropout_p <= 0 else c.dropout_seed.contiguous()


def forward(c: Call) -> Tensor:
    vocabulary, n = c.weight.shape
    positions = None if c.positions is None else c.positions.contiguous()
    out = c.weight.new_empty((*c.ids.shape, n))
    grid, config = _tiles(c.ids.numel(), n, out.device)
    launch(
        kernels("embed").embed_forward,
        grid,
        c.ids.contiguous(),
        c.weight.contiguous(),
        positions,
        _seed(c),
        out,
        c.ids.numel(),
        n,
        vocabulary,
        1 if positions is None else max(1, positions.numel() // n),
        c.scale,
        *_dropout(c),
        **config,
    )
    return out


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> Tensor | None:
    if not needs.weight:
        return None
    n = c.weight.shape[1]
    rows = grads.out.new_empty(grads.out.shape, dtype=torch.float32)
    grid, config = _tiles(c.ids.numel(), n, rows.device)
    launch(kernels("embed").embed_rows, grid, grads.out.contiguous(), _seed(c), rows, c.ids.numel(), n, c.scale, *_dropout(c), **config)
    return sum_rows(c, rows).to(c.weight.dtype)


def _limits(which: str, c: Call) -> list[str]:
    return [] if c.positions is None or c.positions.dtype in DTYPES else [f"positions are {c.positions.dtype}"]


_COMMON: dict[str, Any] = {"dtypes": DTYPES, "devices": triton.DEVICES, "unavailable": triton.reason, "by_default": triton.by_default}
BACKENDS = (Backend("embed", "triton", forward, backward, limits=_limits, **_COMMON),)


# -- what the compile gate and `cvmk bench --tune` run --------------------------------------------------------------------------------
def _case(n: int, dtype: torch.dtype, p: float, positions: bool = True) -> Case:
    def run(device: torch.device) -> Any:
        ids = torch.zeros((128, 64), dtype=torch.int64, device=device)
        weight, table = (sample((rows, n), dtype, device) for rows in (32000, 64))
        c = prepare(ids, weight, table if positions else None, scale=n**0.5, dropout_p=p)
        c = c._replace(dropout_seed=torch.zeros(2, dtype=torch.int64, device=device) if p else None)
        return backward(Out(forward(c)), c, Out(None), op.needs(True))  # type: ignore[arg-type]

    return Case(f"{str(dtype).removeprefix('torch.')} n{n} dropout {p:g}" + (" positions" if positions else ""), run)


CASES = (
    _case(512, torch.bfloat16, 0.1),
    _case(512, torch.float32, 0.1),
    _case(1024, torch.bfloat16, 0.0, False),
    _case(128, torch.float16, 0.1),
)
