"""Launches for coarse rows: those that a bias moves out of float32's reach (kernels/attention_coarse.py). Nothing is read back to see whether there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvmk.ops.triton import _launch
from cvmk.ops.triton._attention_call import Given, Sizes, strides


@dataclass(frozen=True)
class Statistics:
    """What the backward pass knows of coarse rows; other rows hold nothing."""

    delta: Tensor
    top: Tensor
    log: Tensor


def blocks(size: Sizes) -> dict[str, int]:
    """Float64 tiles of scores beside the operands: small ones."""
    d = max(size.constants["D_PADDED"], size.constants["DV_PADDED"])
    if size.dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 32, "BLOCK_N": 32 if d <= 64 else 16, "num_warps": 4 if d <= 64 else 8, "num_stages": 1}


def forward(size: Sizes, inputs: tuple[Tensor | None, ...], out: Tensor, lse: Tensor) -> None:
    """Write the coarse rows of `out` and `lse` anew. inputs: q, k, v, bias and the masks."""
    config = blocks(size)
    _launch.launch(
        _launch.kernels("attention_coarse").coarse_forward, (size.pairs * -(-size.rows * size.group // config["BLOCK_M"]),), *inputs, out, lse,
        *size.strides, *size.out_strides(size.constants["DV"]), *size.bias_strides, *size.numbers, size.keep_scale, **size.constants, **config,
    )  # fmt: skip


def gradients(size: Sizes, given: Given, wanted: list[Tensor | None], dbias: Tensor | None) -> Statistics:
    """Write the coarse rows of dq (and of `dbias`, where it has the shape of the scores), and add to dk and dv what they give."""
    dq, dk, dv = wanted
    config, kernels = blocks(size), _launch.kernels("attention_coarse")
    delta, log = size.statistic(), size.statistic()
    known = Statistics(delta, torch.empty(delta.shape, dtype=torch.float64, device=delta.device), log)
    ends: tuple[Any, ...] = (*size.bias_strides, *size.numbers, size.keep_scale, given.scale)
    _launch.launch(
        kernels.coarse_query_gradient, (size.pairs * -(-size.rows * size.group // config["BLOCK_M"]),), *given.inputs, given.grad, given.out, given.lse,
        given.grad_lse, known.delta, known.top, known.log, dq, dbias, *size.strides, *strides(given.grad), *size.out_strides(size.constants["DV"]),
        *size.out_strides(size.constants["D"]), *ends, **size.constants, **config,
    )  # fmt: skip
    if dk is not None or dv is not None:
        _launch.launch(
            kernels.coarse_key_gradient, (size.pairs * -(-size.keys // config["BLOCK_N"]),), *given.inputs, given.grad, given.lse, known.delta, known.top,
            known.log, dk, dv, *size.strides, *strides(given.grad), *(strides(dk) if dk is not None else (0, 0, 0)),
            *(strides(dv) if dv is not None else (0, 0, 0)), *ends, **size.constants, **config,
        )  # fmt: skip
    return known
