"""The CUDA kernels of the selective scan and of its single step against the reference in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import cuda_on_cpu
import pytest
import scan_cases
import torch
from cuda_on_cpu import DEVICE
from scan_cases import equal, run, step
from torch import Tensor

from cvmk.ops import explain, selective_scan, selective_state_update, use
from cvmk.ops.selective_scan import SCAN_CHUNK

pytestmark = pytest.mark.timeout(300)  # the first test waits for the compiler
NAN = float("nan")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors are full of NaN: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(*sizes: int, **options: Any) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in scan_cases.inputs(*sizes, **options).items()}


def step_inputs(*sizes: int, **options: Any) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in scan_cases.step_inputs(*sizes, **options).items()}


def bounds(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_the_reference_over_odd_sizes(dtype: torch.dtype, poisoned: None) -> None:
    draw = random.Random(f"{dtype}")
    for seed in range(10):
        groups = draw.choice([1, 1, 2, 3])
        options = [draw.choice([groups, groups, None]) for _ in "BC"]
        optional = " ".join(name for name in ("D", "z", "delta_bias", "initial_state") if draw.random() < 0.6)
        arguments = inputs(
            draw.choice([1, 2]),
            groups * draw.choice([1, 3, 8, 11]),
            draw.choice([1, 2, 3, 7]),
            draw.choice([1, 2, 15, SCAN_CHUNK, SCAN_CHUNK + 1, 150, 256, 264, 300, 512]),
            B=options[0],
            C=options[1],
            optional=optional,
            dtype=dtype,
            seed=seed,
        )
        scan_cases.check("cuda", arguments, delta_softplus=draw.random() < 0.7, reverse=draw.random() < 0.4, last=draw.random() < 0.7)


@pytest.mark.parametrize("reverse", [False, True])
def test_many_states_and_many_tiles(reverse: bool, poisoned: None) -> None:
    scan_cases.check("cuda", inputs(1, 3, 67, 130, optional="D z"), delta_softplus=True, reverse=reverse)
    scan_cases.check("cuda", inputs(1, 21, 2, 1100), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences(reverse: bool, poisoned: None) -> None:
    for cuts in ([0, 0, 5, 64, 70, 70, 71, 199, 199], [0, 199], [0, 64, 128, 199], list(range(200))):
        for optional in ("D z", "delta_bias initial_state"):
            arguments = inputs(1, 5, 3, 199, optional=optional, sequences=len(cuts) - 1)
            cu_seqlens = bounds(cuts, torch.int32 if optional == "D z" else torch.int64)
            scan_cases.check("cuda", arguments, delta_softplus=True, reverse=reverse, cu_seqlens=cu_seqlens)
    short = inputs(1, 3, 2, 40, sequences=4)
    scan_cases.check("cuda", short, delta_softplus=True, reverse=reverse, cu_seqlens=bounds([0, 3, 3, 17, 40]))


@pytest.mark.parametrize("reverse", [False, True])
def test_an_infinite_sequence_does_not_reach_the_next(reverse: bool) -> None:
    cuts = [0, 3, 70, 134, 300]
    arguments = inputs(1, 4, 3, 300, sequences=4)
    want = run(arguments, "cuda", cu_seqlens=bounds(cuts), delta_softplus=True, reverse=reverse)
    for value in (float("inf"), NAN):
        changed = {name: t.clone() for name, t in arguments.items()}
        changed["u"][0, 2, 100] = value
        changed["B"][0, 0, 1, 101] = value
        found = run(changed, "cuda", cu_seqlens=bounds(cuts), delta_softplus=True, reverse=reverse)
        for start, stop in ((0, 70), (134, 300)):
            assert all(torch.equal(found[name][..., start:stop], want[name][..., start:stop]) for name in ("out", "du", "ddelta", "dz", "dB", "dC"))
        assert torch.equal(found["last"][[0, 1, 3]], want["last"][[0, 1, 3]]) and not found["out"][0, 2, 70:134].isfinite().all()


def test_cu_seqlens_that_do_not_rise_stay_inside() -> None:
    arguments = inputs(1, 2, 3, 30, sequences=3)
    for cuts in ([0, 1000, -5, 30], [7, -9, 99, 2], [30, 30, 30, 30]):
        for reverse in (False, True):
            run(arguments, "cuda", cu_seqlens=bounds(cuts), reverse=reverse)


def test_a_reversed_scan_is_the_flipped_one() -> None:
    arguments = inputs(2, 5, 3, 300)
    flipped = {name: t.flip(-1) if name in ("u", "delta", "z", "B", "C") else t for name, t in arguments.items()}
    scan: Any = selective_scan
    with use("cuda"):
        out, last = scan(**arguments, delta_softplus=True, reverse=True, return_last_state=True)
        other, other_last = scan(**flipped, delta_softplus=True, return_last_state=True)
    assert torch.equal(out, other.flip(-1)) and torch.equal(last, other_last)


@pytest.mark.parametrize("length", [50, 300])
def test_any_order_of_the_threads(emulated: ModuleType | None, length: int) -> None:
    if emulated is None:
        pytest.skip("the device orders its threads as it likes")
    arguments = inputs(2, 13, 3, length, B=1, C=None)
    found = [run(arguments, "cuda", delta_softplus=True) for _ in cuda_on_cpu.orders(emulated)]
    assert equal(found[0], found[1]) and equal(found[0], found[2])
    packed = inputs(1, 13, 2, length, sequences=3)
    cuts = bounds([0, 7, length - 9, length])
    found = [run(packed, "cuda", delta_softplus=True, cu_seqlens=cuts) for _ in cuda_on_cpu.orders(emulated)]
    assert equal(found[0], found[1]) and equal(found[0], found[2])


def test_a_row_does_not_depend_on_the_batch() -> None:
    arguments = inputs(6, 13, 3, 70)
    whole = run(arguments, "cuda", delta_softplus=True)
    parameters = ("A", "D", "delta_bias")
    leaves = {name: (t if name in parameters else t[5:6].clone()).requires_grad_() for name, t in arguments.items()}
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(whole[name].shape, generator=generator)[5:6].to(DEVICE) for name in ("out", "last")]
    scan: Any = selective_scan
    rows = [name for name in leaves if name not in parameters]
    with use("cuda"):
        outputs = scan(**leaves, delta_softplus=True, return_last_state=True)
        found = torch.autograd.grad(outputs, [leaves[name] for name in rows], grads)
    assert torch.equal(outputs[0], whole["out"][5:6]) and torch.equal(outputs[1], whole["last"][5:6])
    for name, gradient in zip(rows, found, strict=True):
        assert torch.equal(gradient, whole[f"d{name}"][5:6]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype: torch.dtype) -> None:
    arguments = inputs(2, 6, 3, 275, B=3, C=None, dtype=dtype)
    want = run(arguments, "cuda", delta_softplus=True)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),  # channels or states contiguous
        lambda t: torch.stack([t, t], -1)[..., 1],  # nothing contiguous
        lambda t: torch.nn.functional.pad(t, (3, 2))[..., 3:-2],  # rows apart, not aligned
    ]
    for layout in layouts:
        moved = {name: layout(t) if t.dim() > 1 else torch.stack([t, t], -1)[..., 0] for name, t in arguments.items()}
        assert equal(run(moved, "cuda", delta_softplus=True), want)
    leaf = arguments["u"].clone().requires_grad_()
    with use("cuda"):
        out: Any = selective_scan(leaf, *(arguments[name] for name in ("delta", "A", "B", "C")), delta_softplus=True)
        (expanded,) = torch.autograd.grad(out.float().sum(), leaf, retain_graph=True)  # a gradient of stride 0
        (plain,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert torch.equal(expanded, plain)


def test_mixed_dtypes() -> None:
    arguments = inputs(2, 5, 4, 70, B=1, C=None)
    for name, dtype in {"u": torch.float16, "delta": torch.float64, "A": torch.float64, "B": torch.bfloat16, "C": torch.float16, "D": torch.bfloat16}.items():
        arguments[name] = arguments[name].to(dtype)
    scan_cases.check("cuda", arguments, delta_softplus=True)
    found = run(arguments, "cuda", delta_softplus=True)
    assert [found[f"d{name}"].dtype for name in arguments] == [t.dtype for t in arguments.values()]


@pytest.mark.parametrize("batch,length", [(0, 7), (2, 0), (0, 0)])
def test_empty(batch: int, length: int, poisoned: None) -> None:
    for reverse in (False, True):
        arguments = inputs(batch, 5, 3, length)
        found, want = (run(arguments, backend, reverse=reverse) for backend in ("cuda", "reference"))
        assert equal(found, want)
    arguments = inputs(1, 4, 3, 0, optional="initial_state", sequences=2)
    found = run(arguments, "cuda", cu_seqlens=bounds([0, 0, 0]))
    assert torch.equal(found["last"], arguments["initial_state"]) and found["dinitial_state"].any()


def test_what_is_declined() -> None:
    def reasons(op: str, **arguments: Tensor) -> tuple[str, ...]:
        return {row.backend: row for row in explain(op, **arguments)}["cuda"].reasons

    assert reasons("selective_scan", **inputs(1, 4, 2, 5)) == ("cuda: not yet measured on this device class; ops.use('cuda') selects it",)
    assert reasons("selective_state_update", **step_inputs(1, 4, 2)) == ("cuda: not yet measured on this device class; ops.use('cuda') selects it",)
    with use("cuda", "reference"):
        assert reasons("selective_scan", **inputs(1, 4, 257, 5)) == ("cuda: A has 257 states, more than 256",)
        assert "float64" in reasons("selective_scan", **{name: t.double() for name, t in inputs(1, 4, 2, 5).items()})[0]
        assert reasons("selective_scan", **inputs(1, 4, 2, 5)) == ()


# -- the single step -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_over_odd_sizes(dtype: torch.dtype, state_dtype: torch.dtype, poisoned: None) -> None:
    draw = random.Random(5)
    for _ in range(12):
        heads = draw.choice([None, None, 1, 6])
        arguments = step_inputs(
            draw.choice([1, 3]),
            draw.choice([6, 18, 132]),
            draw.choice([1, 3, 15, 16, 17, 40, 64]),
            heads=heads,
            groups=draw.choice([1, 2, 3, 6]) if heads != 1 else 1,
            optional=" ".join(name for name in ("D", "z", "dt_bias") if draw.random() < 0.6),
            dtype=dtype,
            state_dtype=state_dtype,
            tied=draw.random() < 0.3,
        )
        scan_cases.check_step("cuda", arguments, softplus=draw.random() < 0.7)


def test_step_takes_any_strides() -> None:
    arguments = step_inputs(3, 5, 18, heads=4, groups=2)
    want = step(arguments, "cuda")
    for layout in (lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), lambda t: torch.stack([t, t], -1)[..., 1]):
        moved = {name: layout(t) for name, t in arguments.items()}
        assert all(torch.equal(a, b) for a, b in zip(step(moved, "cuda"), want, strict=True))
    constant = step_inputs(3, 20, 16)
    B = constant["B"][0].expand(20, 16).clone()
    constant["B"] = constant["C"] = B.expand(3, 20, 16)
    scan_cases.check_step("cuda", constant)


def test_step_writes_in_place_and_nowhere_else() -> None:
    arguments = step_inputs(2, 7, 20)
    cache = torch.full((2, 7, 24), 9.0, device=DEVICE)
    cache[..., 2:22] = arguments["state"]
    view = cache[..., 2:22]
    want_y, want = step(arguments, "cuda")
    version = cache._version
    with use("cuda"):
        assert torch.equal(selective_state_update(**{**arguments, "state": view}, dt_softplus=True), want_y)
    assert torch.equal(view, want) and (cache[..., :2] == 9).all() and (cache[..., 22:] == 9).all() and cache._version > version
    assert step(step_inputs(0, 4, 3), "cuda")[0].shape == (0, 4)
