"""`embed` against formulas of its own in float64; its gradient's order, and what ids may be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from transforms import check_transforms

from cvmk import ops
from cvmk.ops import embed, native
from cvmk.ops._dropout import draw_seed
from cvmk.ops.embed import op, prepare
from cvmk.ops.reference._dropout import kept_rows

BACKENDS = ["reference"] if native.library() is None else ["reference", "native"]


def inputs(*shape: int, n: int = 5, vocabulary: int = 11, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids, weight, positions [T, n]. Most ids are 0, as padding is."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, shape, generator=g) * torch.randint(3, shape, generator=g).clamp(max=1)
    weight, positions = (torch.randn(rows, n, generator=g, dtype=torch.float64).to(dtype) for rows in (vocabulary, shape[-1] if shape else 1))
    return ids, weight.requires_grad_(), positions


def oracle(ids: Tensor, weight: Tensor, positions: Tensor | None, scale: float, keep: Tensor | None = None, p: float = 0.0) -> Tensor:
    one_hot = F.one_hot(ids.long(), weight.shape[0]).to(weight.dtype)
    x = one_hot @ weight * scale
    x = x if positions is None else x + positions
    return x if keep is None else x * keep.view(x.shape) / (1 - p)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("positions", ["none", "table", "rows", "one"])
def test_formula(p: float, positions: str) -> None:
    ids, weight, table = inputs(3, 4)
    added = {"none": None, "table": table, "rows": torch.randn(3, 4, 5, dtype=torch.float64), "one": table[0]}[positions]
    torch.manual_seed(1)
    got = embed(ids, weight, added, scale=1.7, dropout_p=p)
    torch.manual_seed(1)
    want = oracle(ids, weight, added, 1.7, kept_rows(draw_seed(ids.device), p, 12, 5) if p else None, p)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), weight) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_baselines(level: str, dtype: torch.dtype) -> None:
    for shape, n, vocabulary, p in (((1,), 1, 1, 0.0), ((7,), 3, 500, 0.5), ((40, 17), 128, 300, 0.1), ((9, 30), 33, 5, 0.1), ((), 16, 4, 0.0)):
        ids, weight, positions = inputs(*shape, n=n, vocabulary=vocabulary, dtype=dtype)
        if not shape:
            positions = positions[0]

        def run(weight: Tensor, ids: Tensor = ids, positions: Tensor = positions, p: float = p) -> tuple[Tensor, Tensor]:
            leaf = weight.detach().requires_grad_()
            torch.manual_seed(2)
            out = embed(ids.int(), leaf, positions.float(), scale=n**0.5, dropout_p=p)  # noqa: B023 - called at once
            g = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
            return out.detach(), *torch.autograd.grad(out, leaf, g)

        ours = run(weight)
        with ops.use("reference"):
            theirs, exact = run(weight), run(weight.double())
        for i, (got, plain, law) in enumerate(zip(ours, theirs, exact, strict=True)):
            assert got.dtype == plain.dtype and got.shape == plain.shape
            errors = [(x.double() - law).abs().max().item() for x in (got, plain)]
            floor = 4 * torch.finfo(dtype).eps * max(1.0, law.abs().max().item())
            assert errors[0] <= (2 + i) * errors[1] + floor, (shape, n, i, errors)


def test_the_same_bits_for_any_number_of_threads(level: str) -> None:
    before = torch.get_num_threads()
    ids, weight, positions = inputs(60, 17, n=70, vocabulary=900, dtype=torch.float32)
    found = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            out = embed(ids, weight, positions, scale=3.0, dropout_p=0.2)
            found.append((out, *torch.autograd.grad(out, weight, out.detach().cos())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_frequent_id_loses_no_digits(level: str) -> None:
    weight = torch.randn(3, 2).requires_grad_()
    out = embed(torch.ones(50000, dtype=torch.int64), weight)
    (gradient,) = torch.autograd.grad(out, weight, torch.full_like(out, 0.1))
    exact = 50000 * torch.tensor(0.1, dtype=torch.float32).double()
    assert ((gradient[1].double() - exact).abs() < 2e-6 * exact).all() and not gradient[[0, 2]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_adds_onto_the_output_matrix(backend: str) -> None:
    """A tied matrix gets both gradients; twice without zeroing, twice as much."""
    ids, weight, positions = inputs(4, 6, dtype=torch.float32)

    def loss(lookup: Any) -> Tensor:
        hidden = lookup(ids, weight, positions, scale=2.0).tanh()
        return (hidden @ weight.T).logsumexp(-1).sum()

    with ops.use(backend):
        loss(embed).backward()
        once = weight.grad.clone()
        loss(embed).backward()
    (want,) = torch.autograd.grad(loss(oracle), weight)
    torch.testing.assert_close(once, want)
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_no_ids(backend: str, shape: tuple[int, ...]) -> None:
    ids, weight, positions = inputs(*shape, dtype=torch.float32)
    with ops.use(backend):
        out = embed(ids, weight, positions, dropout_p=0.1)
        assert out.shape == (*shape, 5) and not torch.autograd.grad(out.sum(), weight)[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [11, -1, 2**40])
def test_ids_without_a_row_are_named(backend: str, wrong: int) -> None:
    ids, weight, positions = inputs(2, 3, dtype=torch.float32)
    ids[1, 0] = wrong
    with ops.use(backend), pytest.raises(IndexError, match=rf"ids holds {wrong} at place 3, and weight has the rows 0 to 10"):
        embed(ids, weight, positions)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    ids, weight, positions = inputs(4, 6, dtype=torch.float32)
    with ops.use(backend):
        want = embed(ids, weight, positions)
        apart = weight.detach().t().contiguous().t().requires_grad_()
        got = embed(ids.t().contiguous().t(), apart, positions.t().contiguous().t())
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(x.sum(), w)[0] for x, w in ((got, apart), (want, weight))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_rows(backend: str) -> None:
    ids, weight, _ = inputs(30, dtype=torch.float32)
    with torch.no_grad():
        weight[3, 2] = math.nan
    grad, other = torch.ones(30, 5), int(ids[ids != 3].max())
    grad[ids == other, 1] = math.inf
    with ops.use(backend):
        out = embed(ids, weight)
        (gradient,) = torch.autograd.grad(out, weight, grad)
    assert torch.equal(out.isnan().any(-1), ids == 3)
    assert torch.equal(gradient.isinf().nonzero(), torch.tensor([[other, 1]]))


def test_positions_are_constant_and_autocast_changes_nothing() -> None:
    ids, weight, positions = inputs(3, 4, dtype=torch.float32)
    with pytest.raises(TypeError, match="positions ask for a gradient"):
        embed(ids, weight, positions.requires_grad_())
    with torch.no_grad():
        embed(ids, weight, positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embed(ids, weight), embed(ids, weight).float())


def test_derivatives_and_transforms() -> None:
    ids, weight, positions = inputs(2, 3, n=2, vocabulary=4)

    def function(w: Tensor) -> Tensor:
        torch.manual_seed(0)
        return embed(ids, w, positions, scale=1.3, dropout_p=0.4)

    assert gradcheck(function, weight) and gradgradcheck(function, weight)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms() -> None:
    ids, weight, positions = inputs(2, 3, n=2, vocabulary=4)
    check_transforms(lambda w: embed(ids, w, positions, scale=1.3), [weight.detach()])


def test_opcheck() -> None:
    ids, weight, positions = inputs(2, 3, dtype=torch.float32)
    call = prepare(ids, weight, positions, scale=2.0, dropout_p=0.2)._replace(dropout_seed=torch.tensor([1, 2]))
    torch.library.opcheck(torch.ops.cvmk.embed_forward.default, call)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for needs in (True, False):
        torch.library.opcheck(torch.ops.cvmk.embed_backward.default, (torch.randn(2, 3, 5), *call, [needs]), test_utils=tests)
    assert op.principal == "weight"


def test_compile_and_export() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(inputs(1, dtype=torch.float32)[1].detach())

        def forward(self, ids: Tensor, positions: Tensor, p: float = 0.3) -> Tensor:
            return embed(ids, self.weight, positions, scale=2.0, dropout_p=p)

    module = Module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 9):
        ids, _, positions = inputs(rows, 6, dtype=torch.float32)
        results = []
        for function in (compiled, module):
            torch.manual_seed(3)
            out = function(ids, positions)
            results.append((out, *torch.autograd.grad(out.sin().sum(), module.weight)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    exported = torch.export.export(module, (ids, positions, 0.0), dynamic_shapes=({0: torch.export.Dim("rows")}, None, None))
    assert torch.equal(exported.module()(ids[:3], positions, 0.0), module(ids[:3], positions, 0.0))


@pytest.mark.parametrize(
    "change,kind,message",
    [
        ({"ids": torch.zeros(2, 3)}, TypeError, "ids must be int32 or int64, not torch.float32"),
        ({"weight": torch.zeros(4, dtype=torch.float32)}, ValueError, r"weight must be \[V, n\] with n of at least 1, not of shape \[4\]"),
        ({"weight": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "weight must be float64"),
        ({"weight": torch.zeros(4, 5, device="meta")}, ValueError, "ids are on cpu, and weight on meta"),
        ({"positions": torch.zeros(2, 5)}, ValueError, r"positions must be \[..., 5\] .*of ids \[2, 3\] before it, not of shape \[2, 5\]"),
        ({"positions": torch.zeros(3, 4)}, ValueError, "positions must be"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"ids": torch.zeros(2, 3, dtype=torch.int64), "weight": torch.zeros(4, 5)}
    with pytest.raises(kind, match=message):
        embed(**{**arguments, **change})
