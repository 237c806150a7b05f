"""The machinery behind every op, on a small op of the test's own: choice, cache, refusals, forcing, autograd, autocast."""

from __future__ import annotations

import ctypes
import pickle
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from new_process import python
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cvmk import ops
from cvmk.errors import NoBackendError
from cvmk.ops import _dtypes, _op
from cvmk.ops._backend import Backend, use
from cvmk.ops._call import Written, fields_of, number
from cvmk.ops._explain import backends_report, explain
from cvmk.ops._op import Op, forget_choices

NAME = "probe"
log: list[str] = []


class Call(NamedTuple):
    x: Tensor
    weight: Tensor | None
    constant: Tensor
    power: float


class Out(NamedTuple):
    y: Tensor
    total: Tensor


def reference_forward(c: Call) -> Out:
    """(x ** power * weight + constant, sum over the last dimension)."""
    log.append("reference")
    y = c.x**c.power
    y = (y if c.weight is None else y * c.weight) + c.constant.detach()
    return Out(y, y.sum(-1))


def reference_backward(grads: Out, c: Call, saved: Out, needs: Any) -> tuple[Tensor, Tensor]:
    log.append("reference backward " + "".join("01"[need] for need in needs))
    assert saved.y.shape == c.x.shape and saved.total is None
    g = torch.zeros_like(c.x)
    g = g if grads.y is None else g + grads.y
    g = g if grads.total is None else g + grads.total[..., None]
    dx = g * c.power * c.x ** (c.power - 1) * (1 if c.weight is None else c.weight) if needs.x else c.x.new_empty(0)
    return dx, g * c.x**c.power if c.weight is not None and needs.weight else c.x.new_empty(0)


op = Op(
    NAME,
    Call,
    Out,
    module="no_such_file",
    fake_forward=lambda c: Out(c.x.new_empty(c.x.shape), c.x.new_empty(c.x.shape[:-1])),
    differentiable=("x", "weight"),
    saved=("y",),
)
_op.OPS.pop(NAME)  # all test modules are imported before the first test: the others' must not see it


@op.prepared_by
def prepare(x: Tensor, weight: Tensor | None = None, constant: Tensor | None = None, *, power: float = 2.0) -> Call:
    if power == 0:
        raise ValueError("power must not be 0")
    return Call(x, weight, torch.zeros(()) if constant is None else constant, power)


