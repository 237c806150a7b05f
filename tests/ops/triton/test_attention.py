"""flash_attention in Triton against the float64 reference and beside the reference of the same dtype: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import attention_cases
import pytest
import torch
from torch import Tensor, tensor

from cvmk import ops
from cvmk.ops.triton import _tuning, attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")

CASES: dict[str, dict[str, Any]] = {  # sizes, the shape of the bias, and options
    "plain": {"q": (2, 2, 23, 16), "k": (2, 2, 70, 16)},
    "causal, groups": {"q": (1, 4, 18, 20), "k": (1, 1, 70, 20), "dv": 12, "causal": True},
    "causal, fewer keys": {"q": (1, 1, 70, 16), "k": (1, 1, 40, 16), "causal": True},
    "lengths": {"q": (3, 2, 9, 16), "k": (3, 1, 70, 16), "key_lengths": tensor([70, 0, 7])},
    "window": {"q": (1, 1, 70, 16), "k": (1, 1, 100, 16), "window": (60, 10)},
    "cache": {"q": (2, 2, 10, 16), "k": (2, 1, 90, 16), "causal": True, "query_start": tensor([70, 2]), "key_lengths": tensor([80, 7], dtype=torch.int32)},
    "whole bias": {"q": (1, 2, 20, 16), "k": (1, 1, 70, 16), "bias": (1, 2, 20, 70), "window": (25, 20)},
    "bias of heads": {"q": (2, 2, 20, 16), "k": (2, 1, 70, 16), "bias": (1, 2, 20, 70), "causal": True},
    "bias of keys, soft cap": {"q": (2, 2, 20, 16), "k": (2, 1, 70, 16), "bias": (2, 1, 1, 70), "softcap": 3.0},
    "bias of rows": {"q": (2, 2, 20, 16), "k": (2, 1, 40, 16), "bias": (2, 1, 20, 1)},
    "dropout": {"q": (2, 2, 20, 16), "k": (2, 2, 70, 16), "dropout_p": 0.6},
    "everything": {
        "q": (2, 2, 20, 24), "k": (2, 1, 90, 24), "dropout_p": 0.3, "softcap": 2.0, "bias": (20, 90), "causal": True, "window": (40, -1),
        "key_lengths": tensor([60, 90]), "query_start": tensor([46, 70]),
    },
    "packed": {"q": (75, 4, 16), "k": (70, 2, 16), "causal": True, "cu_seqlens_q": tensor([0, 25, 25, 73]), "cu_seqlens_k": tensor([5, 20, 30, 70])},
    "packed, bias": {"q": (50, 2, 16), "k": (70, 2, 16), "bias": (2, 1, 70), "cu_seqlens_q": tensor([0, 20, 50]), "cu_seqlens_k": tensor([0, 30, 70])},
    "one query": {"q": (2, 4, 1, 16), "k": (2, 2, 150, 16), "key_lengths": tensor([150, 70]), "causal": True},
    "few queries, all options": {
        "q": (1, 2, 3, 16), "k": (1, 1, 150, 16), "bias": (1, 2, 3, 150), "softcap": 2.0, "dropout_p": 0.3, "causal": True, "window": (100, -1),
    },
    "short": {"q": (2, 2, 20, 16), "k": (2, 2, 30, 16), "key_lengths": tensor([30, 11])},
    "short, groups, all options": {
        "q": (2, 4, 7, 16), "k": (2, 2, 30, 16), "bias": (4, 1, 30), "softcap": 2.0, "dropout_p": 0.3, "causal": True, "window": (12, -1),
    },
    "widest": {"q": (1, 1, 40, 256), "k": (1, 1, 70, 256), "causal": True},
    "negative scale": {"q": (1, 1, 30, 24), "k": (1, 1, 30, 24), "dv": 1, "scale": -0.3},
    "no keys": {"q": (2, 2, 4, 8), "k": (2, 1, 0, 8)},
    "no rows": {"q": (2, 2, 0, 8), "k": (2, 1, 5, 8)},
    "no batch": {"q": (0, 2, 3, 8), "k": (0, 1, 5, 8)},
}  # fmt: skip


@contextlib.contextmanager
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 16 rows and 32 keys, chunks of 64 keys: small tensors have blocks without a mask and several of each sort."""
    monkeypatch.setattr(attention, "CHUNK", 64)
    config = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    with contextlib.ExitStack() as stack:
        for dtype, d, kind in itertools.product(DTYPES, (16, 32, 256), ("long", "extra", "pieces", "bias", "few")):
            for kernel in ("attention_forward", "attention_query_gradient", "attention_key_gradient", "attention_bias_gradient"):
                stack.enter_context(_tuning.overriding(kernel, f"{str(dtype)[6:]} d{d} {kind}", config))
        yield


