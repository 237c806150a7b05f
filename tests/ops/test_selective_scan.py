"""The selective scan and its single step against a loop over sequences and time in float64, written here from the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cvmk.ops import explain, native, selective_scan, selective_state_update, use
from cvmk.ops._storage import shares_memory_with_itself
from cvmk.ops.reference.selective_scan import scan_backward, scan_forward
from cvmk.ops.selective_scan import SCAN_CHUNK, ScanCall, _prepare_scan, _prepare_update, scan_op

ON_CPU = ["reference"] if native.library() is None else ["reference", "native"]
CHANNEL_INPUTS = ("u", "delta", "z")


def inputs(
    batch: int = 2,
    dim: int = 4,
    state: int = 8,
    length: int = 16,
    *,
    B: str = "groups 1",
    C: str = "groups 1",
    optional: str = "D z delta_bias",
    dtype: torch.dtype = torch.float32,
    sequences: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random arguments; B and C are "constant", "plain" ([batch, state, length]) or "groups G". A < 0 but for a few channels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def weights(kind: str) -> Tensor:
        if kind == "constant":
            return normal(dim, state)
        if kind == "plain":
            return normal(batch, state, length)
        return normal(batch, int(kind.split()[1]), state, length)

    made = {
        "u": normal(batch, dim, length),
        "delta": 0.5 * torch.rand(batch, dim, length, generator=generator, dtype=torch.float64),
        "A": 0.02 - torch.rand(dim, state, generator=generator, dtype=torch.float64),
        "B": weights(B),
        "C": weights(C),
    }
    more = {
        "D": normal(dim),
        "z": normal(batch, dim, length),
        "delta_bias": 0.5 * torch.rand(dim, generator=generator, dtype=torch.float64),
        "initial_state": normal(batch if sequences is None else sequences, dim, state),
    }
    made.update({name: more[name] for name in optional.split()})
    keep = {"A", "D", "delta_bias", "initial_state"}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: tensor.to(wide if name in keep else dtype) for name, tensor in made.items()}


def naive(
    arguments: dict[str, Tensor], softplus: bool = False, reverse: bool = False, cu_seqlens: list[int] | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The law in loops: one sequence, then one step after the other. Computes in `dtype`; differentiable."""
    a = {name: tensor.to(dtype) for name, tensor in arguments.items()}
    (batch, dim, length), state = a["u"].shape, a["A"].shape[1]

    def at(name: str, row: int, t: int) -> Tensor:
        weights = a[name]
        if weights.dim() == 2:
            return weights
        if weights.dim() == 3:
            return weights[row, None, :, t]
        return torch.stack([weights[row, d * weights.shape[1] // dim, :, t] for d in range(dim)])

    spans = [(row, 0, length) for row in range(batch)]
    if cu_seqlens is not None:
        spans = [(0, start, stop) for start, stop in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    outs: dict[tuple[int, int], Tensor] = {}
    lasts = []
    for index, (row, start, stop) in enumerate(spans):
        x = a["initial_state"][index] if "initial_state" in a else torch.zeros(dim, state, dtype=dtype)
        for t in reversed(range(start, stop)) if reverse else range(start, stop):
            step = a["delta"][row, :, t] + a.get("delta_bias", torch.zeros(dim, dtype=dtype))
            if softplus:
                step = torch.where(step > 20, step, torch.log1p(torch.exp(step.clamp(max=20))))
            x = torch.exp(step[:, None] * a["A"]) * x + (step * a["u"][row, :, t])[:, None] * at("B", row, t)
            y = (at("C", row, t) * x).sum(-1)
            if "D" in a:
                y = y + a["D"] * a["u"][row, :, t]
            if "z" in a:
                z = a["z"][row, :, t]
                y = y * z * torch.sigmoid(z)
            outs[row, t] = y
        lasts.append(x)
    rows = [torch.stack([outs[row, t] for t in range(length)], -1) if length else a["u"][row] for row in range(batch)]
    return (torch.stack(rows) if rows else a["u"]), (torch.stack(lasts) if lasts else torch.zeros(0, dim, state, dtype=dtype))


def with_gradients(function: Any, arguments: dict[str, Tensor], seed: int = 1) -> list[Tensor]:
    """Both outputs and the gradients of every argument, for fixed random gradients of the outputs."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in arguments.items()}
    outputs = function(leaves)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return [o.detach() for o in outputs] + list(gradients)


def error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0


def check(arguments: dict[str, Tensor], *, softplus: bool = False, reverse: bool = False, cu_seqlens: list[int] | None = None) -> None:
    """Two baselines: error against float64 at most 2 (outputs) or 3 (gradients) times that of the loop in float32, cast at its end."""
    u = arguments["u"]
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)

    def ours(a: dict[str, Tensor]) -> Any:
        return selective_scan(**a, delta_softplus=softplus, return_last_state=True, reverse=reverse, cu_seqlens=packed)  # type: ignore[arg-type]

    def loop(a: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out, last = naive(a, softplus, reverse, cu_seqlens, torch.float64 if u.dtype == torch.float64 else torch.float32)
        return out.to(u.dtype), last

    exact = with_gradients(lambda a: naive(a, softplus, reverse, cu_seqlens), {name: tensor.double() for name, tensor in arguments.items()})
    names = ["out", "last_state", *arguments]
    for name, found, plain, law, limit in zip(names, with_gradients(ours, arguments), with_gradients(loop, arguments), exact, [2, 2] + [3] * 9, strict=False):
        assert found.dtype == plain.dtype and found.shape == plain.shape, name
        # The float64 loop cannot be its own second baseline: some hundreds of roundings stand between it and another order of sums.
        floor = (1000 if u.dtype == torch.float64 else 4) * torch.finfo(found.dtype).eps * max(1.0, law.abs().max().item())
        assert error(found, law) <= limit * error(plain, law) + floor, (name, error(found, law), error(plain, law))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("length", [1, 16, 128, 256])
def test_lengths_and_dtypes(length: int, dtype: torch.dtype) -> None:
    groups = "groups 1" if length != 128 else "groups 2"
    check(inputs(length=length, B=groups, C=groups, dtype=dtype, optional="D z delta_bias initial_state"), softplus=True)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("B", "C", "sizes"), [("plain", "plain", (40, 33, 16, 17)), ("groups 2", "constant", (2, 6, 5, 70)), ("constant", "groups 2", (1, 18, 3, 1))]
)
def test_channels_last(backend: str, B: str, C: str, sizes: tuple[int, int, int, int]) -> None:
    """The same bits as with time last, of tensors that are parts of wider ones."""
    for reverse, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        a = inputs(*sizes, B=B, C=C, dtype=dtype, optional="D z delta_bias initial_state")

        def turned(a: dict[str, Tensor]) -> dict[str, Tensor]:
            found = {name: tensor.mT if name in CHANNEL_INPUTS or (name in "BC" and tensor.dim() == 3) else tensor for name, tensor in a.items()}
            found |= {name: found[name].permute(0, 3, 1, 2) for name in "BC" if found[name].dim() == 4}
            found |= {name: torch.cat((found[name],) * 2, -1)[..., : found[name].shape[-1]] for name in ("u", "z", "B") if found[name].dim() > 2}
            return found

        def last(a: dict[str, Tensor], reverse: bool = reverse) -> Any:
            out, state = selective_scan(**turned(a), delta_softplus=True, reverse=reverse, return_last_state=True, channels_last=True)  # type: ignore[arg-type]
            assert out.is_contiguous() and out.shape == a["u"].mT.shape
            return out.mT, state

        def first(a: dict[str, Tensor], reverse: bool = reverse) -> Any:
            return selective_scan(**a, delta_softplus=True, reverse=reverse, return_last_state=True)  # type: ignore[arg-type]

        with use(backend):
            for name, one, other in zip(("out", "state", *a), with_gradients(last, a), with_gradients(first, a), strict=True):
                assert torch.equal(one, other), name


@pytest.mark.parametrize("optional", ["", "D", "z", "delta_bias", "initial_state", "D z delta_bias"])
@pytest.mark.parametrize("softplus", [False, True])
def test_optional_arguments(optional: str, softplus: bool) -> None:
    check(inputs(length=19, optional=optional), softplus=softplus)


@pytest.mark.parametrize("B", ["constant", "plain", "groups 1", "groups 2", "groups 4"])
@pytest.mark.parametrize("C", ["constant", "plain", "groups 2"])
def test_constant_and_grouped_weights(B: str, C: str) -> None:
    if B != "constant" and C != "constant" and ("2" in B + C or "4" in B) and B != C:
        with pytest.raises(ValueError, match="groups"):
            selective_scan(**inputs(B=B, C=C))
    else:
        check(inputs(length=SCAN_CHUNK + 3, B=B, C=C), softplus=True)


@pytest.mark.parametrize("length", [1, SCAN_CHUNK - 1, SCAN_CHUNK, SCAN_CHUNK + 1, 2 * SCAN_CHUNK])
def test_reverse(length: int) -> None:
    arguments = inputs(length=length, dim=3, B="plain", C="constant", optional="D z initial_state")
    check(arguments, reverse=True)
    flipped = {name: t.flip(-1) if name in (*CHANNEL_INPUTS, "B") else t for name, t in arguments.items()}
    out, last = selective_scan(**arguments, reverse=True, return_last_state=True)
    other, other_last = selective_scan(**flipped, return_last_state=True)
    assert torch.equal(out, other.flip(-1)) and torch.equal(last, other_last)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("optional", ["D z", "delta_bias initial_state"])
def test_packed_sequences_do_not_touch_each_other(reverse: bool, optional: str) -> None:
    cu_seqlens = [0, 0, 5, 64, 70, 70, 71, 150, 150]
    check(inputs(1, 4, 3, 150, B="groups 2", C="groups 2", optional=optional, sequences=8), softplus=True, reverse=reverse, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("reverse", [False, True])
def test_nan_in_one_packed_sequence_stays_there(reverse: bool) -> None:
    arguments = inputs(1, 4, 3, 30, optional="D z initial_state", sequences=3)
    cu_seqlens = torch.tensor([0, 10, 20, 30])
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "reverse": reverse, "return_last_state": True}
    want = with_gradients(lambda a: selective_scan(**a, **options), arguments)
    for name in ("u", "delta", "B", "C", "z"):
        arguments[name][..., 10:20] = float("nan")
    arguments["initial_state"][1] = float("inf")
    found = with_gradients(lambda a: selective_scan(**a, **options), arguments)
    for name, a, b in zip(["out", "last", *arguments], found, want, strict=True):
        if name in ("out", "u", "delta", "B", "C", "z"):
            assert torch.equal(a[..., :10], b[..., :10]) and torch.equal(a[..., 20:], b[..., 20:]), name
        elif name in ("last", "initial_state"):
            assert torch.equal(a[[0, 2]], b[[0, 2]]), name


def test_growing_states_and_large_steps() -> None:
    """A > 0 grows, a large step forgets everything at once, and softplus goes over to the identity above 20."""
    arguments = inputs(length=80, optional="D")
    arguments["A"] = torch.linspace(-30, 0.3, 32).view(4, 8)
    check(arguments)
    arguments["delta"] = torch.linspace(-50, 60, 2 * 4 * 80).view(2, 4, 80).contiguous()
    arguments["A"] = -torch.rand(4, 8) - 0.1
    check(arguments, softplus=True)
    assert all(t.isfinite().all() for t in with_gradients(lambda a: selective_scan(**a, delta_softplus=True, return_last_state=True), arguments))


def test_mixed_dtypes_and_any_strides() -> None:
    arguments = inputs(3, 4, 5, 21, B="groups 2", C="constant", optional="D z delta_bias initial_state")
    arguments["u"], arguments["C"] = arguments["u"].bfloat16(), arguments["C"].half()
    want = with_gradients(lambda a: selective_scan(**a, delta_softplus=True, return_last_state=True), arguments)
    assert [t.dtype for t in want[2:]] == [t.dtype for t in arguments.values()]

    def strided(a: dict[str, Tensor]) -> Any:
        # [length, batch, dim] in memory, as a model that works on [batch, length, dim] hands it over.
        moved = {n: t.permute(2, 0, 1).contiguous().permute(1, 2, 0) if n in CHANNEL_INPUTS else t.transpose(0, 1).contiguous().transpose(0, 1)
                 if t.dim() > 1 else t for n, t in a.items()}  # fmt: skip
        assert not moved["u"].is_contiguous() and not moved["A"].is_contiguous()
        return selective_scan(**moved, delta_softplus=True, return_last_state=True)

    for a, b in zip(with_gradients(strided, arguments), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch,length", [(0, 7), (2, 0), (0, 0)])
@pytest.mark.parametrize("reverse", [False, True])
def test_empty(batch: int, length: int, reverse: bool) -> None:
    arguments = inputs(batch, 4, 3, length, B="groups 2", C="constant", optional="D z delta_bias initial_state")
    found = with_gradients(lambda a: selective_scan(**a, reverse=reverse, return_last_state=True), arguments)
    assert found[0].shape == (batch, 4, length)
    assert length or torch.equal(found[1], arguments["initial_state"])
    for name, gradient in zip(arguments, found[2:], strict=True):
        assert gradient.shape == arguments[name].shape
        assert name == "initial_state" or not gradient.any(), name
    del arguments["initial_state"]
    _, last = selective_scan(**arguments, return_last_state=True)
    assert last.shape == (batch, 4, 3) and not last.any()


def test_packed_without_positions_or_sequences() -> None:
    arguments = inputs(1, 4, 3, 0, optional="initial_state", sequences=2)
    found = with_gradients(lambda a: selective_scan(**a, cu_seqlens=torch.tensor([0, 0, 0]), return_last_state=True), arguments)
    assert torch.equal(found[1], arguments["initial_state"]) and found[-1].any()
    del arguments["initial_state"]
    out, last = selective_scan(**arguments, cu_seqlens=torch.tensor([0]), return_last_state=True)
    assert out.shape == (1, 4, 0) and last.shape == (0, 4, 3)


def test_only_the_gradients_that_are_asked_for() -> None:
    arguments = inputs(optional="D z delta_bias initial_state")
    want = dict(zip(arguments, with_gradients(lambda a: selective_scan(**a, return_last_state=True), arguments)[2:], strict=True))
    for name in arguments:
        found = with_gradients(lambda a, name=name: selective_scan(**{**arguments, name: a[name]}, return_last_state=True), {name: arguments[name]})
        assert torch.equal(found[2], want[name]), name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_first_and_second_derivatives(packed: bool, reverse: bool) -> None:
    groups = "groups 2" if reverse else "constant"
    arguments = inputs(
        1 if packed else 2, 2, 2, 4, B="groups 2", C=groups, optional="D z delta_bias initial_state", dtype=torch.float64, sequences=3 if packed else None
    )
    cu_seqlens = torch.tensor([0, 2, 2, 4]) if packed else None
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]

    def function(*tensors: Tensor) -> Any:
        named: dict[str, Any] = dict(zip(arguments, tensors, strict=True))
        return selective_scan(**named, delta_softplus=True, return_last_state=True, reverse=reverse, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_bits_repeat() -> None:
    arguments = inputs(3, 8, 4, 150, B="groups 2", C="groups 2")
    first, second = (with_gradients(lambda a: selective_scan(**a, return_last_state=True), arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_stays_far_below_all_states() -> None:
    """No tensor of either pass has the size of the states of every step, [batch, dim, state, length]."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    arguments = inputs(16, 64, 16, 8 * SCAN_CHUNK)
    call = _prepare_scan(**arguments)._replace(keep_states=True)
    with Watch():
        found = scan_forward(call)
        scan_backward(found, call, found, scan_op.needs(*[True] * 9))
    assert 0 < largest < 16 * 64 * 16 * 8 * SCAN_CHUNK // 8


def scan_arguments(**options: Any) -> ScanCall:
    call = {name: options.pop(name) for name in ("reverse", "cu_seqlens", "delta_softplus", "channels_last") if name in options}
    a = inputs(**options)
    if "channels_last" in call:
        a |= {name: a[name].mT for name in CHANNEL_INPUTS if name in a} | {"B": a["B"].permute(0, 3, 1, 2)}
    return _prepare_scan(**a, **call)._replace(keep_states=True)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16, "B": "plain", "C": "constant", "delta_softplus": True, "optional": "D z delta_bias initial_state"},
        {"length": SCAN_CHUNK + 1, "optional": "", "reverse": True},
        {"batch": 1, "optional": "z initial_state", "sequences": 2, "cu_seqlens": torch.tensor([0, 7, 16])},
        {"length": 0, "optional": "initial_state"},
        {"optional": "D z", "C": "constant", "channels_last": True},
    ],
)
def test_opcheck_scan(options: dict[str, Any]) -> None:
    arguments = scan_arguments(**options)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.cvmk.selective_scan_forward.default, arguments, test_utils=tests)
    out, last, states = scan_op.run_forward(arguments)
    needs = [index % 3 != 1 for index in range(9)]
    backward = (torch.randn_like(out), torch.randn_like(last), None, *arguments[:10], states, *arguments[10:], needs)
    torch.library.opcheck(torch.ops.cvmk.selective_scan_backward.default, backward, test_utils=tests)


