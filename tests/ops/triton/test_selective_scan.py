"""The Triton kernels of the selective scan and of its single step against the reference in float64; interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import scan_cases
import torch
from scan_cases import equal, inputs, run, step, step_inputs
from torch import Tensor

from cvmk.ops import explain, selective_scan, selective_state_update, use
from cvmk.ops.triton import INTERPRETED, reason

pytestmark = pytest.mark.skipif(reason() is not None, reason=str(reason()))
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh tensors are full of NaN: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def here(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in arguments.items()}


def check(arguments: dict[str, Tensor], **options: Any) -> None:
    scan_cases.check("triton", here(arguments), **options)


def test_one_segment_with_everything() -> None:
    check(inputs(4, 34, 4, 9), delta_softplus=True)


def test_segments_are_joined() -> None:
    """Few channels: on the interpreter's device of 4 multiprocessors these sequences are cut at every 64th step."""
    check(inputs(1, 16, 4, 130), delta_softplus=True)
    check(inputs(1, 16, 4, 66, B=None, C=2, optional="D"), reverse=True)


@pytest.mark.parametrize(
    "batch,dim,states,length,B,C,optional,softplus,reverse,last",
    [
        (4, 34, 1, 17, 1, 1, "", True, True, True),
        (4, 6, 7, 9, 2, 2, "z initial_state", False, False, True),
        (8, 3, 2, 8, None, 1, "D delta_bias", True, False, False),
        (8, 2, 16, 9, None, None, "z delta_bias", True, True, True),
        (3, 33, 3, 1, 3, None, "D z delta_bias initial_state", False, True, False),
    ],
)
def test_options_and_odd_sizes(
    batch: int, dim: int, states: int, length: int, B: int | None, C: int | None, optional: str, softplus: bool, reverse: bool, last: bool
) -> None:
    check(inputs(batch, dim, states, length, B=B, C=C, optional=optional), delta_softplus=softplus, reverse=reverse, last=last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(inputs(4, 5, 4, 12, dtype=dtype), delta_softplus=True)
    check(inputs(4, 3, 2, 8, dtype=dtype, optional=""), delta_softplus=True, reverse=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences(reverse: bool) -> None:
    bounds = [0, 0, 5, 64, 69, 69]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int64 if reverse else torch.int32, device=DEVICE)
    check(inputs(1, 3, 3, 69, sequences=len(bounds) - 1), delta_softplus=True, reverse=reverse, cu_seqlens=cu_seqlens)


def test_packed_equals_one_by_one() -> None:
    bounds = [0, 3, 17, 20]
    arguments = here(inputs(1, 3, 3, 20, sequences=3))
    scan: Any = selective_scan
    with use("triton"):
        out, last = scan(**arguments, cu_seqlens=torch.tensor(bounds, device=DEVICE), delta_softplus=True, return_last_state=True)
        for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            alone = {name: t[..., start:stop] if t.shape[-1] == 20 else t for name, t in arguments.items()}
            alone["initial_state"] = arguments["initial_state"][i : i + 1]
            whole = torch.tensor([0, stop - start], device=DEVICE)
            own, own_last = scan(**alone, cu_seqlens=whole, delta_softplus=True, return_last_state=True)
            assert torch.equal(out[..., start:stop], own) and torch.equal(last[i : i + 1], own_last)


def test_cu_seqlens_that_do_not_rise_stay_inside() -> None:
    arguments = here(inputs(1, 3, 2, 12, sequences=3))
    for bounds in ([0, 1000, -5, 12], [7, -9, 99, 2]):
        run(arguments, "triton", cu_seqlens=torch.tensor(bounds, device=DEVICE))


def test_runs_repeat_and_strides_do_not_matter() -> None:
    arguments = here(inputs(2, 6, 3, 9, B=3, C=None))
    want = run(arguments, "triton", delta_softplus=True)
    assert equal(run(arguments, "triton", delta_softplus=True), want)
    moved = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in arguments.items()}
    assert equal(run(moved, "triton", delta_softplus=True), want)