def make(case: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v, and the bias (float32) where there is one; and the options."""
    options: dict[str, Any] = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in case.items()}
    g = torch.Generator().manual_seed(0)
    q, k = options.pop("q"), options.pop("k")
    shapes = [q, k, (*k[:-1], options.pop("dv", k[-1]))]
    leaves = [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]
    if "bias" in options:
        leaves.append(torch.randn(options.pop("bias"), generator=g).to(DEVICE))
    return leaves, options


def poisoned(*arguments: Any, **options: Any) -> Tensor:
    """torch.empty with NaN in it."""
    fresh = torch.zeros(*arguments, **options)
    return fresh.fill_(NAN) if fresh.is_floating_point() else fresh


def run(backend: str, leaves: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """out, lse and the gradients of a fixed weighting of both; what a kernel does not write is NaN."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    torch.manual_seed(1)
    with ops.use(backend), pytest.MonkeyPatch.context() as patch:
        if backend == "triton":
            patch.setattr(torch, "empty", poisoned)
        out, lse = ops.flash_attention(*leaves[:3], bias=leaves[3] if len(leaves) > 3 else None, return_lse=True, **options)
        g = torch.Generator().manual_seed(2)
        weights = torch.randn(out.shape, generator=g).to(DEVICE, leaves[0].dtype), torch.randn(lse.shape, generator=g).to(DEVICE)
        finite = lse.masked_fill(lse == -INF, 0)
        loss = (out * weights[0]).sum(dtype=torch.float64) + (finite * weights[1]).sum()
        return [out.detach(), finite.detach(), *torch.autograd.grad(loss, leaves)]


def assert_two_baselines(leaves: list[Tensor], options: dict[str, Any]) -> None:
    """Largest and root-mean-square error: at most twice (results) or thrice (gradients) the reference's of the same dtype, or a few ulp."""
    exact = run("reference", [leaf.double() for leaf in leaves], options)
    theirs, ours = run("reference", leaves, options), run("triton", leaves, options)
    for name, want, reference, got in zip(("out", "lse", "dq", "dk", "dv", "dbias"), exact, theirs, ours, strict=False):
        assert got.shape == reference.shape and got.dtype == reference.dtype and got.is_contiguous(), name
        if got.numel() == 0:
            continue
        allowed, floor = 2 if name in ("out", "lse") else 3, 2 * torch.finfo(got.dtype).eps * max(1e-2, want.abs().max().item())
        errors = [(x.double() - want).abs() for x in (reference, got)]
        for measure in (lambda e: e.max(), lambda e: e.square().mean().sqrt()):
            assert measure(errors[1]) <= allowed * measure(errors[0]) + floor, f"{name}: {measure(errors[1])} beside {measure(errors[0])}"


MASKS = [name for name, case in CASES.items() if not {"bias", "softcap"} & case.keys()]


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, name) for name in CASES] + [(torch.bfloat16, name) for name in [*MASKS, "everything"]])
def test_two_baselines(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str) -> None:
    with small_blocks(monkeypatch):
        assert_two_baselines(*make(CASES[name], dtype))


def test_scale_of_zero() -> None:
    """All scores equal: the mean of what a row sees."""
    q, k, v = (torch.randn(1, 1, n, 16, device=DEVICE) for n in (18, 70, 70))
    out = run("triton", [q, k, v], {"scale": 0.0})[0]
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "packed", "short", "one query"] if DEVICE == "cpu" else CASES)
def test_own_block_sizes(name: str) -> None:
    for dtype in [torch.float16] if DEVICE == "cpu" else DTYPES:
        assert_two_baselines(*make(CASES[name], dtype))