def test_opcheck_through_aot_dispatch() -> None:
    torch.library.opcheck(torch.ops.cvmk.selective_scan_forward.default, scan_arguments(optional="D z delta_bias initial_state"))


def test_compile_without_breaks_for_any_length() -> None:
    def function(a: dict[str, Tensor], cu_seqlens: Tensor | None) -> Any:
        doubled = {**a, "u": 2 * a["u"]}
        return selective_scan(**doubled, delta_softplus=True, return_last_state=True, cu_seqlens=cu_seqlens)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (9, 70):
            arguments = inputs(length=length, optional="D z delta_bias initial_state")
            found = with_gradients(lambda a: compiled(a, None), arguments)
            assert all(torch.equal(a, b) for a, b in zip(found, with_gradients(lambda a: function(a, None), arguments), strict=True))
    arguments = inputs(1, length=20, optional="z")
    cu_seqlens = torch.tensor([0, 3, 20])
    found = with_gradients(lambda a: compiled(a, cu_seqlens), arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, with_gradients(lambda a: function(a, cu_seqlens), arguments), strict=True))


def test_export_with_dynamic_batch_and_length() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = torch.nn.Parameter(-torch.ones(4, 5))

        def forward(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Any:
            return selective_scan(u, delta, self.A, B, C, delta_softplus=True, return_last_state=True)

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    moving = {0: batch, 2: length}
    arguments = inputs(3, 4, 5, 11, B="plain", C="plain", optional="")
    del arguments["A"]
    exported = torch.export.export(Module(), tuple(arguments.values()), dynamic_shapes=(moving, moving, moving, moving))
    other = inputs(5, 4, 5, 130, B="plain", C="plain", optional="")
    del other["A"]
    found, want = exported.module()(*other.values()), Module()(*other.values())
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


def test_autocast_casts_the_operands_of_products_and_keeps_the_steps() -> None:
    arguments = inputs(length=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, last = selective_scan(**arguments, delta_softplus=True, return_last_state=True)
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    lowered = {name: t.bfloat16() if name in ("u", "B", "C", "z") else t for name, t in arguments.items()}
    want, want_last = selective_scan(**lowered, delta_softplus=True, return_last_state=True)
    assert torch.equal(out, want) and torch.equal(last, want_last)


def test_explain_and_use() -> None:
    arguments = inputs()
    rows = {row.backend: row for row in explain("selective_scan", **arguments)}
    assert rows["reference"].reasons == ()
    step = step_inputs()
    assert {row.backend: row for row in explain("selective_state_update", **step)}["reference"].reasons == ()
    with use("reference"):
        selective_scan(**arguments)
    with use("cuda"), pytest.raises(NotImplementedError, match="selective_scan"):
        selective_scan(**arguments)


@pytest.mark.parametrize(
    "change,kind,message",
    [
        ({"u": torch.zeros(4, 16)}, ValueError, r"u must be \[batch, dim, length\].*\[4, 16\]"),
        ({"delta": torch.zeros(2, 4, 15)}, ValueError, r"delta must be .*\[2, 4, 16\].*\[2, 4, 15\]"),
        ({"channels_last": True}, ValueError, r"A must be \[dim, state\] with dim 16 as u has it"),
        ({"channels_last": True, "A": torch.zeros(16, 8)}, ValueError, r"D must be \[dim\], here \[16\]"),
        ({"A": torch.zeros(5, 8)}, ValueError, r"A must be \[dim, state\] with dim 4"),
        ({"A": torch.zeros(4, 8, dtype=torch.complex64)}, TypeError, "A is torch.complex64"),
        ({"B": torch.zeros(2, 3, 8, 16)}, ValueError, "B has 3 groups, which do not divide dim 4"),
        ({"B": torch.zeros(2, 0, 8, 16)}, ValueError, "B has 0 groups"),
        ({"C": torch.zeros(2, 8, 15)}, ValueError, r"C must be .*length 16, not of shape \[2, 1, 8, 15\]"),
        ({"C": torch.zeros(8, 4)}, ValueError, r"C must be \[dim, state\], here \[4, 8\]"),
        ({"D": torch.zeros(3)}, ValueError, r"D must be \[dim\], here \[4\]"),
        ({"z": torch.zeros(2, 4, 1)}, ValueError, "z must be"),
        ({"delta_bias": torch.zeros(4, 1)}, ValueError, "delta_bias must be"),
        ({"initial_state": torch.zeros(2, 8, 4)}, ValueError, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 16])}, ValueError, "batch of 1"),
        ({"cu_seqlens": torch.tensor([0.0, 16.0])}, TypeError, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, r"cu_seqlens must be \[sequences \+ 1\]"),
        ({"u": torch.zeros(2, 4, 16, device="meta")}, ValueError, "delta is on cpu"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        selective_scan(**{**inputs(), **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_sequences_that_do_not_rise_are_refused(backend: str, compiled: bool) -> None:
    """The same error from every backend on the CPU, also in a compiled graph; all of them took some division of the length before."""
    arguments = inputs(1, 4, 3, 30)
    function = torch.compile(selective_scan, backend="aot_eager") if compiled else selective_scan
    wrong = (([0, 20, 10, 30], 2, 10), ([0, 1000, 30, 30], 1, 1000), ([3, 10, 20, 30], 0, 3), ([0, 10, 20, 25], 3, 25), ([-4, 0, 9, 30], 0, -4))
    with use(backend):
        for bounds, at, value in wrong:
            for dtype in (torch.int32, torch.int64):
                with pytest.raises(ValueError, match=f"cu_seqlens must rise from 0 to 30, the length, but element {at} is {value}$"):
                    function(**arguments, cu_seqlens=torch.tensor(bounds, dtype=dtype))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ON_CPU)
def test_transforms_keep_what_the_gradient_needs(backend: str) -> None:
    """Under vmap no tensor tells that its gradient will be wanted: the states before each chunk were not kept, and read all the same."""
    a = {name: torch.stack([tensor, tensor + 0.1]) for name, tensor in inputs(1, 2, 3, 2 * SCAN_CHUNK + 5, optional="z").items()}
    names = list(a)

    def loss(*tensors: Tensor) -> Tensor:
        return selective_scan(**dict(zip(names, tensors, strict=True))).square().sum()

    with use(backend):
        leaves = [tensor.clone().requires_grad_() for tensor in a.values()]
        want = torch.autograd.grad(sum(loss(*(leaf[i] for leaf in leaves)) for i in range(2)), leaves)
        found = torch.autograd.grad(torch.vmap(loss)(*leaves).sum(), leaves)
        traced = torch.func.grad(lambda *tensors: torch.vmap(loss)(*tensors).sum(), argnums=tuple(range(len(names))))(*a.values())
        batched = torch.vmap(torch.func.grad(loss, argnums=tuple(range(len(names)))))(*a.values())
        rows = torch.autograd.functional.jacobian(lambda u: selective_scan(u, *[t[0] for t in list(a.values())[1:5]]).sum((0, 1)), a["u"][0], vectorize=True)
    for other in (found, traced, batched):
        assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(other, want, strict=True))
    assert rows.shape == (2 * SCAN_CHUNK + 5, 1, 2, 2 * SCAN_CHUNK + 5) and rows.isfinite().all() and rows.any()


# -- the single step -----------------------------------------------------------------------------------------------------------
def step_inputs(heads: int | None = None, groups: int | None = 1, batch: int = 3, dim: int = 4, state: int = 5, dtype: torch.dtype = torch.float32) -> dict:
    torch.manual_seed(0)
    rows = (dim,) if heads is None else (heads, dim)
    weights = (batch, state) if groups is None else (batch, groups, state)
    return {
        "state": torch.randn(batch, *rows, state),
        "x": torch.randn(batch, *rows, dtype=dtype),
        "dt": torch.randn(batch, *rows, dtype=dtype),
        "A": -torch.rand(*rows, state),
        "B": torch.randn(*weights, dtype=dtype),
        "C": torch.randn(*weights, dtype=dtype),
        "D": torch.randn(*rows),
        "z": torch.randn(batch, *rows, dtype=dtype),
        "dt_bias": torch.randn(*rows),
    }


@pytest.mark.parametrize("kind", ["constant", "plain", "groups 2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_scan(kind: str, dtype: torch.dtype) -> None:
    a = inputs(2, 4, 3, 20, B=kind, C=kind, optional="D z delta_bias initial_state", dtype=dtype)
    out, last = selective_scan(**a, delta_softplus=True, return_last_state=True)
    state = a["initial_state"].clone()
    for t in range(20):
        B, C = (a[name].expand(2, 4, 3) if kind == "constant" else a[name][..., t] for name in ("B", "C"))
        y = selective_state_update(state, a["u"][..., t], a["delta"][..., t], a["A"], B, C, a["D"], a["z"][..., t], a["delta_bias"], True)
        assert y.dtype == dtype
        torch.testing.assert_close(y, out[..., t], rtol=2e-6 if dtype == torch.float32 else 8e-3, atol=4e-6)
    torch.testing.assert_close(state, last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_step_with_heads_against_loops(groups: int, dtype: torch.dtype) -> None:
    a = step_inputs(heads=4, groups=groups, dtype=dtype)
    old = a["state"].double()
    state = a["state"]
    y = selective_state_update(**a, dt_softplus=True)
    exact = {name: tensor.double() for name, tensor in a.items()}
    assert y.dtype == dtype and y.shape == (3, 4, 4)
    for b in range(3):
        for h in range(4):
            for p in range(4):
                step = torch.log1p(torch.exp(exact["dt"][b, h, p] + exact["dt_bias"][h, p]))
                new = old[b, h, p] * torch.exp(step * exact["A"][h, p]) + step * exact["x"][b, h, p] * exact["B"][b, h * groups // 4]
                z = exact["z"][b, h, p]
                value = ((new * exact["C"][b, h * groups // 4]).sum() + exact["D"][h, p] * exact["x"][b, h, p]) * z * torch.sigmoid(z)
                torch.testing.assert_close(state[b, h, p].double(), new, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(y[b, h, p].double(), value, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6 if dtype == torch.float64 else 1e-3)


def test_step_writes_into_a_slice_and_tells_autograd() -> None:
    a = step_inputs(groups=None)
    cache = torch.full((2, 3, 5, 4), 7.0)
    view = cache[1].transpose(1, 2)
    view.copy_(a["state"])
    want = a["state"].clone()
    y = selective_state_update(**{**a, "state": want})
    version = cache._version
    assert torch.equal(selective_state_update(**{**a, "state": view}), y)
    assert torch.equal(view, want) and (cache[0] == 7).all() and cache._version > version


def test_half_precision_state_is_rounded_only_when_stored() -> None:
    a = step_inputs()
    rounded = a["state"].bfloat16()
    y = selective_state_update(**{**a, "state": rounded.float()})
    stored = rounded.clone()
    assert torch.equal(selective_state_update(**{**a, "state": stored}), y) and stored.dtype == torch.bfloat16
    assert selective_state_update(**step_inputs(batch=0)).shape == (0, 4)


@pytest.mark.parametrize("backend", ON_CPU)
def test_states_that_no_operation_of_pytorch_writes_to(backend: str) -> None:
    """An expanded state, windows that overlap, and an inference tensor outside of inference mode: the kernels wrote to all."""
    a = step_inputs(batch=3)
    shared = a["state"][:1].expand(3, -1, -1)
    windows = a["state"].flatten().as_strided(a["state"].shape, (2, *a["state"].stride()[1:]))
    with torch.inference_mode():
        inference = a["state"].clone()
    with use(backend):
        overlaps = "state, whose elements share memory .*clone"
        for state, message in ((shared, overlaps), (windows, overlaps), (inference, "state, an inference tensor, outside of inference mode")):
            before = state.clone()
            with pytest.raises(RuntimeError, match=f"selective_state_update writes to {message}"):
                selective_state_update(**{**a, "state": state})
            assert torch.equal(state, before)
        want = selective_state_update(**{**a, "state": a["state"].clone()})
        with torch.inference_mode():
            assert torch.equal(selective_state_update(**{**a, "state": inference}), want)
        assert torch.equal(selective_state_update(**{**a, "state": shared.clone()}), selective_state_update(**{**a, "state": shared.contiguous()}))


def test_whether_elements_share_memory() -> None:
    x = torch.zeros(60)
    for size, stride, shared in (
        ((3, 4, 5), (20, 5, 1), False),
        ((3, 4, 5), (1, 3, 12), False),
        ((2, 4, 5), (3, 5, 1), True),
        ((1, 4, 5), (0, 5, 1), False),
        ((2, 1, 5), (5, 0, 1), False),
        ((2, 4, 5), (0, 5, 1), True),
        ((2, 3), (4, 3), False),  # the rows lie between each other
        ((4, 4), (3, 3), True),
        ((0, 4), (0, 0), False),
        ((2, 2), (3, 2), False),
    ):
        assert shares_memory_with_itself(x.as_strided(size, stride)) == shared, (size, stride)


@pytest.mark.parametrize("heads", [None, 2])
def test_opcheck_step(heads: int | None) -> None:
    torch.library.opcheck(torch.ops.cvmk.selective_state_update_forward.default, _prepare_update(**step_inputs(heads, dtype=torch.bfloat16)))
    assert str(torch.ops.cvmk.selective_state_update_forward.default._schema).startswith("cvmk::selective_state_update_forward(Tensor(a!) state, ")


def test_step_compiles_and_exports() -> None:
    a = step_inputs(heads=2, groups=2)
    arguments = [a[name] for name in ("x", "dt", "A", "B", "C")]

    class Module(torch.nn.Module):
        def forward(self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return selective_state_update(state, 2 * x, dt, A, B, C, dt_softplus=True) + state.sum()

    states = [a["state"].clone() for _ in range(3)]
    want = Module()(states[0], *arguments)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(states[1], *arguments), want) and torch.equal(states[1], states[0])
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(Module(), (a["state"].clone(), *arguments), dynamic_shapes=(batch, batch, batch, None, batch, batch))
    assert torch.equal(exported.module()(states[2], *arguments), want) and torch.equal(states[2], states[0])


def test_step_refuses_gradients_and_names_wrong_arguments() -> None:
    a = step_inputs()
    a["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="x requires one"):
        selective_state_update(**a)
    with torch.no_grad():
        selective_state_update(**a)
    for change, message in (
        ({"dt": torch.zeros(3, 5)}, r"dt must be \[batch, dim\], here \[3, 4\]"),
        ({"A": torch.zeros(4, 4)}, r"A must be \[dim, state\]"),
        ({"B": torch.zeros(3, 3, 5)}, "B has 3 groups, which do not divide dim 4"),
        ({"C": torch.zeros(4, 5)}, "C must be"),
        ({"D": torch.zeros(1)}, "D must be"),
        ({"state": torch.zeros(3, 5)}, "state must be"),
    ):
        with pytest.raises(ValueError, match=message):
            selective_state_update(**{**step_inputs(), **change})
    with pytest.raises(TypeError, match="state is torch.int32"):
        selective_state_update(**{**step_inputs(), "state": torch.zeros(3, 4, 5, dtype=torch.int32)})
