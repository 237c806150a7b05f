"""The machinery behind every op, on a small op of the test's own: choice, cache, refusals, forcing, autograd, autocast."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from cvmk import ops
from cvmk.ops import _dispatch
from cvmk.ops._dispatch import Backend, Op, backends_report, explain, use

NAME = "probe"
log: list[str] = []


def reference_forward(x: Tensor, weight: Tensor | None, constant: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """(x ** power * weight + constant, sum over the last dimension)."""
    log.append("reference")
    y = x**power
    y = (y if weight is None else y * weight) + constant.detach()
    return y, y.sum(-1)


def reference_backward(
    g0: Tensor | None, g1: Tensor | None, x: Tensor, weight: Tensor | None, constant: Tensor, y: Tensor, power: float, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    log.append("reference backward " + "".join("01"[need] for need in needs))
    g = torch.zeros_like(x)
    g = g if g0 is None else g + g0
    g = g if g1 is None else g + g1[..., None]
    dx = g * power * x ** (power - 1) * (1 if weight is None else weight) if needs[0] else x.new_empty(0)
    return dx, g * x**power if weight is not None and needs[1] else x.new_empty(0)


def fake_backward(g0: Any, g1: Any, x: Tensor, weight: Tensor | None, constant: Tensor, y: Tensor, power: float, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs[0] else (0,)), x.new_empty(x.shape if weight is not None and needs[1] else (0,))


op = Op(
    NAME,
    module="no_such_file",
    forward="(Tensor x, Tensor? weight, Tensor constant, float power) -> (Tensor, Tensor)",
    backward="(Tensor? g0, Tensor? g1, Tensor x, Tensor? weight, Tensor constant, Tensor y, float power, bool[] needs) -> (Tensor, Tensor)",
    fake_forward=lambda x, weight, constant, power: (x.new_empty(x.shape), x.new_empty(x.shape[:-1])),
    fake_backward=fake_backward,
    tensors=3,
    differentiable=(0, 1),
    saved=(0,),
    principal="x",
)
_dispatch.OPS.pop(NAME)  # all test modules are imported before the first test: the others' must not see it


@op.prepared_by
def prepare(x: Tensor, weight: Tensor | None = None, constant: Tensor | None = None, *, power: float = 2.0) -> tuple[Any, ...]:
    if power == 0:
        raise ValueError("power must not be 0")
    return x, weight, torch.zeros(()) if constant is None else constant, power


def probe(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return op(*prepare(*args, **kwargs))


def fast(x: Tensor, weight: Tensor | None, constant: Tensor, power: float) -> tuple[Tensor, Tensor]:
    log.append("fast")
    return x.clone(), x.sum(-1)


def only_squares(which: str, arguments: Any) -> list[str]:
    return [] if arguments["power"] == 2.0 else [f"power is {arguments['power']}, not 2"]


REFERENCE = Backend(NAME, "reference", reference_forward, reference_backward)
FAST = Backend(NAME, "native", fast, dtypes=(torch.float32,), devices=("cpu",), limits=only_squares)
BROKEN = Backend(NAME, "cuda", fast, unavailable=lambda: "the library did not load")


@pytest.fixture(autouse=True)
def backends() -> Iterator[None]:
    op._backends = [BROKEN, FAST, REFERENCE]
    op._chosen.clear()
    log.clear()
    _dispatch.OPS[NAME] = op
    yield
    _dispatch.OPS.pop(NAME, None)


def test_first_able_backend_runs() -> None:
    probe(torch.ones(2, 3))
    probe(torch.ones(2, 3, dtype=torch.float64))
    probe(torch.ones(2, 3), power=3.0)
    assert log == ["fast", "reference", "reference"]


def test_choice_is_kept_per_signature() -> None:
    asked = []

    def limits(which: str, arguments: Any) -> list[str]:
        asked.append(tuple(arguments["x"].shape))
        return []

    op._backends = [Backend(NAME, "native", fast, limits=limits), REFERENCE]
    for _ in range(3):
        probe(torch.ones(2, 3))
    probe(torch.ones(3, 2).t())
    probe(torch.ones(2, 3), power=3.0)
    probe(torch.ones(2, 3), torch.ones(2, 3))
    assert asked == [(2, 3)] * 4


def test_a_choice_that_dtype_and_device_decide_is_kept_once() -> None:
    op._backends = [BROKEN, Backend(NAME, "native", fast, dtypes=(torch.float32,), devices=("cpu",)), FAST, REFERENCE]
    for n in range(1, 9):
        probe(torch.ones(n, 3), power=float(n))
    assert log == ["fast"] * 8 and len(op._chosen) == 1
    probe(torch.ones(2, 3, dtype=torch.float64))
    assert log[-1] == "reference" and len(op._chosen) == 2
    with use("reference"):
        probe(torch.ones(2, 3))
    assert log[-1] == "reference" and len(op._chosen) == 3


def test_forgotten_choices_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_CACHE_LIMIT", 4)
    for n in range(1, 12):
        probe(torch.ones(n, 2))
    assert len(op._chosen) <= 4
    probe(torch.ones(1, 2))
    assert log == ["fast"] * 12


def test_use_forces_and_lets_go() -> None:
    x = torch.ones(2, 3)
    with use("reference"):
        probe(x)
        with use("native"):
            probe(x)
        probe(x)
        with use():
            probe(x)
    probe(x)
    assert log == ["reference", "fast", "reference", "fast", "fast"]


def test_a_backend_that_runs_only_when_asked_by_name() -> None:
    shy = Backend(NAME, "triton", reference_forward, by_default=lambda which, named: "not yet measured" if named["power"] < 5 else None)
    op._backends = [shy, *[backend for backend in op.backends if backend.name != "triton"]]
    x = torch.ones(3)
    assert op.choose("forward", (x, None, x, 5.0)) is shy
    assert op.choose("forward", (x, None, x, 2.0)) is not shy
    with use("triton"):
        assert op.choose("forward", (x, None, x, 2.0)) is shy
    assert shy.reasons(op, "forward", (x, None, x, 2.0)) == ["triton: not yet measured; ops.use('triton') selects it"]


def test_use_lets_go_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), use("reference"):
        raise RuntimeError("inside")
    probe(torch.ones(2, 3))
    assert log == ["fast"]


def test_use_keeps_its_own_order() -> None:
    with use("reference", "native"):
        probe(torch.ones(2, 3))
    with use("native", "reference"):
        probe(torch.ones(2, 3))
    assert log == ["reference", "fast"]


def test_use_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"use\(\) names the backend 'fastest'; the backends are cuda, triton, native, reference"), use("fastest"):
        pass


def test_refusal_tells_every_reason() -> None:
    with use("cuda", "native"), pytest.raises(NotImplementedError) as caught:
        probe(torch.ones(2, 3, dtype=torch.float64), power=3.0)
    assert str(caught.value).splitlines() == [
        "no backend takes this call of probe (only cuda, native allowed):",
        "  cuda: the library did not load",
        "  native: x is torch.float64, not one of torch.float32",
    ]
    with use("triton"), pytest.raises(NotImplementedError, match="none is there"):
        probe(torch.ones(2, 3))
    with use("native"), pytest.raises(NotImplementedError, match="native: power is 3.0, not 2"):
        probe(torch.ones(2, 3), power=3.0)


def test_refusal_is_not_remembered() -> None:
    state = ["still loading"]
    op._backends = [Backend(NAME, "native", fast, unavailable=lambda: state[0])]
    with pytest.raises(NotImplementedError, match="still loading"):
        probe(torch.ones(2))
    state[0] = None  # type: ignore[call-overload]
    probe(torch.ones(2))
    assert log == ["fast"]


def test_backward_falls_to_a_backend_that_has_one() -> None:
    x = torch.full((2, 3), 3.0, requires_grad=True)
    probe(x)[0].sum().backward()
    assert log == ["fast", "reference backward 100"]
    assert x.grad is not None and torch.equal(x.grad, torch.full((2, 3), 6.0))
    with use("native"), pytest.raises(NotImplementedError, match="native: has no backward pass"):
        probe(x)[0].sum().backward()


def test_explain() -> None:
    rows = explain(NAME, torch.ones(2, 3), power=3.0)
    assert [(row.backend, row.chosen) for row in rows] == [("cuda", False), ("native", False), ("reference", True)]
    assert [str(row) for row in rows] == ["cuda: the library did not load", "native: power is 3.0, not 2", "reference: chosen"]
    assert str(explain(NAME, torch.ones(2, 3))[2]) == "reference: able, but another is preferred"
    assert log == []


def test_explain_under_use() -> None:
    with use("reference"):
        rows = {row.backend: row for row in explain(NAME, torch.ones(2, 3))}
    assert rows["native"].reasons == ("native: not among the allowed backends (reference)",) and rows["reference"].chosen
    with use("reference", "native"):
        rows = {row.backend: row for row in explain(NAME, torch.ones(2, 3))}
    assert rows["reference"].chosen and not rows["native"].chosen and not rows["native"].reasons


def test_explain_of_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="'flash_atention' is no op that chooses among backends; these are .*flash_attention"):
        explain("flash_atention")
    with pytest.raises(ValueError, match="power must not be 0"):
        explain(NAME, torch.ones(2), power=0.0)


def test_explain_chooses_what_runs() -> None:
    for x, power in ((torch.ones(2), 2.0), (torch.ones(2), 1.0), (torch.ones(2).double(), 2.0)):
        for names in ((), ("reference",), ("reference", "native")):
            log.clear()
            with use(*names):
                chosen = next(row.backend for row in explain(NAME, x, power=power) if row.chosen)
                probe(x, power=power)
            assert log == [{"native": "fast"}.get(chosen, chosen)]


def test_backends_report() -> None:
    report = {row.backend: row for row in backends_report()[NAME]}
    assert not report["cuda"].available and report["cuda"].reasons == ("cuda: the library did not load",)
    assert report["native"].available and report["reference"].available
    assert report["triton"].reasons == ("triton: not written for this op",)


def test_every_op_has_a_reference_with_all_its_passes() -> None:
    for name, each in _dispatch.OPS.items():
        assert each.reference.dtypes and "backward" not in each.names or each.reference.backward is not None, name
        assert each.prepare is not None, name


# -- the environment -----------------------------------------------------------------------------------------------------------------
def python(code: str, backend: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CVMK_BACKEND": backend}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)


def test_environment_variable() -> None:
    code = "import torch, cvmk.ops as o; q = torch.ones(1, 1, 2, 4); print([r.backend for r in o.explain('flash_attention', q, q, q) if r.chosen])"
    assert python(code, " reference , ").stdout.strip() == "['reference']"
    wrong = python(code, "reference,fastest")
    assert wrong.returncode != 0 and "CVMK_BACKEND names the backend 'fastest'" in wrong.stderr


# -- autograd ------------------------------------------------------------------------------------------------------------------------
def leaf(*shape: int) -> Tensor:
    return (torch.rand(shape, dtype=torch.float64) + 0.5).requires_grad_()


def test_derivatives() -> None:
    x, weight, constant = leaf(2, 3), leaf(2, 3), torch.ones((), dtype=torch.float64)
    assert gradcheck(lambda x, w: probe(x, w, constant, power=3.0), (x, weight))
    assert gradgradcheck(lambda x, w: probe(x, w, constant, power=3.0), (x, weight))
    assert gradgradcheck(lambda x: probe(x, None, constant, power=3.0)[1], (x,))


def test_third_derivative() -> None:
    x = leaf(1)
    y = probe(x, power=4.0)[0]
    for factor in (4, 12, 24):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        torch.testing.assert_close(y, factor * x.detach() ** (3 - (4, 12, 24).index(factor)))


def test_one_tensor_in_two_places() -> None:
    """x as x and as weight: x^3, whose derivatives are 3 x^2, 6 x."""
    x = leaf(3)
    assert gradcheck(lambda x: probe(x, x)[0], (x,)) and gradgradcheck(lambda x: probe(x, x)[0], (x,))


def test_only_what_is_needed_is_asked_for() -> None:
    x, weight = leaf(2), leaf(2)
    probe(x.detach(), weight)[0].sum().backward()
    assert log[-1] == "reference backward 010" and weight.grad is not None
    probe(x, weight.detach())[1].sum().backward()
    assert log[-1] == "reference backward 100" and x.grad is not None


class Watcher(TorchDispatchMode):
    """The ops of this library that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "cvmk::" in str(function.name()):
            self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def test_who_watches_sees_both_passes() -> None:
    x = leaf(2)
    with Watcher() as watcher:
        probe(x)[0].sum().backward()
    assert watcher.seen == ["cvmk::probe_forward", "cvmk::probe_backward"]
    with torch.autograd.profiler.profile() as profile:
        probe(x)[0].sum().backward()
    assert {"cvmk::probe_forward", "cvmk::probe_backward"} <= {event.name for event in profile.function_events}


