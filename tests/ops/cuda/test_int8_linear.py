"""int8_linear for a few rows by its CUDA kernel: the reference's integers exactly, and its epilogue."""

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
from cvmk.ops.triton import int8_linear

pytestmark = pytest.mark.timeout(300)  # the first test waits for the compiler
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def quantized(n: int, k: int) -> QuantizedWeight:
    """In the layout of the Triton kernels, which weights on the CPU are not packed in by themselves."""
    with ops.use("reference"):
        weight = ops.quantize_int8(normal(n, k, seed=1))
    return int8_linear.pack(weight) if k % int8_linear.ALIGNED else weight


def linear(backend: str, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, **options: Any) -> Tensor:
    with ops.use(backend):
        return ops.int8_linear(x, weight, bias, **options)


@pytest.mark.parametrize("shape", [(1, 16, 1), (1, 1, 3), (2, 48, 3), (3, 39, 18), (3, 528, 16), (4, 1040, 18), (5, 2064, 34), (7, 512, 66), (8, 4112, 10)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Without an activation that calls a function, the law leaves nothing open: bit for bit."""
    m, k, n = shape
    weight, x = quantized(n, k), normal(m, k, dtype=dtype)
    for activation in (None, *ACTIVATIONS):
        if activation == "swiglu" and n % 2:
            continue
        for bias, smooth in ((None, None), (normal(n, seed=2, dtype=dtype), normal(k, seed=3).abs() + 0.25)):
            got, want = (linear(backend, x, weight, bias, smooth_scale=smooth, activation=activation) for backend in ("cuda", "reference"))
            if activation in (None, "relu"):
                assert torch.equal(got, want)
            else:
                torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_many_groups_of_outputs_in_a_block() -> None:
    """More outputs than the grid takes at one time."""
    weight, x = quantized(264 * 32 + 70, 16), normal(2, 16)
    assert torch.equal(linear("cuda", x, weight), linear("reference", x, weight))


def test_sums_are_exact_at_the_extremes() -> None:
    for value in (127, -127):
        weight = QuantizedWeight(torch.full((18, 1040), value, dtype=torch.int8, device=DEVICE), torch.ones(18, device=DEVICE), None, None, 18, 1040, 8, 1040)
        x = torch.full((3, 1040), -127.0, device=DEVICE)
        assert torch.equal(linear("cuda", x, weight), torch.full((3, 18), -127.0 * value * 1040, device=DEVICE))


def test_a_row_does_not_depend_on_the_others() -> None:
    weight, bias, x = quantized(98, 704), normal(98), normal(8, 704, dtype=torch.bfloat16)
    for activation in (None, *ACTIVATIONS):
        together = linear("cuda", x, weight, bias, activation=activation)
        for rows in (slice(0, 1), slice(7, 8), slice(2, 4), slice(3, 6), slice(1, 7)):
            assert torch.equal(linear("cuda", x[rows], weight, bias, activation=activation), together[rows])


def test_any_order_of_the_threads(emulated: ModuleType | None) -> None:
    if emulated is None:
        pytest.skip("the device orders its threads as it likes")
    weight, bias, x = quantized(40, 2064), normal(40), normal(5, 2064)
    found = [linear("cuda", x, weight, bias, activation="swiglu") for _ in cuda_on_cpu.orders(emulated)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_strides_types_and_empties() -> None:
    weight, bias = quantized(34, 48), normal(34)
    wide = normal(7, 101, dtype=torch.bfloat16)
    dense = linear("cuda", wide[:, :48].contiguous(), weight, bias)
    assert torch.equal(linear("cuda", wide[:, :48], weight, bias), dense)
    assert torch.equal(linear("cuda", wide[:, 1:97:2], weight, bias), linear("cuda", wide[:, 1:97:2].contiguous(), weight, bias))
    assert torch.equal(linear("cuda", wide[:1, :48].expand(5, 48), weight, bias), dense[:1].expand(5, 34))
    full = linear("cuda", wide[:, :48], weight, bias, out_dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(linear("cuda", wide[:, :48], weight, bias, out_dtype=dtype), full.to(dtype))
    assert torch.equal(linear("cuda", wide[:, :48], weight, bias.double()), dense)
    assert linear("cuda", normal(0, 48), weight).shape == (0, 34)
    whole = torch.zeros(34 * 48 + 1, dtype=torch.int8, device=DEVICE)
    whole[1:] = weight.values.flatten()
    moved = QuantizedWeight(whole[1:].view(34, 48), weight.scales, None, None, 34, 48, 8, 48)
    assert torch.equal(linear("cuda", wide[:, :48], moved, bias), dense)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_poison_stays_in_its_row(bad: float) -> None:
    weight, bias, x = quantized(20, 80), normal(20), normal(6, 80)
    for activation in (None, *ACTIVATIONS):
        poisoned = x.clone()
        poisoned[2, 79] = poisoned[4, 0] = bad
        got, clean = (linear("cuda", rows, weight, bias, activation=activation) for rows in (poisoned, x))
        assert got[[2, 4]].isnan().all() and torch.equal(got[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])
    tiny = torch.zeros(3, 80, device=DEVICE)
    tiny[1], tiny[2] = 1e-45, 1e-36
    assert torch.equal(linear("cuda", tiny, weight, bias), bias.expand(3, 20))


def test_what_is_declined() -> None:
    def reason(x: Tensor, weight: QuantizedWeight, **options: Any) -> str:
        with ops.use("cuda", "reference"):
            return " ".join({row.backend: row for row in ops.explain("int8_linear", x, weight, **options)}["cuda"].reasons)

    weight = quantized(6, 48)
    assert reason(normal(3, 48), weight) == ""
    assert reason(normal(9, 48), weight) == "cuda: x has 9 rows, more than 8"
    assert reason(normal(1, 20), quantized(6, 20)) == ""
    assert reason(normal(1, 20), quantized(6, 20).plain()) == "cuda: x has 20 inputs, no multiple of 16: pack the weight with weight.pack()"
    assert "out_dtype is torch.float64" in reason(normal(3, 48), weight, out_dtype=torch.float64)
    assert "do not fit into 160 KiB" in reason(normal(8, 32768), quantized(1, 32768))
    found = {row.backend: row for row in ops.explain("int8_linear", normal(3, 48), weight)}["cuda"].reasons
    assert found == ("cuda: not yet measured on this device class; ops.use('cuda') selects it",)