def probe(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return op(prepare(*args, **kwargs))  # type: ignore[no-any-return]


def fast(c: Call) -> Out:
    log.append("fast")
    return Out(c.x.clone(), c.x.sum(-1))


def only_squares(which: str, call: Call) -> list[str]:
    return [] if call.power == 2.0 else [f"power is {call.power}, not 2"]


REFERENCE = Backend(NAME, "reference", reference_forward, reference_backward)
FAST = Backend(NAME, "native", fast, dtypes=(torch.float32,), devices=("cpu",), limits=only_squares)
BROKEN = Backend(NAME, "cuda", fast, unavailable=lambda: "the library did not load")


@pytest.fixture(autouse=True)
def backends() -> Iterator[None]:
    op.backends = [BROKEN, FAST, REFERENCE]
    log.clear()
    _op.OPS[NAME] = op
    yield
    _op.OPS.pop(NAME, None)


def test_first_able_backend_runs() -> None:
    probe(torch.ones(2, 3))
    probe(torch.ones(2, 3, dtype=torch.float64))
    probe(torch.ones(2, 3), power=3.0)
    assert log == ["fast", "reference", "reference"]


def test_choice_is_kept_by_what_was_read_to_make_it() -> None:
    asked: list[Any] = []

    def limits(which: str, call: Call) -> list[str]:
        asked.append((tuple(call.x.shape), call.power))
        return []

    op.backends = [Backend(NAME, "native", fast, limits=limits), REFERENCE]
    for _ in range(3):
        probe(torch.ones(2, 3))
        probe(torch.ones(2, 3), torch.ones(2, 3))
    assert asked == [((2, 3), 2.0)]
    probe(torch.ones(3, 2).t())
    probe(torch.ones(2, 3), power=3.0)
    assert asked == [((2, 3), 2.0)] * 2 + [((2, 3), 3.0)]


def test_what_is_read_may_depend_on_what_was_read() -> None:
    """Choices stay right where one call reads more than another: the second reads `weight` only for cubes."""

    def limits(which: str, call: Call) -> list[str]:
        return ["a cube needs a weight"] if call.power == 3.0 and call.weight is None else []

    op.backends = [Backend(NAME, "native", fast, limits=limits), REFERENCE]
    x = torch.ones(2)
    for _ in range(2):
        log.clear()
        for weight, power in ((None, 2.0), (None, 3.0), (x, 3.0), (x, 2.0), (None, 3.0)):
            probe(x, weight, power=power)
        assert log == ["fast", "reference", "fast", "fast", "reference"]


@pytest.mark.parametrize("look", [lambda call: list(call)[2], lambda call: call[2], lambda call: call._asdict()["constant"], lambda call: call.constant])
def test_however_an_argument_is_read_it_counts(look: Any) -> None:
    def limits(which: str, call: Call) -> list[str]:
        return [] if torch.float32 == look(call).dtype else ["the constant is wide"]

    op.backends = [Backend(NAME, "native", fast, limits=limits), REFERENCE]
    for dtype in (torch.float32, torch.float64) * 2:
        probe(torch.ones(2), None, torch.zeros((), dtype=dtype))
    assert log == ["fast", "reference"] * 2


def test_of_a_tensor_only_what_was_read_counts() -> None:
    """A choice by a tensor's dtype holds for all its shapes, and tells None from a tensor; any other attribute counts with the dtype."""
    asked: list[Any] = []

    def limits(which: str, call: Call) -> list[str]:
        asked.append(call.weight)
        return ["weight is wide"] if isinstance(call.weight, Tensor) and call.weight.dtype == torch.float64 else []

    op.backends = [Backend(NAME, "native", fast, limits=limits), REFERENCE]
    x = torch.ones(2, 3)
    for weight in (None, torch.ones(3), torch.ones(2, 1), torch.ones(()).double(), torch.ones(3).double(), torch.ones(2, 3), None):
        probe(x, weight)
    assert len(asked) == 3 and log == ["fast", "fast", "fast", "reference", "reference", "fast", "fast"]
    op.backends = [Backend(NAME, "native", fast, limits=lambda which, call: [] if call.constant.dim() == 0 else ["no number"]), REFERENCE]
    log.clear()
    for constant in (torch.ones(()), torch.ones(3), torch.ones(()), torch.ones(2, 1)):
        probe(x, None, constant)
    assert log == ["fast", "reference", "fast", "reference"]


def test_a_choice_that_dtype_and_device_decide_is_kept_once() -> None:
    op.backends = [BROKEN, Backend(NAME, "native", fast, dtypes=(torch.float32,), devices=("cpu",)), FAST, REFERENCE]
    for n in range(1, 9):
        probe(torch.ones(n, 3), power=float(n))
    assert log == ["fast"] * 8 and len(op._chosen) == 1
    probe(torch.ones(2, 3, dtype=torch.float64))
    assert log[-1] == "reference" and len(op._chosen) == 2
    with use("reference"):
        probe(torch.ones(2, 3))
    assert log[-1] == "reference" and len(op._chosen) == 3


def test_forgotten_choices_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "_CACHE_LIMIT", 4)
    for n in range(12, 0, -1):
        probe(torch.ones(1, 2), power=float(n))
    assert [len(choices.backends) for choices in op._chosen.values()] == [4]
    probe(torch.ones(1, 2), power=12.0)
    probe(torch.ones(1, 2), power=2.0)
    assert log == ["reference"] * 10 + ["fast", "reference", "reference", "fast"]


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
    shy = Backend(NAME, "triton", reference_forward, by_default=lambda which, call: "not yet measured" if call.power < 5 else None)
    op.backends = [shy, *[backend for backend in op.backends if backend.name != "triton"]]
    x = torch.ones(3)
    assert op.choose("forward", Call(x, None, x, 5.0)) is shy
    assert op.choose("forward", Call(x, None, x, 2.0)) is not shy
    with use("triton"):
        assert op.choose("forward", Call(x, None, x, 2.0)) is shy
    assert shy.reasons("forward", Call(x, None, x, 2.0), "x") == ["triton: not yet measured; ops.use('triton') selects it"]


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


