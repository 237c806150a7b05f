"""The grid of marlin's test.py, written anew for cvmk's int4_linear: tiles, few and odd numbers of steps along K, Llama's layers, groups.

Marlin multiplies float16 rows with 4-bit weights in groups of 128 (or whole rows, which cvmk has no format for) and asks for a mean error
below 1e-3 of the mean result. That is asked of float16 here too, and of float32 a hundredth of it; bfloat16, which marlin lacks, cannot do
better than its own rounding and must not exceed twice the mean error of a product with the dense weight in the same type.
"""

from __future__ import annotations

import pytest
import torch

from cvmk import ops
from cvmk.ops.quantize import QuantizedWeight

ROWS = [1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 118, 128, 152, 768, 1024]
DTYPES = [torch.float16, torch.float32, torch.bfloat16]


def make(n: int, k: int, group: int = 128, seed: int = 0) -> tuple[QuantizedWeight, torch.Tensor]:
    """A quantised weight [n, k] and its dense form in float64."""
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * k**-0.5
    weight = ops.quantize_int4(dense, group)
    return weight, weight.dequantize(torch.float64)


def check(weight: QuantizedWeight, dense: torch.Tensor, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, dense.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ dense.t()
    got = ops.int4_linear(x, weight)
    assert got.dtype == dtype and got.shape == exact.shape
    mean = exact.abs().mean()
    error = (got.double() - exact).abs().mean() / mean
    if dtype == torch.bfloat16:
        plain = (torch.nn.functional.linear(x, dense.to(dtype)).double() - exact).abs().mean() / mean
        assert error < 2 * plain
    else:
        assert error < {torch.float16: 1e-3, torch.float32: 1e-5}[dtype]


@pytest.fixture(scope="module")
def tiles() -> tuple[QuantizedWeight, torch.Tensor]:
    return make(512, 1024)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_tiles(tiles: tuple[QuantizedWeight, torch.Tensor], rows: int, dtype: torch.dtype) -> None:
    check(*tiles, rows, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 128, 192, 768, 832, 896, 960, 1024])
def test_any_number_of_steps(k: int, dtype: torch.dtype) -> None:
    for group in (32, 64, 128):
        if k % group == 0:
            check(*make(512, k, group), 16, dtype)


@pytest.mark.parametrize("k", [256, 512, 1024])
@pytest.mark.parametrize("n", [256, 512, 1024])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups(n: int, k: int, group: int) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        check(*make(n, k, group), 16, dtype)


@pytest.mark.parametrize("n,k", [(4096, 4096), (1536, 4096), (4096, 1376)])
def test_llama_layers(n: int, k: int) -> None:
    """Query, a slice of the fused query-key-value, and a slice of the down projection (10752 = 84 * 128 inputs in marlin's grid)."""
    weight, dense = make(n, k, 32 if k % 128 else 128)
    for rows in (1, 16):
        for dtype in (torch.float16, torch.bfloat16):
            check(weight, dense, rows, dtype)


def test_what_does_not_fit_is_refused_in_words() -> None:
    weight, _ = make(256, 128)
    with pytest.raises(ValueError, match="last dimension must be the weight's 128 inputs"):
        ops.int4_linear(torch.zeros(1, 64), weight)
    with pytest.raises(ValueError, match="no multiple of group_size"):
        ops.quantize_int4(torch.zeros(256, 96), 64)
