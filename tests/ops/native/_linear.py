"""What the tests of the native linears share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from new_process import said

from cvmk.ops import native

ACTIVATIONS = (None, "relu", "gelu", "silu", "swiglu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = native.LEVELS[: native.LEVELS.index(native.isa_level()) + 1]
if "avx512" in LEVELS:
    LEVELS += ("avx512-avx512_vnni-avx512_bf16-avx512_fp16",)  # as the first processors with AVX-512


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def act(y: np.ndarray, activation: str | None) -> np.ndarray:
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-y))
    if activation == "relu":
        return np.where(y > 0, y, 0)
    if activation == "gelu":
        return y * 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-y / math.sqrt(2))
    if activation == "silu":
        return y * sigmoid
    if activation == "swiglu":
        half = y.shape[1] // 2
        return y[:, :half] * sigmoid[:, :half] * y[:, half:]
    return y


def check(got: torch.Tensor, peer: torch.Tensor, exact: np.ndarray, largest: float = 0.0) -> None:
    """Two baselines: at most twice the error of the reference in the same dtype, four ulps of the largest value where both are tiny.

    `largest` is the largest magnitude before the activation, in whose float32 sums four ulps are allowed too.
    """
    error, allowed = (abs(t.double().numpy() - exact).max(initial=0) for t in (got, peer))
    assert got.dtype == peer.dtype and got.shape == exact.shape
    floor = 4 * torch.finfo(got.dtype).eps * abs(exact).max(initial=0) + 4 * torch.finfo(torch.float32).eps * largest
    assert error <= 2 * allowed + floor, (error, allowed, floor)


_GROWTH = """
import torch
from cvmk import ops
from resident_memory import growth
weight, x = {weight}, torch.ones(4096, 64, dtype=torch.bfloat16)
ops.{op}(x[:1], weight)
print(growth(lambda: ops.{op}(x, weight)), growth(lambda: ops.{op}(x, weight).float()))
"""


def memory_growth(op: str, weight: str) -> tuple[int, int]:
    """By how many bytes the resident memory of a new process rises at its highest during a call whose output has 64 MiB, and during the same with a
    temporary of that size; `weight` is the expression of a weight [8192, 64]. Linux only."""
    plain, with_temporary = map(int, said(_GROWTH.format(op=op, weight=weight)).split())
    return plain, with_temporary


def forget(values: float = float("nan"), bytes: int = 1 << 20) -> None:
    """Poison memory that the allocator will hand out next."""
    for size in (bytes, bytes // 16, bytes // 256):
        torch.full((size // 4,), values)


def level(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("CVMK_CPU_ISA", name)
