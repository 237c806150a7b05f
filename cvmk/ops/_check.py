"""A small contract that every backend of every op must keep on this machine: `cvmk doctor --check`.

Each case is computed by the reference in float64 (the law), by the reference in the case's own dtype, and by the backend. By the rule of two
baselines a backend is right where its error against the law is at most twice (results) or three times (gradients) that of the reference, and four
roundings of the largest value where both are tiny; what is not finite must be so in both.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cvmk import ops
from cvmk.errors import NoBackendError
from cvmk.ops import triton
from cvmk.ops._measured import UnmeasuredBackendWarning
from cvmk.ops.sketch import sketch_backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD, GRADIENT = "forward", "gradient"
SKETCH = "CVMSketch"
Tensors = dict[str, Tensor]
_FACTORS = {FORWARD: 2, GRADIENT: 3}
_REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One pass of one case on one backend. `passed` is None where the backend does not take the case, for `reasons`."""

    op: str
    backend: str
    device: str
    case: str
    which: str
    """"forward" or "gradient"."""
    error: float | None = None
    """The largest error of a result, in units of the result, of the tensor that is nearest to its tolerance."""
    tolerance: float | None = None
    """What that error may be."""
    seconds: float | None = None
    """The shortest of a few calls; a gradient's has its forward pass in it."""
    passed: bool | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A call of an op: `call` takes the tensors by name; `leaves` have gradients; `unit` is the size of terms that may cancel each other."""

    name: str
    tensors: dict[str, Tensor]
    call: Callable[[dict[str, Any]], Any]
    leaves: tuple[str, ...] = ()
    unit: float = 1e-2
    fixed: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are the same in float64: lengths, targets, weights to be quantised."""
    pack: Callable[[Tensor], Any] | None = None
    """Makes what the call gets as "weight", in the backend's own layout."""


def rows(device: torch.device, names: list[str] | None = None) -> Iterator[Row]:
    """The rows of the ops in `names` (default: all), of every backend that stands for them, on `device`."""
    report = ops.backends_report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnmeasuredBackendWarning)
        for op, make in CASES.items():
            if names is not None and op not in names:
                continue
            for status in report[op]:
                reasons = status.reasons
                if status.backend == "triton" and triton.INTERPRETED:
                    reasons = ("triton: kernels are interpreted in this process (TRITON_INTERPRET), which is for tests",)
                if reasons:
                    yield Row(op, status.backend, str(device), "", FORWARD, reasons=reasons)
                    continue
                for dtype in DTYPES:
                    for case in make(_Maker(device, dtype)):
                        yield from _rows_of(op, status.backend, device, case)
        if device.type == "cpu" and (names is None or SKETCH in names):
            yield from _sketch_rows()


def _sketch_rows() -> Iterator[Row]:
    """The sketch is no op of tensors: on every backend it holds the very elements that the reference's does."""
    ids = torch.arange(5000).mul(0x9E3779B1).remainder(3001).numpy()

    def fed(backend: str) -> Any:
        with ops.use(backend):
            sketch = ops.CVMSketch(64, seed=3)
            sketch.add(ids)
            return sketch

    law = fed("reference")
    for status in sketch_backends():
        named = (SKETCH, status.backend, "cpu", "5000 numbers, 3001 of them distinct", FORWARD)
        if not status.available:
            yield Row(*named, reasons=status.reasons)
            continue
        found = fed(status.backend)
        seconds = _seconds(lambda: fed(status.backend), torch.device("cpu"))  # noqa: B023 - called at once
        error = abs(found.estimate() - law.estimate())
        same = sorted(found.sample()) == sorted(law.sample())
        yield Row(*named, error, 0.0, seconds, same and not error, () if same else ("the sample is another",))