@pytest.mark.skipif(DEVICE == "cpu", reason="too slow for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [32, 64, 128, 256])
def test_long(dtype: torch.dtype, d: int) -> None:
    for options in ({}, {"causal": True}, {"key_lengths": tensor([700, 333])}, {"causal": True, "window": (200, 0), "dropout_p": 0.1}):
        assert_two_baselines(*make({"q": (2, 4, 513, d), "k": (2, 2, 700, d), **options}, dtype))


def test_odd_sizes() -> None:
    g = torch.Generator().manual_seed(7)
    for i in range(5 if DEVICE == "cpu" else 30):
        rows, keys, d, dv = (int(torch.randint(1, most, (1,), generator=g)) for most in (40, 70, 70, 70))
        assert_two_baselines(*make({"q": (1, 2, rows, d), "k": (1, 1, keys, d), "dv": dv, "causal": bool(rows % 2)}, DTYPES[i % 3]))


def test_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of one fused projection, a bias in columns, an expanded and a transposed gradient: as their copies."""
    fused = torch.randn(2, 35, 3, 2, 16, device=DEVICE)
    leaves = [x.transpose(1, 2) for x in fused.unbind(2)]
    bias = torch.randn(35, 70, device=DEVICE).t()[::2]
    with small_blocks(monkeypatch), ops.use("triton"):
        one = run("triton", [*leaves, bias], {"causal": True})
        two = run("triton", [*(x.contiguous() for x in leaves), bias.contiguous()], {"causal": True})
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        q, k, v = (x.detach().requires_grad_() for x in leaves)
        out = ops.flash_attention(q, k, v)
        g = torch.randn(2, 2, 16, 35, device=DEVICE).transpose(2, 3)
        found = [torch.autograd.grad(out, (q, k, v), grad, retain_graph=True) for grad in (g, g.contiguous())]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        found = [torch.autograd.grad(out, (q, k, v), grad, retain_graph=True) for grad in (torch.ones_like(out), out.new_ones(()).expand(out.shape))]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["lengths", "short"])
def test_what_is_not_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """NaN behind key_lengths changes no bit; rows that see nothing give 0, -inf and gradient 0."""
    with small_blocks(monkeypatch):
        leaves, options = make({**CASES[name], "key_lengths": tensor([30, 0, 7])[: CASES[name]["q"][0]]}, torch.bfloat16)
        clean = run("triton", leaves, options)
        for item, length in enumerate(options["key_lengths"].tolist()):
            for x in leaves[1:]:
                x[item, :, length:] = NAN
        for a, b in zip(clean, run("triton", leaves, options), strict=True):
            assert torch.equal(a, b) and torch.isfinite(b).all()
        assert not any(x[1].any() for x in clean)


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.float32) for name in attention_cases.BLIND] + [(name, torch.bfloat16) for name in ("no keys of one item", "packed")]
)
def test_rows_that_see_no_key_are_not_read(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    with small_blocks(monkeypatch), ops.use("triton"):
        attention_cases.check_blind_rows(name, dtype, DEVICE)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize(
    "change",
    [
        {"q": (2, 2, 7, 16), "k": (2, 2, 30, 16), "bias": (2, 1, 1, 30), "key_lengths": tensor([0, 20])},
        {"q": (2, 2, 40, 16), "k": (2, 1, 36, 16), "bias": (2, 2, 40, 36), "causal": True},
        {"q": (2, 2, 20, 16), "k": (2, 1, 36, 16), "bias": (20, 1), "key_lengths": tensor([36, 0])},
        {
            "q": (70, 2, 16), "k": (60, 2, 16), "bias": (2, 1, 60), "cu_seqlens_q": tensor([0, 20, 45, 65]), "cu_seqlens_k": tensor([0, 20, 20, 60]),
            "dropout_p": 0.3,
        },
    ],
)  # fmt: skip
def test_a_bias_learns_nothing_from_rows_that_see_no_key(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    """Nor do keys behind a soft cap, whose slope is a number of those rows' too."""
    (q, *others), options = make({"softcap": 2.0, **change}, torch.float32)
    found = []
    with small_blocks(monkeypatch), ops.use("triton"):
        blind = ops.flash_attention(q, *others[:2], return_lse=True, **options)[1] == -INF
        assert blind.any() and not blind.all()
        for filler in (0.0, NAN):
            torch.manual_seed(1)
            query = q.masked_fill((blind.t() if q.dim() == 3 else blind)[..., None], filler)
            leaves = [x.detach().requires_grad_() for x in (query, *others)]
            results = ops.flash_attention(*leaves[:3], bias=leaves[3], return_lse=True, **options)
            found.append([*results, *torch.autograd.grad(results, leaves, (query, torch.ones_like(results[1]).masked_fill(blind, filler)))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and all(x.any() for x in found[0])


def test_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN or inf in a query stays in its row; a bias of -inf hides a key, and a row whose keys are all hidden is empty."""
    with small_blocks(monkeypatch):
        leaves, _ = make(CASES["plain"], torch.float32)
        clean = run("triton", leaves, {})[0]
        leaves[0][0, 1, 5, 0], leaves[0][1, 0, 7, 3] = NAN, INF
        out = run("triton", leaves, {})[0]
        assert out[0, 1, 5].isnan().all() and out[1, 0, 7].isnan().all()
        out[0, 1, 5], out[1, 0, 7] = clean[0, 1, 5], clean[1, 0, 7]
        assert torch.equal(out, clean)

        leaves, _ = make({"q": (1, 2, 20, 16), "k": (1, 1, 70, 16), "bias": (1, 2, 20, 70)}, torch.float32)
        hidden = leaves[3].clone()
        hidden[..., 40:] = -INF
        hidden[:, :, 9] = -INF
        short = [leaves[0], leaves[1][:, :, :40], leaves[2][:, :, :40], leaves[3][..., :40].contiguous()]
        a, b = run("triton", [*leaves[:3], hidden], {}), run("triton", short, {})
        rows = torch.arange(20, device=DEVICE) != 9
        torch.testing.assert_close(a[0][:, :, rows], b[0][:, :, rows], rtol=1e-5, atol=1e-6)
        assert not a[0][:, :, 9].any() and not a[2][:, :, 9].any() and all(torch.isfinite(x).all() for x in a)


FAR_FROM_FLOATS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, where the rows that are done again overflow


@FAR_FROM_FLOATS
@pytest.mark.parametrize("name", [*attention_cases.HUGE, *attention_cases.COARSE])
def test_huge_bias(name: str) -> None:
    with ops.use("triton"):
        attention_cases.check_huge_bias(name, torch.float32, 6, 9, DEVICE, causal=True)
        attention_cases.check_huge_bias(name, torch.bfloat16, 5, 9, DEVICE, broadcast=True)


@FAR_FROM_FLOATS
@pytest.mark.parametrize(
    ("name", "rows", "keys", "options"), [("both ends", 36, 40, {"broadcast": True}), ("lowest of float64", 1, 150, {})]
)
def test_huge_bias_of_several_blocks(monkeypatch: pytest.MonkeyPatch, name: str, rows: int, keys: int, options: dict[str, bool]) -> None:
    with small_blocks(monkeypatch), ops.use("triton"):
        attention_cases.check_huge_bias(name, torch.float32, rows, keys, DEVICE, **options)


@FAR_FROM_FLOATS
@pytest.mark.parametrize(
    ("name", "fill", "dtype"),
    [(name, -1e4, torch.float32) for name, case in CASES.items() if "bias" in case]
    + [(name, 3e38, torch.bfloat16) for name in ("whole bias", "bias of rows", "short, groups, all options", "few queries, all options")],
)
def test_coarse_rows(monkeypatch: pytest.MonkeyPatch, name: str, fill: float, dtype: torch.dtype) -> None:
    """Rows that float32 has no digits for, with every option: two baselines, and where those are far off, the formula's in float64."""
    leaves, options = make(CASES[name], dtype)
    attention_cases.make_coarse(leaves[3], fill)
    with small_blocks(monkeypatch):
        assert_two_baselines(leaves, options)
        attention_cases.check_law(run("reference", [leaf.double() for leaf in leaves], options), run("triton", leaves, options))


@FAR_FROM_FLOATS
@pytest.mark.parametrize(
    ("name", "which"),
    [*(("whole bias", which) for which in ("q", "k", "v", "bias", "lse")), ("bias of keys, soft cap", "bias"), ("short, groups, all options", "v")],
)
def test_one_gradient_of_coarse_rows(monkeypatch: pytest.MonkeyPatch, name: str, which: str) -> None:
    leaves, options = make(CASES[name] | {"dropout_p": 0.0}, torch.float32)
    attention_cases.make_coarse(leaves[3], 3e38)
    check_one_gradient(monkeypatch, leaves, options, which)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", attention_cases.FAR)
def test_far_positions(name: str, dtype: torch.dtype) -> None:
    with ops.use("triton"):
        attention_cases.check_far_positions(name, dtype, DEVICE)


def test_large_scores() -> None:
    """Scores of thousands neither overflow nor lose the maximum."""
    q = torch.full((1, 1, 20, 8), 30.0, device=DEVICE)
    k, v = torch.randn(1, 1, 40, 8, device=DEVICE).mul(30), torch.randn(1, 1, 40, 8, device=DEVICE)
    out, lse, *grads = run("triton", [q, k, v], {"scale": 1.0})
    best = (q @ k.transpose(-1, -2)).argmax(-1)
    assert all(torch.isfinite(x).all() for x in (out, lse, *grads))
    torch.testing.assert_close(out[0, 0], v[0, 0, best[0, 0]], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["causal, groups", "one query", "short"])
def test_batch_independence(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An item comes out the same to the bit alone and in a batch; one query, with any room behind its keys."""
    with small_blocks(monkeypatch):
        case = {**CASES[name], "q": (3, *CASES[name]["q"][1:]), "k": (3, *CASES[name]["k"][1:]), "key_lengths": tensor([30, 21, 30])}
        leaves, options = make(case, torch.bfloat16)
        together = run("triton", leaves, options)[0]
        for i in range(3):
            alone = [x[i : i + 1] for x in leaves]
            if name == "one query":
                alone[1:] = [x[:, :, :40] for x in alone[1:]]
            out = run("triton", alone, {**options, "key_lengths": options["key_lengths"][i : i + 1]})[0]
            assert torch.equal(out[0], together[i])


def test_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_blocks(monkeypatch):
        leaves, options = make(CASES["bias of heads"], torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(run("triton", leaves, options), run("triton", leaves, options), strict=True))


def test_dropout_keeps_what_the_reference_keeps() -> None:
    """With values that name the keys, out shows which probabilities stay."""
    q, k = torch.zeros(2, 2, 9, 4, device=DEVICE), torch.zeros(2, 2, 64, 4, device=DEVICE)
    v = torch.eye(64, device=DEVICE).expand(2, 2, 64, 64)
    found = [run(backend, [q, k, v], {"dropout_p": 0.4})[0] != 0 for backend in ("triton", "reference")]
    assert torch.equal(*found) and 0.5 < found[0].double().mean() < 0.7


@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "lse"])
@pytest.mark.parametrize("name", ["whole bias", "bias of keys, soft cap", "short, groups, all options"])
def test_one_gradient(monkeypatch: pytest.MonkeyPatch, name: str, which: str) -> None:
    check_one_gradient(monkeypatch, *make(CASES[name] | {"dropout_p": 0.0}, torch.float32), which)


def check_one_gradient(monkeypatch: pytest.MonkeyPatch, leaves: list[Tensor], options: dict[str, Any], which: str) -> None:
    """Each gradient alone, and those of the log-sum-exp alone, are those of the reference."""
    asked = range(4) if which == "lse" else [("q", "k", "v", "bias").index(which)]
    found = []
    with small_blocks(monkeypatch):
        for backend in ("triton", "reference"):
            tensors = [x.detach().requires_grad_(i in asked) for i, x in enumerate(leaves)]
            with ops.use(backend):
                out, lse = ops.flash_attention(*tensors[:3], bias=tensors[3], return_lse=True, **options)
                result = lse if which == "lse" else out
                g = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
                found.append(torch.autograd.grad(result, [x for x in tensors if x.requires_grad], g, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_choice() -> None:
    """Declines float64 and wide heads with a reason; on a GPU it is the default."""
    for dtype, d in ((torch.float32, 4), (torch.float64, 4), (torch.bfloat16, 257)):
        q = torch.randn(1, 1, 2, d, device=DEVICE).to(dtype)
        with ops.use("triton"):
            row = {row.backend: row for row in ops.explain("flash_attention", q, q, q)}["triton"]
            assert row.chosen == (dtype != torch.float64 and d < 257)
            assert row.chosen or "float64" in row.reasons[0] or "257, more than 256" in row.reasons[0]
    q = torch.randn(1, 1, 2, 4, device=DEVICE)
    assert {row.backend: row for row in ops.explain("flash_attention", q, q, q)}["triton"].chosen == (DEVICE == "cuda")
