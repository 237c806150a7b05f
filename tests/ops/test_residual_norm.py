"""`residual_norm` against formulas of its own in float64, with a mask that is hashed word by word; its passes on every backend of the CPU."""

from __future__ import annotations

import itertools
import math
import os
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from levels import LEVELS
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from transforms import check_transforms

from cvmk import ops
from cvmk.ops import native, residual_norm
from cvmk.ops._dropout import draw_seed
from cvmk.ops.reference._dropout import kept_rows
from cvmk.ops.residual_norm import op, prepare

BACKENDS = ["reference"] if native.library() is None else ["reference", "native"]
MIXES = ((torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16, torch.float32), (torch.float16,) * 3,
         (torch.bfloat16, torch.float32, torch.bfloat16))  # fmt: skip
"""Dtypes of x, branch, and weight and bias."""


def leaves(*lead: int, n: int = 5, dtypes: tuple[torch.dtype, ...] = (torch.float64,) * 3, seed: int = 0) -> list[Tensor]:
    """x, branch, weight and bias."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((*lead, n), (*lead, n), (n,), (n,))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(d).requires_grad_() for s, d in zip(shapes, (*dtypes, dtypes[-1]), strict=True)]


def mask(seed: Tensor, p: float, rows: int, n: int) -> Tensor:
    """Word by word, as the docstring of cvmk.ops._dropout has it."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x85EBCA6B % 2**32
        x ^= x >> 13
        x = x * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    s0, s1 = (word % 2**32 for word in seed.tolist())
    key = mix(mix(s0) ^ s1)
    hashes = [[mix(mix((mix(key) + i) % 2**32) ^ mix(key ^ mix(j))) for j in range(n)] for i in range(rows)]
    return torch.tensor([[h >= math.floor(p * 2**32) for h in row] for row in hashes]).view(rows, n)


def oracle(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, norm: str, eps: float, keep: Tensor | None = None, p: float = 0.0) -> Any:
    s = x + (branch if keep is None else branch * keep.view(branch.shape) / (1 - p))
    if norm == "layer":
        return s, F.layer_norm(s, s.shape[-1:], weight, bias, eps)
    normed = s / (s.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return s, normed if bias is None else normed + bias


def with_gradients(tensors: list[Tensor], function: Any) -> list[Tensor]:
    """The results, and the gradients of a fixed weighting of them."""
    results = function(*tensors)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in results]
    return [x.detach() for x in results] + list(torch.autograd.grad(results, tensors, weights))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("with_bias", [True, False])
def test_formulas(norm: str, p: float, with_bias: bool) -> None:
    tensors = leaves(3, 4, n=7)[: 4 if with_bias else 3]
    torch.manual_seed(3)
    got = with_gradients(tensors, lambda *t: residual_norm(*t, norm=norm, eps=1e-3, dropout_p=p))
    torch.manual_seed(3)
    keep = mask(draw_seed(torch.device("cpu")), p, 12, 7) if p else None
    want = with_gradients(tensors, lambda *t: oracle(t[0], t[1], t[2], t[3] if with_bias else None, norm, 1e-3, keep, p))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtypes", MIXES)