@pytest.mark.parametrize("batch,length", [(0, 7), (2, 0)])
def test_empty(batch: int, length: int) -> None:
    arguments = here(inputs(batch, 5, 3, length))
    found, want = (run(arguments, backend) for backend in ("triton", "reference"))
    assert equal(found, want)


def test_infinities_stay_in_their_channel() -> None:
    arguments = here(inputs(2, 5, 3, 9))
    want = run(arguments, "triton", delta_softplus=True)
    for name, value in (("u", float("inf")), ("delta", float("nan")), ("initial_state", -float("inf"))):
        changed = {key: t.clone() for key, t in arguments.items()}
        changed[name][1, 3, 2] = value
        found = run(changed, "triton", delta_softplus=True)
        others = [channel for channel in range(5) if channel != 3]
        for key in ("out", "last", "du", "ddelta", "dz", "dinitial_state"):
            assert torch.equal(found[key][0], want[key][0]) and torch.equal(found[key][1, others], want[key][1, others]), (name, key)
        assert torch.equal(found["dA"][others], want["dA"][others]) and torch.equal(found["dB"][0], want["dB"][0])
        assert not found["out"][1, 3].isfinite().all()


def test_mixed_dtypes() -> None:
    arguments = here(inputs(2, 9, 4, 10, B=1, C=None))
    for name, dtype in {"u": torch.float16, "delta": torch.float64, "A": torch.float64, "B": torch.bfloat16, "C": torch.float16, "D": torch.bfloat16}.items():
        arguments[name] = arguments[name].to(dtype)
    check(arguments, delta_softplus=True)


def test_what_is_declined() -> None:
    rows = {row.backend: row for row in explain("selective_scan", **here({name: t.double() for name, t in inputs(1, 4, 2, 5).items()}))}
    assert "float64" in rows["triton"].reasons[0] and rows["reference"].chosen
    rows = {row.backend: row for row in explain("selective_scan", **here(inputs(1, 4, 300, 5)))}
    assert "300 states" in rows["triton"].reasons[0]
    if INTERPRETED:
        assert "interpreted" in {row.backend: row for row in explain("selective_scan", **inputs(1, 4, 2, 5))}["triton"].reasons[0]


# -- the single step -----------------------------------------------------------------------------------------------------------
def check_step(arguments: dict[str, Tensor], softplus: bool = True) -> None:
    scan_cases.check_step("triton", here(arguments), softplus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_over_odd_sizes(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    check_step(step_inputs(3, 18, 17, heads=6, groups=3, dtype=dtype, state_dtype=state_dtype))
    check_step(step_inputs(1, 40, 16, groups=2, optional="z", dtype=dtype, state_dtype=state_dtype, tied=True), softplus=False)
    check_step(step_inputs(2, 6, 1, optional="D dt_bias", dtype=dtype, state_dtype=state_dtype))


def test_step_takes_any_strides_and_writes_in_place() -> None:
    arguments = here(step_inputs(3, 5, 18, heads=4, groups=2))
    want = step(arguments, "triton")
    for layout in (lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), lambda t: torch.stack([t, t], -1)[..., 1]):
        moved = {name: layout(t) for name, t in arguments.items()}
        assert all(torch.equal(a, b) for a, b in zip(step(moved, "triton"), want, strict=True))
    cache = torch.full((3, 4, 5, 24), 9.0, device=DEVICE)
    cache[..., 2:20] = arguments["state"]
    view, version = cache[..., 2:20], cache._version
    with use("triton"):
        selective_state_update(**{**arguments, "state": view}, dt_softplus=True)
    assert torch.equal(view, want[1]) and (cache[..., :2] == 9).all() and (cache[..., 20:] == 9).all() and cache._version > version


def test_step_does_not_depend_on_the_batch() -> None:
    arguments = here(step_inputs(5, 30, 16))
    y, state = step(arguments, "triton")
    one = {name: t[3:4] if name in ("state", "x", "dt", "B", "C", "z") else t for name, t in arguments.items()}
    y1, state1 = step(one, "triton")
    assert torch.equal(y1, y[3:4]) and torch.equal(state1, state[3:4])
    assert step(here(step_inputs(0, 4, 3)), "triton")[0].shape == (0, 4)
