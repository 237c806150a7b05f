"""The native kernels of the selective scan and of its single step against the reference in float64, at every instruction-set level."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import scan_cases
import torch
from scan_cases import equal, inputs, run, step, step_inputs
from torch import Tensor

from cvmk.ops import explain, selective_scan, selective_state_update, use
from cvmk.ops.native import LEVELS, library, reason
from cvmk.ops.selective_scan import SCAN_CHUNK

native = library()
pytestmark = pytest.mark.skipif(native is None, reason=f"no native library: {reason()}")
DETECTED = LEVELS.index(native.detected_level()) if native is not None else 0
AVAILABLE = [level for level in LEVELS[: DETECTED + 1] if level != "amx"]  # a scan has no tiles: amx runs what avx512 runs


@pytest.fixture(params=AVAILABLE)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CVMK_CPU_ISA", request.param)
    return str(request.param)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors are full of NaN: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(arguments: dict[str, Tensor], **options: Any) -> None:
    scan_cases.check("native", arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_the_reference_over_odd_sizes(level: str, dtype: torch.dtype, poisoned: None) -> None:
    draw = random.Random(f"{dtype}")
    for seed in range(14):
        groups = draw.choice([1, 1, 2, 3])
        options = [draw.choice([groups, groups, None]) for _ in "BC"]
        optional = " ".join(name for name in ("D", "z", "delta_bias", "initial_state") if draw.random() < 0.6)
        arguments = inputs(
            draw.choice([1, 2, 3]),
            groups * draw.choice([1, 3, 8, 16, 17, 35]),
            draw.choice([1, 2, 3, 4, 7, 16, 17]),
            draw.choice([1, 2, 15, 16, 17, SCAN_CHUNK, SCAN_CHUNK + 1, 2 * SCAN_CHUNK, 150]),
            B=options[0],
            C=options[1],
            optional=optional,
            dtype=dtype,
            seed=seed,
        )
        check(arguments, delta_softplus=draw.random() < 0.7, reverse=draw.random() < 0.4, last=draw.random() < 0.7)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences(level: str, reverse: bool, poisoned: None) -> None:
    for bounds in ([0, 0, 5, 64, 70, 70, 71, 199, 199], [0, 199], [0, 64, 128, 199], list(range(200))):
        for optional in ("D z", "delta_bias initial_state"):
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32 if optional == "D z" else torch.int64)
            arguments = inputs(1, 19, 5, 199, optional=optional, sequences=len(bounds) - 1)
            check(arguments, delta_softplus=True, reverse=reverse, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_equals_one_by_one(level: str, reverse: bool) -> None:
    bounds = [0, 3, 70, 70, 134, 199]
    arguments = inputs(1, 20, 6, 199, sequences=5)
    scan: Any = selective_scan
    out, last = scan(**arguments, cu_seqlens=torch.tensor(bounds), delta_softplus=True, reverse=reverse, return_last_state=True)
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        alone = {name: t[..., start:stop] if t.shape[-1] == 199 else t for name, t in arguments.items()}
        alone["initial_state"] = arguments["initial_state"][i : i + 1]
        own, own_last = scan(**alone, delta_softplus=True, reverse=reverse, return_last_state=True)
        assert torch.equal(out[..., start:stop], own) and torch.equal(last[i : i + 1], own_last)


def test_a_reversed_scan_is_the_flipped_one(level: str) -> None:
    arguments = inputs(2, 18, 6, 100)
    flipped = {name: t.flip(-1) if name in ("u", "delta", "z", "B", "C") else t for name, t in arguments.items()}
    scan: Any = selective_scan
    out, last = scan(**arguments, delta_softplus=True, reverse=True, return_last_state=True)
    other, other_last = scan(**flipped, delta_softplus=True, return_last_state=True)
    assert torch.equal(out, other.flip(-1)) and torch.equal(last, other_last)


def test_bits_do_not_depend_on_threads_nor_repeat(level: str) -> None:
    arguments = inputs(3, 150, 5, 140, B=1, C=None)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(arguments, "native", delta_softplus=True))
    finally:
        torch.set_num_threads(before)
    assert all(equal(results[0], other) for other in results[1:])


def test_a_row_does_not_depend_on_the_batch(level: str) -> None:
    arguments = inputs(70, 40, 3, 20)
    whole = run(arguments, "native", delta_softplus=True)
    parameters = ("A", "D", "delta_bias")
    one = {name: t if name in parameters else t[5:6].clone() for name, t in arguments.items()}
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(whole[name].shape, generator=generator)[5:6] for name in ("out", "last")]
    leaves = {name: t.requires_grad_() for name, t in one.items()}
    scan: Any = selective_scan
    outputs = scan(**leaves, delta_softplus=True, return_last_state=True)
    assert torch.equal(outputs[0], whole["out"][5:6]) and torch.equal(outputs[1], whole["last"][5:6])
    rows = [name for name in one if name not in parameters]
    for name, gradient in zip(rows, torch.autograd.grad(outputs, [leaves[name] for name in rows], grads), strict=True):
        assert torch.equal(gradient, whole[f"d{name}"][5:6]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(level: str, dtype: torch.dtype) -> None:
    arguments = inputs(2, 21, 5, 75, B=3, C=None, dtype=dtype)
    want = run(arguments, "native", delta_softplus=True)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),  # channels or states contiguous
        lambda t: torch.stack([t, t], -1)[..., 1],  # nothing contiguous
        lambda t: torch.nn.functional.pad(t, (3, 2))[..., 3:-2],  # rows apart, not aligned
    ]
    for layout in layouts:
        moved = {name: layout(t) if t.dim() > 1 else torch.stack([t, t], -1)[..., 0] for name, t in arguments.items()}
        assert equal(run(moved, "native", delta_softplus=True), want)
    arguments["u"], arguments["B"] = arguments["u"][:1].expand(2, 21, 75), arguments["B"][..., :1].expand(2, 3, 5, 75)
    assert equal(run(arguments, "native", delta_softplus=True), run({name: t.contiguous() for name, t in arguments.items()}, "native", delta_softplus=True))


def test_mixed_dtypes(level: str) -> None:
    arguments = inputs(2, 9, 4, 70, B=1, C=None)
    for name, dtype in {"u": torch.float16, "delta": torch.float64, "A": torch.float64, "B": torch.bfloat16, "C": torch.float16, "D": torch.bfloat16}.items():
        arguments[name] = arguments[name].to(dtype)
    check(arguments, delta_softplus=True)
    found = run(arguments, "native", delta_softplus=True)
    assert [found[f"d{name}"].dtype for name in arguments] == [t.dtype for t in arguments.values()]


@pytest.mark.parametrize("batch,length", [(0, 7), (2, 0), (0, 0)])
def test_empty(batch: int, length: int, poisoned: None) -> None:
    for reverse in (False, True):
        arguments = inputs(batch, 5, 3, length)
        found, want = (run(arguments, backend, reverse=reverse) for backend in ("native", "reference"))
        assert equal(found, want)
    arguments = inputs(1, 4, 3, 0, optional="initial_state", sequences=2)
    found = run(arguments, "native", cu_seqlens=torch.tensor([0, 0, 0]))
    assert torch.equal(found["last"], arguments["initial_state"]) and found["dinitial_state"].any()
    del arguments["initial_state"]
    scan: Any = selective_scan
    assert not scan(**arguments, cu_seqlens=torch.tensor([0, 0, 0]), return_last_state=True)[1].any()


# -- functions inside the kernels, seen through the op ---------------------------------------------------------------------------
def through_one_step(delta: Tensor, *, A: float = 0.0, u: float = 0.0, initial: float = 0.0, softplus: bool = False) -> Tensor:
    """y = exp(delta A) initial + delta u, delta behind softplus if asked for."""
    ones = torch.ones(delta.shape[0], 1)
    state = torch.full((1, delta.shape[0], 1), initial)
    y = selective_scan(u * torch.ones(1, delta.shape[0], 1), delta.view(1, -1, 1), A * ones, ones, ones, delta_softplus=softplus, initial_state=state)
    return cast(Tensor, y).view(-1)


def ulps(found: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place of the exact value in float32."""
    place = torch.exp2(torch.floor(torch.log2(exact.abs()))) * 2.0**-23
    return ((found.double() - exact).abs() / place).max().item()


