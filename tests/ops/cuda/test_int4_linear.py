"""int4_linear for a few rows by its CUDA kernel, against float64 and beside the reference of the same dtype."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cuda_on_cpu
import pytest
import torch
from cuda_on_cpu import DEVICE
from torch import Tensor

from cvmk import ops
from cvmk.ops.quantize import ACTIVATIONS, QuantizedWeight
from cvmk.ops.triton import int4_linear

pytestmark = pytest.mark.timeout(300)  # the first test waits for the compiler
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def quantized(n: int, k: int, group: int = 32, symmetric: bool = True, ordered: bool = False) -> QuantizedWeight:
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3)) if ordered else None
    with ops.use("reference"):
        return packed(ops.quantize_int4(normal(n, k, seed=1), group, symmetric=symmetric, order=order))


def packed(weight: QuantizedWeight) -> QuantizedWeight:
    """In the layout of the Triton kernels, which weights on the CPU are not packed in by themselves."""
    return int4_linear.pack(weight.plain())


def linear(backend: str, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, **options: Any) -> Tensor:
    with ops.use(backend):
        return ops.int4_linear(x, weight, bias, **options)


@pytest.mark.parametrize("shape", [(1, 32, 1), (2, 96, 3), (3, 1184, 16), (4, 256, 18), (5, 128, 34), (7, 1088, 66), (8, 4224, 10)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric,ordered", [(True, False), (False, True)])
def test_two_baselines(shape: tuple[int, int, int], dtype: torch.dtype, symmetric: bool, ordered: bool) -> None:
    """At most twice the error of the reference in the same dtype, four ulps of the largest value (before the activation) where both are tiny."""
    m, k, n = shape
    for group in (32, 64, 128):
        if k % group:
            continue
        weight, x = quantized(n, k, group, symmetric, ordered), normal(m, k, dtype=dtype)
        largest = linear("reference", x.double(), weight).abs().max()
        for activation in (None, *ACTIVATIONS) if group == 32 else (None, "swiglu"):
            if activation == "swiglu" and n % 2:
                continue
            bias = normal(n, seed=2, dtype=dtype) if activation != "relu" else None
            exact = linear("reference", x.double(), weight, None if bias is None else bias.double(), activation=activation)
            got, plain = (linear(backend, x, weight, bias, activation=activation) for backend in ("cuda", "reference"))
            assert got.dtype == dtype and got.shape == exact.shape
            error, allowed = ((y.double() - exact).abs().max() for y in (got, plain))
            assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * max(largest, exact.abs().max())


def test_many_groups_of_outputs_in_a_block() -> None:
    weight, x = quantized(264 * 32 + 70, 32), normal(6, 32)
    torch.testing.assert_close(linear("cuda", x, weight), linear("reference", x, weight), rtol=1e-5, atol=1e-5)


def test_single_weights_reach_their_places() -> None:
    """With one weight that is not zero, only its output sees only its input."""
    for dtype in DTYPES:
        for n, k, order in ((0, 0, None), (17, 95, None), (33, 64, torch.arange(95, -1, -1)), (16, 33, None)):
            dense = torch.zeros(34, 96, device=DEVICE)
            dense[n, k] = 7.5
            x = (torch.arange(1, 97, dtype=dtype).expand(3, 96) * torch.tensor([[1], [2], [-1]], dtype=dtype)).to(DEVICE)
            with ops.use("reference"):
                weight = packed(ops.quantize_int4(dense, 32, order=order))
            expected = torch.zeros(3, 34, dtype=dtype, device=DEVICE)
            expected[:, n] = x[:, k] * 7  # 15 is the largest code: 7 steps of 1
            assert torch.equal(linear("cuda", x, weight), expected)


@pytest.mark.parametrize("k,group", [(640, 128), (992, 32), (2112, 64)])
def test_a_row_does_not_depend_on_the_others(k: int, group: int) -> None:
    weight, bias, x = quantized(98, k, group, False), normal(98), normal(8, k, dtype=torch.bfloat16)
    for activation in (None, "swiglu"):
        together = linear("cuda", x, weight, bias, activation=activation)
        for rows in (slice(0, 1), slice(7, 8), slice(2, 4), slice(3, 6), slice(1, 7)):
            assert torch.equal(linear("cuda", x[rows], weight, bias, activation=activation), together[rows])


def test_any_order_of_the_threads(emulated: ModuleType | None) -> None:
    if emulated is None:
        pytest.skip("the device orders its threads as it likes")
    weight, bias, x = quantized(40, 2112, 64, False, True), normal(40), normal(5, 2112)
    found = [linear("cuda", x, weight, bias, activation="swiglu") for _ in cuda_on_cpu.orders(emulated)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_strides_types_and_empties() -> None:
    weight, bias = quantized(34, 64), normal(34)
    for dtype in DTYPES:
        wide = normal(7, 201, dtype=dtype)
        dense = linear("cuda", wide[:, :64].contiguous(), weight, bias)
        assert torch.equal(linear("cuda", wide[:, :64], weight, bias), dense)
        assert torch.equal(linear("cuda", wide[:, 1:129:2], weight, bias), linear("cuda", wide[:, 1:129:2].contiguous(), weight, bias))
        assert torch.equal(linear("cuda", wide[:1, :64].expand(8, 64), weight, bias), dense[:1].expand(8, 34))
        assert torch.equal(linear("cuda", wide[:, :64], weight, bias.double()), dense)
        assert linear("cuda", normal(0, 64, dtype=dtype), weight).shape == (0, 34)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_poison_stays_in_its_row(bad: float) -> None:
    weight, x = quantized(20, 96, 32, False), normal(6, 96)
    poisoned = x.clone()
    poisoned[2, 95] = poisoned[4, 0] = bad
    got, clean = linear("cuda", poisoned, weight), linear("cuda", x, weight)
    assert not torch.isfinite(got[[2, 4]]).any() and torch.equal(got[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_what_is_declined() -> None:
    def reason(x: Tensor, weight: QuantizedWeight) -> str:
        with ops.use("cuda", "reference"):
            return " ".join({row.backend: row for row in ops.explain("int4_linear", x, weight)}["cuda"].reasons)

    weight = quantized(6, 64)
    assert reason(normal(3, 64), weight) == ""
    assert reason(normal(3, 64), weight.plain()) == "cuda: the weight is in the layout 'plain', not 'triton_int4': pack it with weight.pack()"
    assert reason(normal(9, 64), weight) == "cuda: x has 9 rows, more than 8"
    assert "do not fit into 160 KiB" in reason(normal(8, 8192), quantized(1, 8192))
    found = {row.backend: row for row in ops.explain("int4_linear", normal(3, 64), weight)}["cuda"].reasons
    assert found == ("cuda: not yet measured on this device class; ops.use('cuda') selects it",)