def _rows_of(op: str, backend: str, device: torch.device, case: Case) -> Iterator[Row]:
    law, baseline = (_results(case, "reference", _arguments(case, "reference", double)) for double in (True, False))
    for which in (FORWARD, GRADIENT) if case.leaves else (FORWARD,):
        named = (op, backend, str(device), case.name, which)
        leaves = case.leaves if which == GRADIENT else ()
        try:
            arguments = _arguments(case, backend)
            found = _results(case, backend, arguments, leaves)
            seconds = _seconds(lambda: _results(case, backend, arguments, leaves), device)  # noqa: B023 - called at once
        except NoBackendError as error:
            yield Row(*named, reasons=error.reasons)
            continue
        except Exception as error:  # whatever a kernel dies of, the other rows are still wanted
            yield Row(*named, passed=False, reasons=(" ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]]),))
            continue
        yield _judged(named, found[which], baseline[which], law[which], case.unit, seconds)


def _judged(named: tuple[str, str, str, str, str], found: Tensors, baseline: Tensors, law: Tensors, unit: float, seconds: float) -> Row:
    """The row of what was found: the numbers of the tensor that is nearest to its tolerance, or beyond it."""
    error, tolerance, reasons = 0.0, 0.0, []
    for name, value in found.items():
        this, allowed, reason = _compared(value, baseline[name], law[name], _FACTORS[named[-1]], unit)
        if reason:
            reasons.append(f"{name} {reason}")
        elif this * tolerance >= error * allowed:
            error, tolerance = this, allowed
    return Row(*named, error, tolerance, seconds, not reasons and error <= tolerance, tuple(reasons))


def _arguments(case: Case, backend: str, double: bool = False) -> dict[str, Any]:
    """What the call gets by name."""
    found: dict[str, Any] = {name: x.detach().double() if double else x.detach() for name, x in case.tensors.items()} | case.fixed
    if case.pack is not None:
        with ops.use(backend):
            found["weight"] = case.pack(case.fixed["weight"])
    return found


def _results(case: Case, backend: str, arguments: dict[str, Any], leaves: Sequence[str] | None = None) -> dict[str, Tensors]:
    """Results, and gradients with respect to the leaves (default: the case's), by name."""
    wanted = {name: arguments[name].requires_grad_() for name in (case.leaves if leaves is None else leaves)}
    with ops.use(backend), torch.set_grad_enabled(bool(wanted)):
        made = case.call(arguments)
        made = (made,) if isinstance(made, Tensor) else made
        found: dict[str, Tensors] = {FORWARD: {f"result {i}": x.detach() for i, x in enumerate(made)}, GRADIENT: {}}
        if wanted:
            generator = torch.Generator().manual_seed(3)
            weights = [torch.randn(x.shape, generator=generator).to(x) for x in made]
            derivatives = torch.autograd.grad(made, list(wanted.values()), weights)
            found[GRADIENT] = {f"gradient of {name}": x for name, x in zip(wanted, derivatives, strict=True)}
    return found


def _compared(found: Tensor, baseline: Tensor, law: Tensor, factor: int, unit: float) -> tuple[float, float, str]:
    """(error, tolerance, what is wrong beyond a number)."""
    if found.shape != baseline.shape or found.dtype != baseline.dtype:
        return 0.0, 0.0, f"is {found.dtype} {list(found.shape)} instead of {baseline.dtype} {list(baseline.shape)}"
    finite = baseline.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite].nan_to_num(), baseline[~finite].nan_to_num()):
        return 0.0, 0.0, "has NaN or infinities where the reference has none, or lacks them"
    if not finite.any():
        return 0.0, 0.0, ""
    error, other = ((x.double() - law)[finite].abs().max().item() for x in (found, baseline))
    floor = 4 * torch.finfo(found.dtype).eps * max(law[finite].abs().max().item(), unit)
    return error, factor * other + floor, ""


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS):
        _synchronise(device)
        start = time.perf_counter()
        call()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- the cases -----------------------------------------------------------------------------------------------------------------