def test_constants_get_no_gradient() -> None:
    constant = leaf()
    assert not probe(torch.ones(2), None, constant)[0].requires_grad
    x = leaf(2)
    (y,) = torch.autograd.grad(probe(x, None, constant)[0].sum(), x)
    assert y.shape == x.shape and constant.grad is None
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(probe(x, None, constant)[0].sum(), constant)


def test_no_graph_where_nobody_asks() -> None:
    x = leaf(2)
    with torch.no_grad():
        assert not probe(x)[0].requires_grad
    with torch.inference_mode():
        assert not probe(x)[0].requires_grad
    assert not probe(x.detach())[0].requires_grad


# -- what an implementation may rely on -------------------------------------------------------------------------------------------------
def test_no_autocast_inside() -> None:
    """Products inside an implementation keep their dtype, whatever the caller's autocast."""
    seen = []

    def product(x: Tensor, weight: Tensor | None, constant: Tensor, power: float) -> tuple[Tensor, Tensor]:
        seen.append((x @ x.t()).dtype)
        return x.clone(), x.sum(-1)

    op._backends = [Backend(NAME, "native", product)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe(torch.ones(2, 3))
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_results_are_contiguous() -> None:
    assert all(t.is_contiguous() for t in probe(torch.ones(3, 2, dtype=torch.float64).t()))


def test_autocast_casts() -> None:
    single, half, double, whole = torch.ones(1), torch.ones(1).half(), torch.ones(1).double(), torch.ones(1, dtype=torch.int64)
    tensors = (single, half, double, whole, None)
    assert _dispatch.autocast_lower(*tensors) == tensors and _dispatch.autocast_float32(*tensors) == tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower, wide = _dispatch.autocast_lower(*tensors), _dispatch.autocast_float32(*tensors)
    assert [t and t.dtype for t in lower] == [torch.bfloat16, torch.bfloat16, torch.float64, torch.int64, None]
    assert [t and t.dtype for t in wide] == [torch.float32, torch.float32, torch.float64, torch.int64, None]


def test_public_names() -> None:
    assert set(_dispatch.OPS) - {NAME} <= set(ops.__all__)
    assert all(hasattr(ops, name) for name in ops.__all__)


def test_opcheck_and_compile() -> None:
    arguments = (torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64), torch.ones(()), 3.0)
    torch.library.opcheck(torch.ops.cvmk.probe_forward.default, arguments)
    x = leaf(2, 3)
    compiled = torch.compile(lambda x: probe(x * 2, power=3.0)[0].sum(), backend="aot_eager", fullgraph=True)
    compiled(x).backward()
    torch.testing.assert_close(x.grad, 24 * x.detach() ** 2)