def test_decay_is_exact_to_an_ulp(level: str) -> None:
    """exp(x) is 2^(x log2 e): one ulp for the power, and the roundings of its argument, |x| / 2 + |x| / 2 of an ulp at most."""
    near = torch.linspace(-1, 1, 200_001)
    assert ulps(through_one_step(near, A=1.0, initial=1.0), near.double().exp()) <= 2.0
    tiny = torch.linspace(-0.02, 0.02, 100_001)
    assert ulps(through_one_step(tiny, A=1.0, initial=1.0), tiny.double().exp()) <= 1.0
    far = torch.linspace(-87.3, 88.7, 300_001)
    error = (through_one_step(far, A=1.0, initial=1.0).double() / far.double().exp() - 1).abs() * 2.0**23
    assert (error <= 1.0 + far.abs() * 1.5).all()
    edges = torch.tensor([-float("inf"), -1e30, -104.0, -87.5, 0.0, -0.0, 88.8, 1e30, float("inf"), float("nan")])
    want = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, float("inf"), float("inf"), float("inf"), float("nan")])
    # The product with the state's zero input must not appear: u = 0 and delta infinite is NaN in the law too, so look at the state alone.
    finite = edges.abs() < 1e31
    torch.testing.assert_close(through_one_step(edges[finite], A=1.0, initial=1.0), want[finite], rtol=0, atol=0)
    assert through_one_step(edges[-1:], A=1.0, initial=1.0).isnan().all()