class _Maker:
    """Tensors for cases: the same numbers on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.name = str(dtype).removeprefix("torch.")
        self._generator = torch.Generator().manual_seed(1)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator).mul(scale).to(self.device, dtype or self.dtype)

    def strided(self, *shape: int) -> Tensor:
        """[B, H, T, D] as a projection of [B, T, H D] gives it."""
        b, h, t, d = shape
        return self.normal(b, t, h, d).transpose(1, 2)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, device=self.device)

    def below(self, count: int, size: int) -> Tensor:
        return torch.randint(count, (size,), generator=self._generator).to(self.device)


def _attention(make: _Maker) -> Iterator[Case]:
    def call(t: dict[str, Any], **options: Any) -> Any:
        out, lse = ops.flash_attention(t["q"], t["k"], t["v"], bias=t.get("bias"), key_lengths=t.get("lengths"), return_lse=True, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    qkv = {"q": make.strided(2, 4, 33, 40), "k": make.strided(2, 2, 65, 40), "v": make.strided(2, 2, 65, 24)}
    yield Case(f"causal, grouped heads, odd sizes, {make.name}", qkv, lambda t: call(t, causal=True), ("q", "k", "v"))
    qkv = {"q": make.normal(3, 2, 17, 64), "k": make.normal(3, 2, 130, 64), "v": make.normal(3, 2, 130, 64)}
    qkv["bias"] = make.normal(2, 17, 130, dtype=torch.float32)
    fixed = {"lengths": make.integers(130, 0, 77)}
    yield Case(f"bias, window, soft cap, an empty row, {make.name}", qkv, lambda t: call(t, window=(40, 9), softcap=4.0), tuple(qkv), fixed=fixed)
    yield Case(f"one query, {make.name}", {"q": make.normal(2, 8, 1, 64), "k": make.normal(2, 2, 300, 64), "v": make.normal(2, 2, 300, 64)}, call)


def _distilled(make: _Maker) -> Iterator[Case]:
    t = {"q": make.strided(2, 4, 33, 32), "k": make.strided(2, 2, 40, 32), "v": make.strided(2, 2, 40, 32)}
    t |= {"tq": make.strided(2, 2, 33, 24), "tk": make.strided(2, 2, 40, 24)}
    yield Case(
        f"causal, other heads than the teacher's, {make.name}",
        t,
        lambda t: ops.flash_attention_distill(t["q"], t["k"], t["v"], t["tq"], t["tk"], causal=True, key_lengths=t["lengths"]),
        ("q", "k", "v"),
        0.2,
        {"lengths": make.integers(40, 9)},
    )


def _maps(make: _Maker) -> Iterator[Case]:
    t = {"q": make.strided(2, 2, 19, 32), "k": make.strided(2, 2, 70, 32), "tq": make.strided(2, 4, 19, 16), "tk": make.strided(2, 4, 70, 16)}
    yield Case(f"19 queries, 70 keys, {make.name}", t, lambda t: ops.attention_kl(t["q"], t["k"], t["tq"], t["tk"]), ("q", "k"), 0.2)


def _scan(make: _Maker) -> Iterator[Case]:
    t = {"u": make.normal(2, 34, 67), "delta": make.normal(2, 34, 67, scale=0.5), "A": -make.normal(34, 5, dtype=torch.float32).abs()}
    t |= {"B": make.normal(2, 2, 5, 67), "C": make.normal(2, 2, 5, 67), "D": make.normal(34, dtype=torch.float32), "z": make.normal(2, 34, 67)}
    t |= {"delta_bias": make.normal(34, dtype=torch.float32), "initial_state": make.normal(2, 34, 5, dtype=torch.float32)}

    def call(reverse: bool, t: dict[str, Any]) -> Any:
        return ops.selective_scan(**t, delta_softplus=True, reverse=reverse, return_last_state=True)

    for direction, reverse in (("forwards", False), ("backwards", True)):
        yield Case(f"everything, {direction}, {make.name}", t, functools.partial(call, reverse), tuple(t))


def _update(make: _Maker) -> Iterator[Case]:
    def call(t: dict[str, Any]) -> Any:
        t = t | {"state": t["state"].clone()}
        return ops.selective_state_update(**t, dt_softplus=True), t["state"]

    t = {"state": make.normal(3, 34, 17, dtype=torch.float32), "x": make.normal(3, 34), "dt": make.normal(3, 34)}
    t |= {"A": -make.normal(34, 17, dtype=torch.float32).abs(), "B": make.normal(3, 2, 17), "C": make.normal(3, 2, 17)}
    t |= {"D": make.normal(34, dtype=torch.float32), "z": make.normal(3, 34), "dt_bias": make.normal(34, dtype=torch.float32)}
    yield Case(f"34 channels, 17 states, {make.name}", t, call)


def _conv(make: _Maker) -> Iterator[Case]:
    t = {"x": make.normal(3, 34, 67), "weight": make.normal(34, 4, dtype=torch.float32), "bias": make.normal(34, dtype=torch.float32)}
    t["initial_state"] = make.normal(3, 34, 3)

    def call(t: dict[str, Any]) -> Any:
        return ops.causal_conv1d(**t, activation="silu", return_last_state=True)

    yield Case(f"34 channels, width 4, lengths, {make.name}", t, call, tuple(t), 0.1, {"lengths": make.below(68, 3)})


def _conv_update(make: _Maker) -> Iterator[Case]:
    def call(t: dict[str, Any]) -> Any:
        t = t | {"state": t["state"].clone()}
        return ops.causal_conv1d_update(**t, activation="silu"), t["state"]

    t = {"state": make.normal(3, 34, 3), "x": make.normal(3, 34), "weight": make.normal(34, 4, dtype=torch.float32)}
    yield Case(f"34 channels, width 4, {make.name}", t | {"bias": make.normal(34, dtype=torch.float32)}, call)


def _adamw(make: _Maker) -> Iterator[Case]:
    def call(t: dict[str, Any]) -> Any:
        param, first, second = (t[name].clone() for name in ("param", "exp_avg", "exp_avg_sq"))
        ops.adamw(param, t["grad"], first, second, step=3, learning_rate=0.1, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1)
        return param, first, second

    t = {"param": make.normal(20000), "grad": make.normal(20000), "exp_avg": make.normal(20000, scale=0.1), "exp_avg_sq": make.normal(20000).abs()}
    yield Case(f"20000 parameters, {make.name}", t, call)


def _int8(make: _Maker) -> Iterator[Case]:
    def call(t: dict[str, Any], activation: str | None = None) -> Tensor:
        return ops.int8_linear(t["x"], t["weight"], t["bias"], activation=activation)

    rest: dict[str, Any] = {"fixed": {"weight": make.normal(70, 200, dtype=torch.float32)}, "pack": ops.quantize_int8}
    yield Case(f"33 rows, 200 to 70, {make.name}", {"x": make.normal(33, 200), "bias": make.normal(70)}, call, ("x", "bias"), **rest)
    yield Case(f"one row, swiglu, {make.name}", {"x": make.normal(1, 200), "bias": make.normal(70)}, lambda t: call(t, "swiglu"), **rest)


def _int4(make: _Maker) -> Iterator[Case]:
    def call(t: dict[str, Any], activation: str | None = None) -> Tensor:
        return ops.int4_linear(t["x"], t["weight"], t["bias"], activation=activation)

    rest: dict[str, Any] = {"fixed": {"weight": make.normal(70, 192, dtype=torch.float32)}, "pack": lambda weight: ops.quantize_int4(weight, 64)}
    yield Case(f"33 rows, 192 to 70, {make.name}", {"x": make.normal(33, 192), "bias": make.normal(70)}, call, ("x", "bias"), **rest)
    yield Case(f"one row, gelu, {make.name}", {"x": make.normal(1, 192), "bias": make.normal(70)}, lambda t: call(t, "gelu"), **rest)


def _fused(make: _Maker) -> Iterator[Case]:
    t = {"x": make.normal(33, 200), "weight": make.normal(70, 200, scale=0.07), "bias": make.normal(70)}

    def call(activation: str, t: dict[str, Any]) -> Any:
        torch.manual_seed(3)
        return ops.fused_linear(t["x"], t["weight"], t["bias"], activation=activation, dropout_p=0.1)

    with torch.random.fork_rng():
        for activation in ("relu", "swiglu"):
            yield Case(f"33 rows, 200 to 70, {activation}, dropout, {make.name}", t, functools.partial(call, activation), tuple(t), 0.1)


def _kd(make: _Maker) -> Iterator[Case]:
    target = make.below(701, 9)
    target[4] = -100
    t = {"student": make.normal(9, 701, scale=2.0), "teacher": make.normal(9, 701, scale=2.0)}

    def call(divergence: str, t: dict[str, Any]) -> Any:
        options: dict[str, Any] = {"temperature": 2.0, "label_smoothing": 0.1, "divergence": divergence}
        return ops.kd_loss(t["student"], t["teacher"], t["target"], return_parts=True, **options)

    for divergence in ("forward_kl", "js"):
        yield Case(f"9 rows of 701, {divergence}, {make.name}", t, functools.partial(call, divergence), ("student",), 0.1, {"target": target})


def _in_place(make: _Maker) -> Iterator[Case]:
    t = {"student": make.normal(9, 701, scale=2.0), "teacher": make.normal(9, 701, scale=2.0)}
    yield Case(
        f"9 rows of 701, over the logits, {make.name}",
        t,
        lambda t: ops.kd_loss(t["student"] * 1, t["teacher"], t["target"], temperature=2.0, in_place=True),
        ("student",),
        0.1,
        {"target": make.below(701, 9)},
    )


def _linear_kd(make: _Maker) -> Iterator[Case]:
    t = {"hidden": make.normal(33, 40), "weight": make.normal(130, 40, scale=0.3), "th": make.normal(33, 24), "tw": make.normal(130, 24, scale=0.3)}
    yield Case(
        f"33 rows, 40 and 24 to 130, {make.name}",
        t,
        lambda t: ops.linear_kd_loss(t["hidden"], t["weight"], t["th"], t["tw"], t["target"], temperature=2.0, return_parts=True),
        ("hidden", "weight"),
        0.1,
        {"target": make.below(130, 33)},
    )


def _residual(make: _Maker) -> Iterator[Case]:
    t = {"x": make.normal(3, 11, 70), "branch": make.normal(3, 11, 70), "weight": make.normal(70, dtype=torch.float32)}
    t["bias"] = make.normal(70, dtype=torch.float32)
    yield Case(f"33 rows of 70, layer, {make.name}", t, lambda t: ops.residual_norm(**t), tuple(t), 0.1)
    t = {"x": make.normal(33, 70), "weight": make.normal(70)}
    yield Case(f"33 rows of 70, the norm alone, rms, {make.name}", t, lambda t: ops.residual_norm(t["x"], None, t["weight"], norm="rms")[1], tuple(t), 0.1)


def _embed(make: _Maker) -> Iterator[Case]:
    t, ids = {"weight": make.normal(50, 70), "positions": make.normal(13, 70)}, make.below(50, 39).view(3, 13)
    yield Case(f"39 of 50 rows of 70, {make.name}", t, lambda t: ops.embed(t["ids"], t["weight"], t["positions"], scale=8.0), ("weight",), 0.1, {"ids": ids})


CASES: dict[str, Callable[[_Maker], Iterator[Case]]] = {
    "adamw": _adamw,
    "flash_attention": _attention,
    "flash_attention_distill": _distilled,
    "attention_kl": _maps,
    "selective_scan": _scan,
    "selective_state_update": _update,
    "causal_conv1d": _conv,
    "causal_conv1d_update": _conv_update,
    "fused_linear": _fused,
    "int8_linear": _int8,
    "int4_linear": _int4,
    "kd_loss": _kd,
    "kd_loss_in_place": _in_place,
    "linear_kd_loss": _linear_kd,
    "residual_norm": _residual,
    "embed": _embed,
}
