"""int4_linear in Triton: every format against float64, few rows and many; interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from quantized_cases import ACTIVATIONS, DTYPES, check, random
from torch.nn import functional as F

from cvmk import ops
from cvmk.ops import quantize_int4
from cvmk.ops.quantize import QuantizedWeight
from cvmk.ops.triton import INTERPRETED, _tuning, int4_linear, reason

pytestmark = pytest.mark.skipif(reason() is not None, reason=str(reason()))
DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fresh tensors are full of NaN
    with _tuning.overriding("int4_linear", "some float32", SMALL), _tuning.overriding("int4_linear", "some bfloat16", SMALL):
        yield
    torch.use_deterministic_algorithms(False)


def quantised(n: int, k: int, group: int, symmetric: bool = True, ordered: bool = False) -> QuantizedWeight:
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3)) if ordered else None
    return quantize_int4(random(n, k, seed=1), group, symmetric=symmetric, order=order).plain()


def linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None, activation: str | None = None) -> torch.Tensor:
    packed = weight.to(DEVICE) if DEVICE == "cuda" else int4_linear.pack(weight)
    with ops.use("triton"):
        return ops.int4_linear(x.to(DEVICE), packed, bias if bias is None else bias.to(DEVICE), activation=activation).cpu()


def law(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, activation: str | None) -> tuple[torch.Tensor, float]:
    """In float64, and the largest magnitude before the activation."""
    y = x.double() @ weight.dequantize(torch.float64).T + (0 if bias is None else bias.double())
    if activation == "swiglu":
        gate, up = y.chunk(2, 1)
        return F.silu(gate) * up, y.abs().max().item()
    function = {None: lambda v: v, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}[activation]
    return function(y), y.abs().max().item()


@pytest.mark.parametrize("symmetric,ordered", [(True, False), (False, True)])
def test_the_layout_is_undone_exactly(symmetric: bool, ordered: bool) -> None:
    for n, k in ((1, 32), (17, 160), (40, 256)):
        plain = quantised(n, k, 32, symmetric, ordered)
        packed = int4_linear.pack(plain)
        assert packed.layout == "triton_int4" and int4_linear.unpack(packed).layout == "plain"
        for name, tensor in plain.tensors().items():
            assert torch.equal(packed.tensors()[name], tensor)


@pytest.mark.parametrize("shape", [(1, 32, 1), (3, 160, 17), (17, 256, 34), (16, 384, 34)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric,ordered", [(True, False), (False, True)])
def test_result(shape: tuple[int, int, int], dtype: torch.dtype, symmetric: bool, ordered: bool) -> None:
    m, k, n = shape
    for group in (32, 64, 128) if dtype != torch.float16 else (32,):
        if k % group:
            continue
        weight = quantised(n, k, group, symmetric, ordered)
        for activation in ACTIVATIONS if group == 32 and dtype == torch.float32 else (None, "swiglu"):
            if activation == "swiglu" and n % 2:
                continue
            bias = random(n, seed=2, dtype=dtype) if activation != "relu" else None
            x = random(m, k, dtype=dtype)
            with ops.use("reference"):
                peer = ops.int4_linear(x, weight, bias, activation=activation)
            exact, largest = law(x, weight, bias, activation)
            check(linear(x, weight, bias, activation), peer, exact, largest)


@pytest.mark.parametrize("rows", [16, 40])
def test_a_row_does_not_depend_on_the_others(rows: int) -> None:
    weight, x = quantised(34, 320, 64, False), random(rows, 320, dtype=torch.bfloat16)
    together = linear(x, weight, activation="swiglu")
    fewest = 1 if rows == 16 else 17
    for start in (0, 3, rows - fewest):
        assert torch.equal(linear(x[start : start + fewest], weight, activation="swiglu"), together[start : start + fewest])


def test_single_weights_reach_their_places() -> None:
    """With one weight that is not zero, only its output sees only its input."""
    for rows in (3, 18):
        for n, k, order in ((0, 0, None), (17, 95, None), (33, 64, torch.arange(159, -1, -1)), (16, 133, None)):
            dense = torch.zeros(34, 160)
            dense[n, k] = 7.5
            x = torch.arange(1, 161).float().expand(rows, 160) * torch.arange(1, rows + 1)[:, None]
            expected = torch.zeros(rows, 34)
            expected[:, n] = x[:, k] * 7  # 15 is the largest code: 7 steps of 1
            assert torch.equal(linear(x, quantize_int4(dense, 32, order=order).plain()), expected)


def test_strides_types_and_empties() -> None:
    weight, wide, bias = quantised(34, 64, 32), random(20, 200), random(34)
    dense = linear(wide[:, :64].contiguous(), weight, bias)
    assert torch.equal(linear(wide[:, :64], weight, bias), dense)
    same = wide[:1, :64].expand(18, 64)
    expanded = linear(same, weight, bias.double())
    assert torch.equal(expanded, linear(same.contiguous(), weight, bias))
    if dense.is_cuda:  # interpreted products are NumPy's, whose bits depend on a row's place on some processors
        assert torch.equal(expanded, dense[:1].expand(18, 34))
    assert linear(random(0, 64), weight).shape == (0, 34)
    assert linear(random(2, 0, 64), weight, activation="swiglu").shape == (2, 0, 17)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [4, 20])
def test_poison_stays_in_its_row(bad: float, rows: int) -> None:
    weight, x = quantised(20, 96, 32, False), random(rows, 96)
    poisoned = x.clone()
    poisoned[2, 95] = bad
    got, clean = linear(poisoned, weight), linear(x, weight)
    others = [row for row in range(rows) if row != 2]
    assert not torch.isfinite(got[2]).any() and torch.equal(got[others], clean[others])


def test_what_is_declined() -> None:
    weight, x = quantised(6, 64, 32), random(3, 64)
    rows = {row.backend: row for row in ops.explain("int4_linear", x, weight)}
    assert "pack it with weight.pack()" in str(rows["triton"])
    rows = {row.backend: row for row in ops.explain("int4_linear", x.double(), int4_linear.pack(weight))}
    assert "float64" in str(rows["triton"]) and rows["reference"].chosen