def test_two_baselines(level: str, norm: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Error against float64 at most 2 (results) or 3 (gradients) times that of the reference, over odd widths and numbers of rows; the mask is the same."""
    for rows, n, p in ((1, 1, 0.0), (5, 3, 0.5), (4, 16, 0.0), (33, 17, 0.1), (70, 128, 0.1), (130, 100, 0.999), (600, 8, 0.2), (9, 515, 0.1)):
        tensors = leaves(rows, n=n, dtypes=dtypes, seed=rows)

        def run(t: list[Tensor], p: float = p) -> list[Tensor]:
            torch.manual_seed(1)
            return with_gradients(t, lambda *t: residual_norm(*t, norm=norm, dropout_p=p))

        ours = run(tensors)
        with ops.use("reference"):
            theirs, exact = run(tensors), run([t.detach().double().requires_grad_() for t in tensors])
        for i, (got, plain, law) in enumerate(zip(ours, theirs, exact, strict=True)):
            assert got.dtype == plain.dtype and got.shape == plain.shape
            if n == 1 and norm == "layer" and i in (2, 3):
                continue  # 0 / sqrt(eps) of a row that is its own mean: rounding alone
            errors = [(x.double() - law).abs().max().item() for x in (got, plain)]
            floor = 4 * torch.finfo(got.dtype).eps * max(1.0, law.abs().max().item())
            assert errors[0] <= (2 if i < 2 else 3) * errors[1] + floor, (rows, n, p, i, errors)


def test_many_rows_lose_no_digits(level: str) -> None:
    """Sums over 40,000 rows whose terms do not cancel."""
    tensors = [t.detach().float().requires_grad_() for t in leaves(40000, n=3)]
    _, normed = residual_norm(*tensors)
    (dbias,) = torch.autograd.grad(normed, tensors[3:], torch.full_like(normed, 0.1))
    exact = 40000 * torch.tensor(0.1, dtype=torch.float32).double()
    assert ((dbias.double() - exact).abs() < 1e-6 * exact).all()


@pytest.mark.parametrize("dtypes", MIXES[:2])
def test_the_same_bits_for_any_number_of_threads(level: str, dtypes: tuple[torch.dtype, ...]) -> None:
    before = torch.get_num_threads()
    tensors = leaves(301, n=130, dtypes=dtypes)
    found = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found.append(with_gradients(tensors, lambda *t: residual_norm(*t, dropout_p=0.2)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_is_the_generators(backend: str) -> None:
    """With x 0 and branch 1 the sum shows it; the gradient of branch has the same; leading dimensions are counted together."""
    x, branch, weight = torch.zeros(3, 20, 33), torch.ones(3, 20, 33, requires_grad=True), torch.ones(33)
    with ops.use(backend):
        torch.manual_seed(5)
        total, normed = residual_norm(x, branch, weight, dropout_p=0.4)
        (grad,) = torch.autograd.grad(total, branch, torch.ones_like(total), retain_graph=True)
        (with_norm,) = torch.autograd.grad((total, normed), branch, (torch.ones_like(total), torch.zeros_like(total)))
        torch.manual_seed(5)
        want = kept_rows(draw_seed(x.device), 0.4, 60, 33)
    assert want is not None and torch.equal(total != 0, want.view(3, 20, 33)) and 0.55 < want.double().mean() < 0.65
    torch.testing.assert_close(total, want.view(3, 20, 33) / 0.6)
    torch.testing.assert_close(grad, total.detach())
    torch.testing.assert_close(with_norm, total.detach())


def test_rate_and_independence() -> None:
    """Rates over everything, rows and columns, and the correlation of neighbours and of another seed, within five standard deviations."""
    p, n = 0.25, 512
    keep, other = (kept_rows(torch.tensor(seed), p, n, n) for seed in ([123, -456], [124, -456]))
    assert keep is not None and other is not None
    centred, apart = ((k.double() - (1 - p)) / math.sqrt(p * (1 - p)) for k in (keep, other))
    for axes, count in (((0, 1), n * n), ((0,), n), ((1,), n)):
        assert (centred.mean(axes).abs() < 5 / math.sqrt(count)).all()
    for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred * apart):
        assert abs(product.mean()) < 5 / math.sqrt(product.numel())


def test_drawn_only_where_it_is_used() -> None:
    x, weight = torch.randn(4, 8), torch.ones(8)
    before = torch.get_rng_state()
    residual_norm(x, x, weight)
    residual_norm(x, None, weight, dropout_p=0.5)
    ops.explain("residual_norm", x, x, weight, dropout_p=0.5)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(residual_norm(x, x, weight, dropout_p=0.5)[0], residual_norm(x, x, weight, dropout_p=0.5)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_norm_alone(backend: str, norm: str) -> None:
    """The sum is x itself; the gradient is that of the sum with nothing."""
    x, _, weight, bias = leaves(3, 5, n=20, dtypes=(torch.float32,) * 3)
    with ops.use(backend):
        total, normed = residual_norm(x, None, weight, bias, norm=norm)
        assert total is x
        found = torch.autograd.grad((normed * normed.detach().cos()).sum(), (x, weight, bias))
        other = residual_norm(x, torch.zeros_like(x), weight, bias, norm=norm)[1]
        want = torch.autograd.grad((other * other.detach().cos()).sum(), (x, weight, bias))
    assert torch.equal(normed, other)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_asked_for(backend: str) -> None:
    tensors = leaves(6, n=9, dtypes=(torch.float32,) * 3)
    with ops.use(backend):

        def grads(names: tuple[int, ...], results: slice = slice(None)) -> tuple[Tensor, ...]:
            given = [t.detach().requires_grad_(i in names) for i, t in enumerate(tensors)]
            torch.manual_seed(2)
            found = residual_norm(*given, dropout_p=0.3)[results]
            return torch.autograd.grad(sum((x * x.detach().sin()).sum() for x in found), [given[i] for i in names], allow_unused=True)

        every = grads((0, 1, 2, 3))
        for names in itertools.chain.from_iterable(itertools.combinations(range(4), k) for k in (1, 2, 3)):
            assert all(torch.equal(a, every[i]) for a, i in zip(grads(names), names, strict=True)), names
        whole = [a + b for a, b in zip(grads((0, 1), slice(0, 1)), grads((0, 1), slice(1, 2)), strict=True)]
        for a, b in zip(whole, every, strict=False):
            torch.testing.assert_close(a, b)
        assert not any(x is not None and x.any() for x in grads((2, 3), slice(0, 1))[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(0,), (2, 0, 3), ()])
def test_no_rows_and_one(backend: str, lead: tuple[int, ...]) -> None:
    with ops.use(backend):
        found = with_gradients(leaves(*lead, n=6, dtypes=(torch.float32,) * 3), lambda *t: residual_norm(*t, dropout_p=0.1))
    assert [tuple(x.shape) for x in found] == [(*lead, 6)] * 4 + [(6,)] * 2
    assert lead == () or not any(x.any() for x in found[4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    """Columns out of order in memory, an expanded weight, and an expanded gradient."""
    x, branch, weight, bias = (t.detach() for t in leaves(4, 6, n=8, dtypes=(torch.float32,) * 3))
    with ops.use(backend):
        want = residual_norm(x, branch, torch.ones(8), bias)
        moved = [t.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for t in (x, branch)]
        got = residual_norm(*moved, torch.ones(1).expand(8), torch.stack([bias, weight], 1)[:, 0])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
            assert a.is_contiguous()
        grads = torch.autograd.grad(got[0].sum() + got[1].sum(), moved)
        assert all(g.shape == x.shape and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend: str) -> None:
    tensors = leaves(8, n=9, dtypes=(torch.float32,) * 3)
    with ops.use(backend):
        clean = with_gradients(tensors, residual_norm)
        with torch.no_grad():
            tensors[0][2, 3], tensors[1][5, 1] = math.nan, math.inf
        found = with_gradients(tensors, residual_norm)
    others = [0, 1, 3, 4, 6, 7]
    for a, b in zip(found[:4], clean[:4], strict=True):
        assert torch.equal(a[others], b[others])
    assert not found[1][[2, 5]].isfinite().any() and found[4].isnan().all() and torch.equal(found[5], clean[5])


def test_autocast() -> None:
    """The sum is that of x + branch, the norm is for the next product; float64 stays."""
    x, branch, weight, bias = leaves(3, n=8, dtypes=(torch.float32, torch.bfloat16, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, normed = residual_norm(x, branch, weight, bias)
        assert residual_norm(x.double(), branch, weight, bias)[1].dtype == torch.float64
    wide = residual_norm(x, branch, weight, bias)
    assert total.dtype == wide[1].dtype == torch.float32 and normed.dtype == torch.bfloat16
    assert torch.equal(total, wide[0]) and torch.equal(normed, wide[1].bfloat16())
    grads = torch.autograd.grad((total.sum(), normed.sum()), (x, branch, weight, bias))
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_derivatives_by_differences(norm: str) -> None:
    tensors = leaves(2, 2, n=3)

    def function(*t: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return residual_norm(*t, norm=norm, dropout_p=0.4)

    assert gradcheck(function, tensors) and gradgradcheck(function, tensors)
    alone = [tensors[0], *tensors[2:]]
    assert gradgradcheck(lambda x, w, b: residual_norm(x, None, w, b, norm=norm)[1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_branch_does_not_stay_in_memory(backend: str) -> None:
    """The backward pass and second derivatives hang on the sum; gradients through both are those of the formula."""
    x, _, weight, bias = leaves(6, n=9, dtypes=(torch.float32,) * 3)
    memory = np.ones((6, 9), dtype=np.float32)
    gone = weakref.ref(memory)
    with ops.use(backend):
        total, normed = residual_norm(x, torch.from_numpy(memory), weight, bias, dropout_p=0.2)
        del memory
        assert gone() is None
        torch.autograd.backward((total, normed), (torch.ones_like(total), torch.ones_like(normed)))
    given = [t.detach().requires_grad_() for t in leaves(3, n=4)]
    seconds = []
    for function in (lambda *t: residual_norm(*t, eps=1e-3), lambda *t: oracle(*t, "layer", 1e-3)):
        x, branch, *rest = given
        results = function(x.sin(), branch.cos(), *rest)  # what asks for the derivatives is no leaf
        first = torch.autograd.grad(sum(r.square().sum() for r in results), given, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        seconds.append([t.grad.clone() for t in given])
        for t in given:
            t.grad = None
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms() -> None:
    def function(*t: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(*t, norm="rms")

    check_transforms(function, [t.detach() for t in leaves(4, n=3)])


@pytest.mark.parametrize("branch", [True, False])
def test_opcheck(branch: bool) -> None:
    x, b, weight, bias = leaves(4, n=6, dtypes=(torch.float32, torch.bfloat16, torch.float32))
    call = prepare(x, b if branch else None, weight, bias, dropout_p=0.2)._replace(dropout_seed=torch.tensor([1, 2]), keep_stats=True)
    torch.library.opcheck(torch.ops.cvmk.residual_norm_forward.default, call)
    total, normed, stats = op.run_forward(call)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for needs in ([True] * 4, [True, branch, False, False], [False, False, True, False]):
        grads = (torch.randn_like(total) if branch else None, torch.randn_like(normed), None)
        backward = (*grads, *call[:5], total, stats, *call[5:], needs)
        torch.library.opcheck(torch.ops.cvmk.residual_norm_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_that_nobody_asked_for_share_no_storage(backend: str, dtype: torch.dtype) -> None:
    """torch.compile warns of a custom op whose results do, and will refuse it."""
    x = torch.randn(2, 6, dtype=dtype)
    with torch.no_grad(), ops.use(backend):
        results = op.run_forward(prepare(x, None, torch.ones(6), torch.zeros(6)))
    storages = [x.untyped_storage(), *(result.untyped_storage() for result in results)]
    assert len({storage._cdata for storage in storages}) == len(storages)


def test_compile_and_export() -> None:
    def function(*t: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(2 * t[0], *t[1:], dropout_p=0.25)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 40):
            tensors = leaves(3, rows, n=7, dtypes=(torch.float32,) * 3)
            torch.manual_seed(4)
            got = with_gradients(tensors, compiled)
            torch.manual_seed(4)
            assert all(torch.equal(a, b) for a, b in zip(got, with_gradients(tensors, function), strict=True))

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Any:
            return residual_norm(x, branch, weight, bias, norm="rms")

    given = tuple(t.detach() for t in leaves(3, n=7, dtypes=(torch.float32,) * 3))
    rows = {0: torch.export.Dim("rows")}
    exported = torch.export.export(Module(), given, dynamic_shapes=(rows, rows, None, None))
    other = [t.detach() for t in leaves(11, n=7, dtypes=(torch.float32,) * 3)]
    assert all(torch.equal(a, b) for a, b in zip(exported.module()(*other), Module()(*other), strict=True))


@pytest.mark.parametrize(
    "change,kind,message",
    [
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "x must be float64, float32, bfloat16 or float16, not torch.int64"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"x must be \[..., n\] with n of at least 1, not of shape \[3, 0\]"),
        ({"branch": torch.zeros(4, 8)}, ValueError, r"branch must be of shape \[3, 8\] as x \[3, 8\] is, not \[4, 8\]"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight must be of shape \[8\]"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta, and x on cpu"),
        ({"norm": "batch"}, ValueError, "norm must be one of layer, rms, not 'batch'"),
        ({"eps": -1.0}, ValueError, "eps must be 0 or more"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), not 1.0"),
        ({"dropout_p": torch.tensor(0.5, requires_grad=True)}, TypeError, "dropout_p is a tensor that asks for a gradient"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(3, 8), "branch": torch.zeros(3, 8), "weight": torch.ones(8)}
    with pytest.raises(kind, match=message):
        residual_norm(**{**arguments, **change})


@pytest.mark.skipif(not LEVELS or os.environ.get("CVMK_BACKEND") is not None, reason="asks for the choice between all backends")
def test_choice() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, weight = torch.randn(2, 4, dtype=dtype), torch.ones(4)
        rows = {row.backend: row for row in ops.explain("residual_norm", x, x, weight)}
        assert rows["native"].chosen == (dtype != torch.float64)
    rows = {row.backend: row for row in ops.explain("residual_norm", x.float(), x, weight)}
    assert not rows["native"].chosen and "branch is float64" in rows["native"].reasons[0]
