"""int8_linear in Triton: exact integers, the law's epilogue, and rows that depend on nothing but themselves; interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from quantized_cases import ACTIVATIONS, DTYPES, check, random

from cvmk import ops
from cvmk.ops import quantize_int8
from cvmk.ops.quantize import QuantizedWeight
from cvmk.ops.triton import INTERPRETED, _tuning, int8_linear, reason

pytestmark = pytest.mark.skipif(reason() is not None, reason=str(reason()))
DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fresh tensors are full of NaN
    with _tuning.overriding("int8_linear", "few16", {**SMALL, "BLOCK_M": 16}), _tuning.overriding("int8_linear", "many", SMALL):
        yield
    torch.use_deterministic_algorithms(False)


def quantised(n: int, k: int) -> QuantizedWeight:
    return quantize_int8(random(n, k, seed=1)).plain().to(DEVICE)


def linear(x: torch.Tensor, weight: QuantizedWeight, *rest: torch.Tensor | None, **options: object) -> torch.Tensor:
    with ops.use("triton"):
        return ops.int8_linear(x.to(DEVICE), weight, *(t if t is None else t.to(DEVICE) for t in rest), **options).cpu()  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 34), (17, 40, 66), (65, 70, 34)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    weight, x = quantised(n, k), random(m, k, dtype=dtype)
    for activation in ACTIVATIONS if dtype == torch.float32 or m < 20 else (None, "swiglu"):
        if activation == "swiglu" and n % 2:
            continue
        for bias, s in ((None, None), (random(n, seed=2, dtype=dtype), random(k, seed=3).abs() + 0.25)):
            smooth = None if s is None else s.to(DEVICE)
            got = linear(x, weight, bias, smooth_scale=smooth, activation=activation)
            with ops.use("reference"):
                peer, law = (
                    ops.int8_linear(y, weight.to("cpu").plain(), bias, smooth_scale=s, activation=activation, out_dtype=out)
                    for y, out in ((x, dtype), (x.float(), torch.float32))
                )
            check(got, peer, law.double())


def test_sums_are_exact_at_the_extremes() -> None:
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 1030, 3), (70, 130, 33)):
        for case in ("largest", "random"):
            w, x = (torch.full(s, 127) if case == "largest" else torch.randint(-127, 128, s, generator=generator) for s in ((n, k), (m, k)))
            x[:, 0] = 127
            weight = QuantizedWeight(w.to(torch.int8), torch.ones(n), None, None, n, k, 8, k).to(DEVICE)
            assert torch.equal(linear(x.float(), weight).long(), x @ w.T)


def test_rounds_half_to_even_and_once() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    eye = QuantizedWeight(torch.eye(7, dtype=torch.int8), torch.ones(7), None, None, 7, 7, 8, 7).to(DEVICE)
    assert linear(x, eye).tolist() == [[127, 0, 2, 2, 0, -2, 126]]
    x = random(20, 150, seed=5)
    weight = QuantizedWeight(torch.eye(150, dtype=torch.int8), torch.ones(150), None, None, 150, 150, 8, 150).to(DEVICE)
    a = x.abs().amax(1, keepdim=True)
    assert torch.equal(linear(x, weight), (x * (torch.tensor(127.0) / a)).round() * (a / torch.full_like(a, 127)))


@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_a_row_does_not_depend_on_the_others(activation: str | None) -> None:
    weight, bias, x = quantised(34, 70), random(34), random(66, 70, dtype=torch.bfloat16)
    together = linear(x, weight, bias, activation=activation)
    for rows in (slice(0, 1), slice(7, 10), slice(3, 20), slice(0, 64)):
        assert torch.equal(linear(x[rows], weight, bias, activation=activation), together[rows])


@pytest.mark.parametrize("rows", [3, 66])
def test_the_layout_is_undone_and_changes_no_bit(rows: int) -> None:
    weight, x = quantised(34, 70), random(rows, 70)
    packed = int8_linear.pack(weight)
    assert packed.layout == "triton_int8" and packed.values.shape == (34, 80) and torch.equal(packed.plain().values, weight.values)
    assert torch.equal(linear(x, packed, activation="swiglu"), linear(x, weight, activation="swiglu"))


def test_strides_types_and_empties() -> None:
    weight, bias, wide = quantised(34, 40), random(34), random(9, 100, dtype=torch.bfloat16).to(DEVICE)
    dense = linear(wide[:, :40].contiguous(), weight, bias)
    assert torch.equal(linear(wide[:, :40], weight, bias), dense)
    assert torch.equal(linear(wide[:1, :40].expand(5, 40), weight, bias), dense[:1].expand(5, 34))
    assert torch.equal(linear(wide[:, :40], weight, bias.double()), dense)
    full = linear(wide[:, :40], weight, bias, out_dtype=torch.float32)
    assert torch.equal(linear(wide[:, :40], weight, bias, out_dtype=torch.float16), full.half())
    assert linear(random(0, 40), weight).shape == (0, 34)
    assert linear(random(2, 0, 40), weight, activation="swiglu").shape == (2, 0, 17)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [3, 70])
def test_poison_stays_in_its_row(bad: float, rows: int) -> None:
    weight, x = quantised(20, 40), random(rows, 40)
    poisoned = x.clone()
    poisoned[2, 39] = bad
    got, clean = linear(poisoned, weight), linear(x, weight)
    others = [row for row in range(rows) if row != 2]
    assert got[2].isnan().all() and torch.equal(got[others], clean[others])


def test_what_is_declined() -> None:
    weight = quantised(6, 8)
    rows = {row.backend: row for row in ops.explain("int8_linear", random(3, 8).double().to(DEVICE), weight)}
    assert "float64" in str(rows["triton"])
    rows = {row.backend: row for row in ops.explain("int8_linear", random(3, 8).to(DEVICE), weight, out_dtype=torch.float64)}
    assert "out_dtype" in str(rows["triton"])