def test_use_is_by_context() -> None:
    """Threads whose blocks overlap keep their own backends, and a new thread has the process's."""
    entered, others = threading.Barrier(2), threading.Barrier(2)
    chosen: dict[str, list[str]] = {}

    def run(name: str) -> None:
        with use(name):
            entered.wait()
            chosen[name] = [row.backend for row in explain(NAME, torch.ones(2)) if row.chosen]
            others.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("reference", "native")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == {"reference": ["reference"], "native": ["native"]}
    with use("reference"):
        thread = threading.Thread(target=lambda: probe(torch.ones(2)))
        thread.start()
        thread.join()
    assert log == ["fast"]


def test_a_backward_pass_keeps_what_its_forward_pass_was_allowed() -> None:
    other = Backend(NAME, "cuda", fast, lambda grads, c, saved, needs: (log.append("other backward"), (c.x, c.x))[1])
    op.backends = [other, REFERENCE]
    x = leaf(2)
    with use("reference"):
        y = probe(x)[0].sum()
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    assert log == ["reference", "reference backward 10"]
    y = probe(x)[0].sum()
    with use("reference"):
        y.backward()
    assert log[2:] == ["fast", "other backward"]


def test_use_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"use\(\) names the backend 'fastest'; the backends are cuda, triton, native, reference"), use("fastest"):
        pass


def test_refusal_tells_every_reason() -> None:
    with use("cuda", "native"), pytest.raises(NotImplementedError) as caught:
        probe(torch.ones(2, 3, dtype=torch.float64), power=3.0)
    reasons = ("cuda: the library did not load", "native: x is torch.float64, not one of torch.float32")
    assert isinstance(caught.value, NoBackendError) and caught.value.reasons == reasons
    assert str(caught.value) == (
        f"no backend takes this call of probe, for ops.use allows only cuda, native ({'; '.join(reasons)}): "
        "leave it out, or add a backend that takes the call"
    )
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.reasons == reasons and again.exit_code == 2
    with use("triton"), pytest.raises(NotImplementedError, match="triton: not written for probe"):
        probe(torch.ones(2, 3))
    with use("native"), pytest.raises(NotImplementedError, match="native: power is 3.0, not 2"):
        probe(torch.ones(2, 3), power=3.0)


def test_refusal_is_not_remembered() -> None:
    state = ["still loading"]
    op.backends = [Backend(NAME, "native", fast, unavailable=lambda: state[0])]
    with pytest.raises(NotImplementedError, match="still loading"):
        probe(torch.ones(2))
    state[0] = None  # type: ignore[call-overload]
    probe(torch.ones(2))
    assert log == ["fast"]


def test_backward_falls_to_a_backend_that_has_one() -> None:
    x = torch.full((2, 3), 3.0, requires_grad=True)
    probe(x)[0].sum().backward()
    assert log == ["fast", "reference backward 10"]
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
    for name, each in _op.OPS.items():
        assert each.reference.dtypes and (not each.differentiable or each.reference.backward is not None), name


# -- the environment -----------------------------------------------------------------------------------------------------------------
def test_environment_variable() -> None:
    code = "import torch, cvmk.ops as o; q = torch.ones(1, 1, 2, 4); print([r.backend for r in o.explain('flash_attention', q, q, q) if r.chosen])"
    assert python(code, CVMK_BACKEND=" reference , ").stdout.strip() == "['reference']"
    wrong = python(code, CVMK_BACKEND="reference,fastest")
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
    assert log[-1] == "reference backward 01" and weight.grad is not None
    probe(x, weight.detach())[1].sum().backward()
    assert log[-1] == "reference backward 10" and x.grad is not None


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


class Named(TorchFunctionMode):
    """The functions of this library that a torch-function mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "cvmk." in str(function):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_the_op() -> None:
    x = leaf(2)
    with Named() as named:
        probe(x)
        probe(x.detach())
    assert [name.split(".")[1] for name in named.seen] == ["probe_forward"] * 2


def test_a_default_device_does_not_reach_inside() -> None:
    """An implementation that allocates by torch.empty without a device gets the tensors' own."""
    op.backends = [Backend(NAME, "native", lambda c: Out(torch.empty(c.x.shape).copy_(c.x), torch.zeros(c.x.shape[:-1])))]
    x = torch.ones(2, 3)
    with torch.device("meta"):
        y, total = probe(x, None, x)
    assert y.device.type == total.device.type == "cpu" and torch.equal(y, x)


