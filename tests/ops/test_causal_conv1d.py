"""`causal_conv1d` and its step against a loop in float64, on every backend of the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from transforms import check_transforms

from cvmk import ops
from cvmk.ops import causal_conv1d, causal_conv1d_update
from cvmk.ops.causal_conv1d import ConvOut, _prepare, _prepare_update, conv_op

NAN = float("nan")
WIDTHS = (1, 2, 3, 4, 7)


def inputs(
    batch: int = 2, dim: int = 3, length: int = 6, width: int = 4, optional: str = "bias initial_state lengths", dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(width + 10 * length)
    shapes = {"x": (batch, dim, length), "weight": (dim, width), "bias": (dim,), "initial_state": (batch, dim, width - 1)}
    made: dict[str, Any] = {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items() if name in ("x", "weight", *optional.split())
    }
    if "lengths" in optional.split():
        made["lengths"] = torch.randint(length + 1, (batch,), generator=g)
    return made


def by_hand(a: dict[str, Any], silu: bool) -> tuple[Tensor, Tensor]:
    """One number after the other, of each row's real inputs alone."""
    x, weight = a["x"], a["weight"]
    (batch, dim, length), width = x.shape, weight.shape[1]
    outs, states = [], []
    for b in range(batch):
        end = int(a["lengths"][b]) if "lengths" in a else length
        for d in range(dim):
            before = [*a["initial_state"][b, d].unbind()] if "initial_state" in a else [x.new_zeros(())] * (width - 1)
            p, row = [*before, *x[b, d, :end].unbind()], []
            for t in range(end):
                pre = sum((weight[d, k] * p[t + k] for k in range(width)), a["bias"][d] if "bias" in a else x.new_zeros(()))
                row.append(pre / (1 + (-pre).exp()) if silu else pre)
            outs.append(torch.stack([*row, *[x.new_zeros(())] * (length - end)]) if length else x.new_zeros(0))
            states.append(torch.stack(p[end : end + width - 1]) if width > 1 else x.new_zeros(0))
    return torch.stack(outs).view(x.shape), torch.stack(states).view(batch, dim, width - 1)


def both(a: dict[str, Any], silu: bool) -> tuple[Tensor, Tensor]:
    return causal_conv1d(**a, activation="silu" if silu else None, return_last_state=True)  # type: ignore[return-value]


def gradients(results: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    weights = [torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype) for x in results]
    reached = [(x, weight) for x, weight in zip(results, weights, strict=True) if x.requires_grad]  # not a loop that never ran
    if not reached:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad([x for x, _ in reached], leaves, [weight for _, weight in reached], allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("optional", ["", "bias", "initial_state", "lengths", "bias initial_state lengths"])
@pytest.mark.parametrize("width", WIDTHS)
def test_formulas(width: int, optional: str, silu: bool) -> None:
    for length in (1, 2, 6):
        a = inputs(width=width, length=length, optional=optional)
        leaves = [tensor.requires_grad_() for name, tensor in a.items() if name != "lengths"]
        found, want = both(a, silu), by_hand(a, silu)
        for got, expected in zip((*found, *gradients(found, leaves)), (*want, *gradients(want, leaves)), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("silu", [False, True])
def test_gradcheck_twice(silu: bool) -> None:
    a = inputs(length=4, width=3)
    lengths = a.pop("lengths")
    leaves = [tensor.requires_grad_() for tensor in a.values()]
    call = lambda *t: both(dict(zip(a, t, strict=True), lengths=lengths), silu)  # noqa: E731
    assert gradcheck(call, leaves) and gradgradcheck(call, leaves)


def test_steps_and_pieces_are_the_whole() -> None:
    """The last state of right-padded pieces goes on, and one step after the other from zeros is the same."""
    a = inputs(batch=3, length=9, optional="bias")
    whole, last = both(a, True)
    pieces, state, at = torch.zeros_like(whole), None, torch.zeros(3, dtype=torch.long)
    for lengths in ([2, 0, 5], [0, 3, 1], [7, 6, 3]):
        piece = torch.full((3, 3, 8), NAN, dtype=torch.float64)
        for row, n in enumerate(lengths):
            piece[row, :, :n] = a["x"][row, :, at[row] : at[row] + n]
        out, state = both({**a, "x": piece, "lengths": torch.tensor(lengths), **({} if state is None else {"initial_state": state})}, True)
        for row, n in enumerate(lengths):
            pieces[row, :, at[row] : at[row] + n] = out[row, :, :n]
            assert not out[row, :, n:].any()
        at = at + torch.tensor(lengths)
    torch.testing.assert_close(pieces, whole, atol=1e-13, rtol=0)
    torch.testing.assert_close(state, last, atol=0, rtol=0)
    stepped = torch.zeros(3, 3, 3, dtype=torch.float64)
    steps = [causal_conv1d_update(stepped, a["x"][..., t], a["weight"], a["bias"], activation="silu") for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, -1), whole, atol=1e-13, rtol=0)
    assert torch.equal(stepped, last)


def test_padding_reaches_nothing() -> None:
    """Not even NaN, in neither pass; lengths beyond the ends are the ends."""
    a = inputs(batch=3, length=5)
    a["lengths"] = torch.tensor([9, -2, 3], dtype=torch.int32)
    clean = {**a, "x": a["x"].masked_fill(torch.arange(5) >= a["lengths"][:, None, None], 0)}
    spoiled = {**a, "x": clean["x"].masked_fill(torch.arange(5) >= a["lengths"][:, None, None], NAN)}
    results = []
    for case in (clean, spoiled):
        leaves = [tensor.detach().requires_grad_() for name, tensor in case.items() if name != "lengths"]
        found = both({**dict(zip((n for n in case if n != "lengths"), leaves, strict=True)), "lengths": case["lengths"]}, True)
        results.append([*found, *gradients(found, leaves)])
    assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(*results, strict=True))
    x_grad = results[0][2]
    assert not x_grad[1].any() and not x_grad[2, :, 3:].any() and x_grad[0].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    """Results in x's dtype, near those of float64, whatever the order of x in memory; mixed dtypes too."""
    a = inputs(3, 17, 21, dtype=dtype)
    exact = both({name: tensor if name == "lengths" else tensor.double() for name, tensor in a.items()}, True)
    for order, weights in itertools.product((False, True), (torch.float32, dtype)):
        case = {**a, "weight": a["weight"].to(weights), "bias": a["bias"].to(weights)}
        if order:
            case["x"] = a["x"].mT.contiguous().mT
        out, last = both(case, True)
        assert out.dtype == last.dtype == dtype and out.shape == a["x"].shape
        close = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), exact[0], atol=close, rtol=close)
        assert torch.equal(last.double(), exact[1])


def turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [batch, dim, length] with the real inputs of each row in reverse order, 0 behind them."""
    ends = [x.shape[2]] * x.shape[0] if lengths is None else lengths.tolist()
    return torch.stack([torch.cat((row[:, :end].flip(1), 0 * row[:, end:]), dim=1) for row, end in zip(x, ends, strict=True)])


@pytest.mark.parametrize("optional", ["", "bias initial_state lengths"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_channels_last_and_from_the_end(dtype: torch.dtype, optional: str) -> None:
    """The results and gradients of time last and forwards, in their order, from rows that are parts of wider ones."""
    for dim, width, silu in ((3, 2, False), (17, 4, True), (32, 5, True)):
        a = inputs(3, dim, 9, width, optional, dtype)
        a["x"] = turned(turned(a["x"], a.get("lengths")), a.get("lengths"))
        names = [name for name in a if name != "lengths"]
        for reverse, last in itertools.product((False, True), (False, True)):

            def order(x: Tensor, reverse: bool = reverse, last: bool = last, a: dict[str, Any] = a) -> Tensor:
                x = turned(x, a.get("lengths")) if reverse else x
                return x.mT if last else x

            plain = {name: tensor.detach().double().requires_grad_(name != "lengths") if name != "lengths" else tensor for name, tensor in a.items()}
            out, state = both(plain, silu)
            want = [order(out), state, *gradients((order(out), state), [plain[name] for name in names])]
            other = {name: (order(tensor) if name == "x" else tensor).detach() for name, tensor in a.items()}
            if last:
                other["x"] = torch.cat((other["x"], other["x"]), dim=2)[..., :dim]
            leaves = [other[name].requires_grad_() for name in names]
            found = causal_conv1d(**other, activation="silu" if silu else None, return_last_state=True, channels_last=last, reverse=reverse)
            got = [*found, *gradients(tuple(found), leaves)]
            assert all(tensor.is_contiguous() for tensor in found) and found[0].shape == other["x"].shape
            want[2] = order(want[2])
            for name, one, exact in zip(("out", "state", *names), got, want, strict=True):
                error = (one.double() - exact).abs().max().item()
                assert error <= 24 * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item()), (name, reverse, last, error)


def test_empty() -> None:
    for batch, dim, length in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        a = inputs(batch, dim, length)
        leaves = [tensor.requires_grad_() for name, tensor in a.items() if name != "lengths"]
        found = both(a, True)
        assert found[0].shape == (batch, dim, length) and found[1].shape == (batch, dim, 3)
        assert [g.shape for g in gradients(found, leaves)] == [leaf.shape for leaf in leaves]
    state = inputs(2, 3, 0)["initial_state"]
    assert torch.equal(both({**inputs(2, 3, 0), "initial_state": state}, True)[1], state)


def test_the_same_bits_every_time_and_for_any_number_of_threads() -> None:
    a = {name: tensor.requires_grad_(name != "lengths") for name, tensor in inputs(5, 40, 70, dtype=torch.float32).items()}
    leaves, before, found = [tensor for name, tensor in a.items() if name != "lengths"], torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results = both(a, True)
            turned_around = causal_conv1d(a["x"].mT, a["weight"], a["bias"], lengths=a["lengths"], activation="silu", channels_last=True, reverse=True)
            assert isinstance(turned_around, Tensor)
            found.append([*results, *gradients(results, leaves), turned_around, *gradients((turned_around,), leaves[:3])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_opcheck() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for optional in ("", "bias initial_state lengths"):
        a = inputs(optional=optional, dtype=torch.float32)
        call = _prepare(**{**a, "x": a["x"].mT}, activation="silu", channels_last=True, reverse=True) if optional else _prepare(**a, activation="silu")
        torch.library.opcheck(torch.ops.cvmk.causal_conv1d_forward.default, call, test_utils=tests)
        out, last = conv_op.run_forward(call)
        grads = ConvOut(torch.randn_like(out), torch.randn_like(last))
        torch.library.opcheck(torch.ops.cvmk.causal_conv1d_backward.default, (*grads, *call, [True, False, True, False]), test_utils=tests)
    a = inputs(dtype=torch.float32)
    torch.library.opcheck(torch.ops.cvmk.causal_conv1d_update_forward.default, _prepare_update(a["initial_state"], a["x"][..., 0], a["weight"], a["bias"]))


def test_transforms() -> None:
    a = inputs(length=4)
    lengths = a.pop("lengths")
    check_transforms(lambda *t: both(dict(zip(a, t, strict=True), lengths=lengths), True), [*a.values()])


def test_compiles_and_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, lengths: Tensor) -> Any:
            return causal_conv1d(x, weight, bias, activation="silu", initial_state=initial_state, lengths=lengths, return_last_state=True)

    a, other = inputs(dtype=torch.float32), inputs(4, 3, 9, dtype=torch.float32)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager", dynamic=True)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 2: length}, None, None, {0: batch}, {0: batch})
    exported = torch.export.export(Module(), tuple(a.values()), dynamic_shapes=shapes).module()
    for case in (a, other):
        for found in (compiled, exported):
            for got, want in zip(found(*case.values()), Module()(*case.values()), strict=True):
                torch.testing.assert_close(got, want)


def test_autocast() -> None:
    a = inputs(dtype=torch.float32, optional="bias")
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_conv1d(**a)
    assert isinstance(out, Tensor) and out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), causal_conv1d(**a), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must be \[batch, dim, length\], not of shape \[2, 3\]"),
        ({"x": torch.zeros(2, 3), "channels_last": True}, ValueError, r"x must be \[batch, length, dim\], not of shape \[2, 3\]"),
        ({"channels_last": True}, ValueError, r"weight must be \[dim, width\] with dim 6"),
        ({"weight": torch.zeros(4, 4)}, ValueError, r"weight must be \[dim, width\] with dim 3"),
        ({"weight": torch.zeros(3, 0)}, ValueError, "width of at least 1"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[dim\], here \[3\]"),
        ({"bias": torch.zeros(3, dtype=torch.int32)}, TypeError, "bias is torch.int32"),
        ({"initial_state": torch.zeros(2, 3, 4)}, ValueError, r"initial_state must be \[batch, dim, width - 1\], here \[2, 3, 3\]"),
        ({"lengths": torch.zeros(3, dtype=torch.long)}, ValueError, r"lengths must be \[batch\], here \[2\]"),
        ({"lengths": torch.zeros(2)}, TypeError, "lengths must be int32 or int64"),
        ({"activation": "relu"}, ValueError, "activation must be None or 'silu', not 'relu'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        causal_conv1d(**{**inputs(dtype=torch.float32), **change})


def test_a_step_has_no_gradient() -> None:
    a = inputs(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="causal_conv1d_update has no gradient, but weight requires one"):
        causal_conv1d_update(a["initial_state"], a["x"][..., 0], a["weight"].requires_grad_())
    with pytest.raises(ValueError, match=r"state must be \[batch, dim, width - 1\], here \[2, 3, 3\]"):
        causal_conv1d_update(torch.zeros(2, 3, 2), a["x"][..., 0], a["weight"].detach())
    assert ops.explain("causal_conv1d", a["x"], a["weight"].detach())[-1].reasons == ()