def test_softplus_and_gate_are_exact_to_a_few_ulps(level: str) -> None:
    x = torch.cat([torch.linspace(-80, 30, 200_001), torch.linspace(-2, 2, 100_001), torch.tensor([1e30])])
    exact = torch.where(x.double() > 30, x.double(), torch.log1p(torch.exp(x.double())))
    assert ulps(through_one_step(x, u=1.0, softplus=True), exact) <= 4.0
    ones = torch.ones(1, x.numel(), 1)
    zero = torch.zeros(x.numel(), 1)
    gated = cast(Tensor, selective_scan(ones, ones, zero, zero, zero, torch.ones(x.numel()), x.view(1, -1, 1))).view(-1)
    exact = x.double() * torch.sigmoid(x.double())
    assert ulps(gated[x != 0], exact[x != 0]) <= 4.0
    assert torch.isfinite(gated).all()


def test_infinities_stay_in_their_channel(level: str) -> None:
    arguments = inputs(2, 20, 4, 80)
    want = run(arguments, "native", delta_softplus=True)
    for name, value in (("u", float("inf")), ("delta", float("nan")), ("z", float("inf")), ("initial_state", -float("inf"))):
        changed = {key: t.clone() for key, t in arguments.items()}
        changed[name][1, 7, 2] = value
        found = run(changed, "native", delta_softplus=True)
        others = [channel for channel in range(20) if channel != 7]
        for key in ("out", "last", "du", "ddelta", "dz", "dinitial_state"):
            assert torch.equal(found[key][0], want[key][0]) and torch.equal(found[key][1, others], want[key][1, others]), (name, key)
        assert torch.equal(found["dA"][others], want["dA"][others]) and torch.equal(found["dB"][0], want["dB"][0])
        assert not found["out"][1, 7].isfinite().all()


def test_decayed_states_are_flushed_and_the_mode_of_the_processor_comes_back(level: str) -> None:
    ones = torch.ones(1, 16, 1)
    delta = torch.full((1, 16, 400), 0.5)
    out, last = selective_scan(
        torch.zeros(1, 16, 400), delta, -ones[0], torch.ones(1, 1, 400), torch.ones(1, 1, 400), initial_state=ones, return_last_state=True
    )
    exact = torch.exp(-0.5 * torch.arange(1, 401).double())
    assert not last.any() and (out[0, 0].double() - exact).abs().max() < 1e-6
    assert (torch.tensor([1e-40]) * 1.0).item() > 0


def test_memory_stays_below_a_part_of_the_states() -> None:
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")

    def peak() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))

    arguments = inputs(2, 128, 16, 2048, optional="D z")
    run({name: t[..., :1] if t.dim() > 2 else t for name, t in arguments.items()}, "native")
    try:
        clear.write_text("5")
    except OSError:
        pytest.skip("the peak of memory cannot be reset")
    start = peak()
    run(arguments, "native", delta_softplus=True)
    states = 2 * 128 * 16 * 2048 * 4
    assert (peak() - start) * 1024 < states  # one tensor of all states; the reference by chunks needs a few of their size at 64 steps