class Marked(torch.Tensor):
    """A subclass that keeps its type through every function."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "cvmk." in str(function):
            log.append("marked")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_go_through_the_dispatcher() -> None:
    y = probe(torch.ones(2).as_subclass(Marked))[0]
    assert type(y) is Marked and log == ["marked", "fast"]
    log.clear()
    y = probe(torch.ones(2), torch.ones(2).as_subclass(Marked))[0]
    assert type(y) is Marked and log == ["marked", "fast"]
    log.clear()
    assert type(probe(torch.nn.Parameter(torch.ones(2), requires_grad=False))[0]) is torch.Tensor and log == ["fast"]


def test_fake_and_meta_tensors_run_nothing() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(2, 3))
    for x in (fake, torch.ones(2, 3, device="meta")):
        y, total = probe(x, None, x)
        assert type(y) is type(x) and y.device == x.device and y.shape == (2, 3) and total.shape == (2,)
    assert log == []


def test_negated_views_are_read_as_their_numbers() -> None:
    """The imaginary part of a conjugate is its memory's number with the sign turned round by a bit."""
    x = torch.complex(torch.ones(1, 1), torch.full((1, 1), 2.0)).conj().imag
    assert x.is_neg()
    op.backends = [Backend(NAME, "native", lambda c: Out(torch.from_numpy(np.array([[_first(c.x)]], dtype=np.float32)), c.x.new_zeros(1)))]
    assert probe(x, None, torch.zeros(()))[0].item() == -2.0


def _first(x: Tensor) -> float:
    """The number at the address of x, as a kernel reads it."""
    return ctypes.c_float.from_address(x.data_ptr()).value


def cube(x: Tensor) -> Tensor:
    return probe(x, None, torch.zeros((), dtype=x.dtype), power=3.0)[0]


def of_a_batch(f: Any, x: Tensor) -> Tensor:
    """The gradient through vmap over inputs that ask for one."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad((leaf + torch.vmap(f)(leaf)).square().sum(), leaf)[0]


def of_batched_gradients(f: Any, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (batch,) = torch.autograd.grad(f(leaf), leaf, torch.ones(4, *x.shape, dtype=x.dtype), is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(batch.sum(), leaf)[0]


TRANSFORMS = {
    "vmap": of_a_batch,
    "batched gradients, again": of_batched_gradients,
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda x: torch.func.grad(lambda x: f(x).sum())(x).sum())(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.vmap(f)(x).sum())(x),
    "vmap of grad of grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: torch.func.grad(lambda x: f(x).sum())(x).sum()))(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "hessian": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x, vectorize=True),
    "no_grad inside": lambda f, x: torch.func.grad(lambda x: (torch.no_grad()(f)(x) * x).sum())(x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_transforms(name: str, compiled: bool) -> None:
    x = torch.rand(3, 2, dtype=torch.float64) + 0.5
    transform = TRANSFORMS[name]
    if compiled and "grad" in name and "gradients" not in name:
        run = torch.compile(lambda x: transform(cube, x), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run(x), transform(lambda x: x**3, x))
    else:
        torch.testing.assert_close(transform(cube, x), transform(lambda x: x**3, x))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda f: torch.func.hessian(lambda x: f(x).sum()), "no forward-mode derivative"),
        (lambda f: torch.func.jacrev(torch.func.grad(lambda x: f(x).sum())), "take it by nested torch.func.grad"),
    ],
)
def test_transforms_that_are_refused(transform: Any, message: str) -> None:
    """PyTorch would take the second derivative for zero."""
    with pytest.raises(NotImplementedError, match=message):
        transform(cube)(torch.rand(2, dtype=torch.float64))


def test_gradients_through_a_compiled_vmap() -> None:
    x = leaf(3, 2)
    torch.compile(lambda x: (torch.vmap(cube)(x) * x).sum(), backend="aot_eager", fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, 4 * x.detach() ** 3)


def test_a_tangent_is_refused() -> None:
    """PyTorch would take the derivative for zero."""
    x = torch.rand(3)
    message = "probe has no forward-mode derivative, and x has a tangent"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: probe(x)[0], (x,), (x,))
    with forward_ad.dual_level():
        probe(x)
        with pytest.raises(NotImplementedError, match=message):
            probe(forward_ad.make_dual(x, x))


def test_inference_tensors_and_results() -> None:
    x = torch.ones(2)
    with torch.inference_mode():
        inside = probe(x)[0]
    assert inside.is_inference() and torch.equal(probe(inside)[0], inside) and not probe(inside)[0].is_inference()


def test_a_first_call_in_inference_mode_leaves_calls_with_gradients_whole() -> None:
    """The constants of a backend's module, which that call imports, are no inference tensors."""
    code = """
import torch
from cvmk import ops
x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
scan = [torch.randn(1, 2, 5), torch.rand(1, 2, 5), -torch.rand(2, 4), torch.randn(2, 4), torch.randn(2, 4)]
def call():
    normed = ops.residual_norm(x, torch.randn(3, 16), torch.ones(16))[1]
    return ops.fused_linear(x, weight).sum() + normed.sum() + ops.selective_scan(x[:1, None, :5].expand(1, 2, 5), *scan[1:]).sum()
with torch.inference_mode():
    call()
call().backward()
assert x.grad.isfinite().all()
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


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
def test_gradients_along_with_the_forward_pass() -> None:
    """They are handed on once, to a backward pass that asks for those of the first result alone and that nobody differentiates."""
    handed: list[float] = []

    def forward_with_gradient(c: Call) -> Any:
        def hand_on(grad: Tensor) -> Any:
            handed.append(grad.sum().item())
            return None if grad.sum() > 100 else (grad * c.power * c.x ** (c.power - 1), c.x.new_empty(0))

        return None if c.power == 4.0 else (fast(c), hand_on)

    op.backends = [Backend(NAME, "native", fast, reference_backward, forward_with_gradient)]
    x = leaf(2)
    y, total = probe(x, power=2.0)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], 2 * x.detach())
    assert log == ["fast", "reference backward 10"] and handed == [2.0]
    for run in (lambda: probe(x)[0].sum() * 200, lambda: probe(x)[1].sum(), lambda: sum(out.sum() for out in probe(x)), lambda: probe(x, power=4.0)[0].sum()):
        log.clear()
        run().backward()  # type: ignore[no-untyped-call, union-attr]
        assert log == ["fast", "reference backward 10"]
    assert handed == [2.0, 400.0]


# -- what a call holds -------------------------------------------------------------------------------------------------------------------
def test_schemas_are_made_of_calls() -> None:
    forward, backward = torch.ops.cvmk.probe_forward.default._schema, torch.ops.cvmk.probe_backward.default._schema
    assert str(forward) == "cvmk::probe_forward(Tensor x, Tensor? weight, Tensor constant, float power) -> (Tensor y, Tensor total)"
    assert str(backward) == (
        "cvmk::probe_backward(Tensor? grad_y, Tensor? grad_total, Tensor x, Tensor? weight, Tensor constant, Tensor y, float power, bool[] needs)"
        " -> (Tensor, Tensor)"
    )


def test_fields_that_no_schema_has() -> None:
    with pytest.raises(TypeError, match=r"Wrong.shape is tuple\[int, ...\], which no schema has"):
        fields_of(NamedTuple("Wrong", [("x", Tensor), ("shape", tuple[int, ...])]))
    with pytest.raises(TypeError, match="tensors come before the other fields"):
        fields_of(NamedTuple("Late", [("p", float), ("x", Tensor)]))


def test_numbers() -> None:
    assert number("scale", 2) == number("scale", torch.tensor(2.0)) == number("scale", np.float32(2)) == 2.0
    with pytest.raises(TypeError, match="scale is a tensor that asks for a gradient"):
        number("scale", torch.tensor(2.0, requires_grad=True))


class WriteCall(NamedTuple):
    into: Written
    x: Tensor
write_op = Op(
    "probe_write", WriteCall, NamedTuple("Nothing", [("nothing", Tensor)]), module="no_such_file", fake_forward=lambda c: c.x.new_empty(0)
)
_op.OPS.pop("probe_write")
write_op.backends = [Backend("probe_write", "reference", lambda c: c.into.copy_(c.x).new_empty(0))]


def test_what_an_op_may_write_to() -> None:
    x = torch.ones(2, 3)
    into = torch.zeros(2, 3)
    write_op(WriteCall(into, x))
    assert torch.equal(into, x) and into._version > 0
    saved = leaf(2, 3)
    y = saved.square()
    z = y.exp()
    loss = z.sum()
    write_op(WriteCall(z.detach(), x.double()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match=r"writes to into, whose elements share memory .* clone\(\) it"):
        write_op(WriteCall(torch.zeros(3).expand(2, 3), x))
    write_op(WriteCall(torch.zeros(3, 2).t(), x))
    with torch.inference_mode():
        inference = torch.zeros(2, 3)
        write_op(WriteCall(inference, x))
    assert torch.equal(inference.clone(), x)
    with pytest.raises(RuntimeError, match="writes to into, an inference tensor, outside of inference mode"):
        write_op(WriteCall(inference, x))
    torch.library.opcheck(torch.ops.cvmk.probe_write_forward.default, (torch.zeros(2, 3), x))


def test_compiled_writes_are_seen_by_those_who_saved() -> None:
    def run(x: Tensor) -> Tensor:
        y = x.exp()
        write_op(WriteCall(y.detach(), torch.ones_like(x)))
        return y.sum()

    with pytest.raises(Exception, match="modified by an inplace operation"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(leaf(2)).backward()


@pytest.mark.parametrize("traced", [False, True])
def test_a_backend_gives_none_for_a_gradient_that_nobody_wants(traced: bool) -> None:
    def backward(grads: Out, c: Call, saved: Out, needs: Any) -> tuple[Tensor | None, ...]:
        return (2 * c.x * grads.y if needs.x else None), (c.x**2 * grads.y if needs.weight else None)

    op.backends = [Backend(NAME, "native", fast, backward)]
    for wanted in ("x", "weight"):
        x, weight = torch.ones(2, requires_grad=wanted == "x"), torch.ones(2, requires_grad=wanted == "weight")
        run = torch.compile(probe, backend="aot_eager", fullgraph=True) if traced else probe
        run(x, weight)[0].sum().backward()
        assert (x.grad is None) == (wanted != "x") and (weight.grad is None) == (wanted != "weight")


def test_forgotten_choices() -> None:
    answers = [["not today"]]
    op.backends = [Backend(NAME, "native", fast, limits=lambda which, call: answers[0]), REFERENCE]
    probe(torch.ones(2))
    answers[0] = []
    probe(torch.ones(2))
    forget_choices()
    probe(torch.ones(2))
    assert log == ["reference", "reference", "fast"]


def test_no_autocast_inside() -> None:
    """Products inside an implementation keep their dtype, whatever the caller's autocast."""
    seen = []

    def product(c: Call) -> Out:
        seen.append((c.x @ c.x.t()).dtype)
        return Out(c.x.clone(), c.x.sum(-1))

    op.backends = [Backend(NAME, "native", product)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe(torch.ones(2, 3))
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_results_are_contiguous() -> None:
    assert all(t.is_contiguous() for t in probe(torch.ones(3, 2, dtype=torch.float64).t()))


def test_autocast_casts() -> None:
    single, half, double, whole = torch.ones(1), torch.ones(1).half(), torch.ones(1).double(), torch.ones(1, dtype=torch.int64)
    tensors = (single, half, double, whole, None)
    assert _dtypes.autocast_lower(*tensors) == tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = _dtypes.autocast_lower(*tensors)
    assert [t and t.dtype for t in lower] == [torch.bfloat16, torch.bfloat16, torch.float64, torch.int64, None]


def test_public_names() -> None:
    assert {name.removesuffix("_in_place") for name, each in _op.OPS.items() if each.prepare is not None} - {NAME} <= set(ops.__all__)
    assert all(hasattr(ops, name) for name in ops.__all__)


def test_opcheck_and_compile() -> None:
    arguments = (torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64), torch.ones(()), 3.0)
    torch.library.opcheck(torch.ops.cvmk.probe_forward.default, arguments)
    x = leaf(2, 3)
    compiled = torch.compile(lambda x: probe(x * 2, power=3.0)[0].sum(), backend="aot_eager", fullgraph=True)
    compiled(x).backward()
    torch.testing.assert_close(x.grad, 24 * x.detach() ** 2)