def test_declines_float64_and_says_so() -> None:
    arguments = {name: t.double() for name, t in inputs(1, 4, 2, 5).items()}
    rows = {row.backend: row for row in explain("selective_scan", **arguments)}
    assert rows["reference"].chosen and "float64" in rows["native"].reasons[0]
    step = step_inputs(1, 4, 3)
    step["state"] = step["state"].double()
    rows = {row.backend: row for row in explain("selective_state_update", **step)}
    assert rows["reference"].chosen and "state is torch.float64" in rows["native"].reasons[0]
    assert {row.backend: row for row in explain("selective_scan", **inputs(1, 4, 2, 5))}["native"].chosen
    assert native is not None and native.scan_chunk == SCAN_CHUNK


# -- the single step -----------------------------------------------------------------------------------------------------------
def check_step(arguments: dict[str, Tensor], softplus: bool = True) -> None:
    scan_cases.check_step("native", arguments, softplus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_over_odd_sizes(level: str, dtype: torch.dtype, state_dtype: torch.dtype, poisoned: None) -> None:
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
        check_step(arguments, softplus=draw.random() < 0.7)


def test_step_takes_any_strides(level: str) -> None:
    arguments = step_inputs(3, 5, 18, heads=4, groups=2)
    want = step(arguments, "native")
    for layout in (lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), lambda t: torch.stack([t, t], -1)[..., 1]):
        moved = {name: layout(t) for name, t in arguments.items()}
        assert all(torch.equal(a, b) for a, b in zip(step(moved, "native"), want, strict=True))
    constant = step_inputs(3, 20, 16)
    B = constant["B"][0].expand(20, 16).clone()
    constant["B"] = constant["C"] = B.expand(3, 20, 16)
    check_step(constant)


def test_step_writes_in_place_and_nowhere_else(level: str) -> None:
    arguments = step_inputs(2, 7, 20)
    cache = torch.full((2, 7, 24), 9.0)
    cache[..., 2:22] = arguments["state"]
    view = cache[..., 2:22]
    want_y, want = step(arguments, "native")
    version = cache._version
    with use("native"):
        assert torch.equal(selective_state_update(**{**arguments, "state": view}, dt_softplus=True), want_y)
    assert torch.equal(view, want) and (cache[..., :2] == 9).all() and (cache[..., 22:] == 9).all() and cache._version > version


def test_step_bits_do_not_depend_on_threads_nor_batch(level: str) -> None:
    arguments = step_inputs(5, 300, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y, state = step(arguments, "native")
        torch.set_num_threads(3)
        y3, state3 = step(arguments, "native")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, y3) and torch.equal(state, state3)
    one = {name: t[3:4] if name in ("state", "x", "dt", "B", "C", "z") else t for name, t in arguments.items()}
    y1, state1 = step(one, "native")
    assert torch.equal(y1, y[3:4]) and torch.equal(state1, state[3:4])
    empty = step_inputs(0, 4, 3)
    assert step(empty, "native")[0].shape == (0, 4)


@pytest.mark.parametrize("groups_of_B,groups_of_C", [(1, 6), (6, 1), (2, 3), (0, 6), (3, 0)])
@pytest.mark.parametrize("heads", [None, 6])
def test_step_with_more_groups_in_one_than_in_the_other(groups_of_B: int, groups_of_C: int, heads: int | None) -> None:
    """0 groups: one, without a dimension of its own."""
    arguments = step_inputs(2, 6, 18, heads=heads, groups=1)
    for name, groups in (("B", groups_of_B), ("C", groups_of_C)):
        arguments[name] = torch.randn((2, groups, 18) if groups else (2, 18))
    check_step(arguments)


def test_step_reads_negated_views_and_ignores_a_default_device() -> None:
    arguments = step_inputs(2, 6, 4)
    want, state = step(arguments, "native"), arguments["state"].clone()
    negated = {name: torch.complex(t, -t).conj().imag if name in ("x", "B") else t for name, t in arguments.items()}
    assert negated["x"].is_neg() and torch.equal(negated["x"], arguments["x"])
    with torch.device("meta"):
        out = step({**negated, "state": state}, "native")
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
