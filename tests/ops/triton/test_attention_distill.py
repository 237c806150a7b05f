"""attention_kl and flash_attention_distill in Triton against float64 and beside the reference: on a GPU where there is one, else interpreted."""

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
from cvmk.ops.triton import _tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")

CASES: dict[str, dict[str, Any]] = {  # (heads, heads of keys, width) of student and teacher, rows, keys, options
    "head by head": {"student": (2, 2, 16), "teacher": (2, 2, 24), "rows": 23, "keys": 40},
    "two share one": {"student": (4, 2, 16), "teacher": (2, 1, 16), "rows": 20, "keys": 40, "causal": True, "key_lengths": tensor([40, 10])},
    "groups of two and three": {"student": (4, 1, 16), "teacher": (6, 2, 16), "rows": 20, "keys": 36, "causal": True, "key_lengths": tensor([0, 35])},
    "one row": {"student": (3, 1, 16), "teacher": (2, 1, 16), "rows": 1, "keys": 90},
    "no rows": {"student": (3, 1, 8), "teacher": (2, 1, 8), "rows": 0, "keys": 7},
    "no keys": {"student": (3, 1, 8), "teacher": (2, 1, 8), "rows": 3, "keys": 0},
}
DTYPES = {"head by head": [(FP32, FP32), (BF16, FP32)], "two share one": [(FP32, FP32), (BF16, BF16), (FP16, FP16)]}


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks of 16 rows and 16 keys where kernels are interpreted: small tensors have several."""
    config = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    with contextlib.ExitStack() as stack:
        kernels = ("distill_log_sums", "distill_forward", "distill_query_gradient", "distill_key_gradient")
        for kernel, dtype, d, kind in itertools.product(kernels, (FP32, BF16, FP16), (16, 32), ("", " one", " several")):
            if DEVICE == "cpu":
                stack.enter_context(_tuning.overriding(kernel, f"{str(dtype)[6:]} d{d}{kind}", config))
        yield


def make(case: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v, teacher_q, teacher_k and the options."""
    options: dict[str, Any] = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in case.items()}
    (heads, kv_heads, d), (t_heads, t_kv_heads, dt) = options.pop("student"), options.pop("teacher")
    rows, keys = options.pop("rows"), options.pop("keys")
    g = torch.Generator().manual_seed(0)
    shapes = [(heads, rows, d), (kv_heads, keys, d), (kv_heads, keys, 20), (t_heads, rows, dt), (t_kv_heads, keys, dt)]
    return [torch.randn(2, *shape, generator=g).to(DEVICE, dtypes[i > 2]) for i, shape in enumerate(shapes)], options


def poisoned(*arguments: Any, **options: Any) -> Tensor:
    """torch.empty with NaN in it."""
    return torch.zeros(*arguments, **options).fill_(NAN)


def run(backend: str, tensors: list[Tensor], options: dict[str, Any], with_values: bool) -> list[Tensor]:
    """(out,) kl and the gradients of q, k (and v); what a kernel does not write is NaN."""
    leaves = [x.detach().requires_grad_() for x in tensors[: 3 if with_values else 2]]
    g = torch.Generator().manual_seed(1)
    with ops.use(backend), pytest.MonkeyPatch.context() as patch:
        if backend == "triton":
            patch.setattr(torch, "empty", poisoned)
        if with_values:
            results = list(ops.flash_attention_distill(*leaves, *tensors[3:], **options))
        else:
            results = [ops.attention_kl(*leaves, *tensors[3:], **options)]
        loss = sum((x.double() * torch.randn(x.shape, generator=g, dtype=torch.float64).to(DEVICE)).sum() for x in reversed(results))
        return [x.detach() for x in results] + list(torch.autograd.grad(loss, leaves))


def assert_two_baselines(tensors: list[Tensor], options: dict[str, Any], with_values: bool) -> None:
    exact = run("reference", [x.double() for x in tensors], options, with_values)
    theirs, ours = run("reference", tensors, options, with_values), run("triton", tensors, options, with_values)
    results = 2 if with_values else 1
    for i, (want, reference, got) in enumerate(zip(exact, theirs, ours, strict=True)):
        assert got.dtype == reference.dtype and got.shape == reference.shape and got.is_contiguous()
        if got.numel() == 0:
            continue
        floor = 2 * torch.finfo(got.dtype).eps * max(1e-2, want.abs().max().item())
        errors = [(x.double() - want).abs() for x in (reference, got)]
        for measure in (lambda e: e.max(), lambda e: e.square().mean().sqrt()):
            assert measure(errors[1]) <= (2 if i < results else 3) * measure(errors[0]) + floor, i


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize(("name", "dtypes"), [(name, dtypes) for name in CASES for dtypes in DTYPES.get(name, [(FP32, FP32)])])
def test_two_baselines(name: str, dtypes: tuple[torch.dtype, torch.dtype], with_values: bool) -> None:
    assert_two_baselines(*make(CASES[name], dtypes), with_values)


@pytest.mark.skipif(DEVICE == "cpu", reason="too slow for the interpreter")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("t_heads", [2, 4, 8])
def test_long(dtype: torch.dtype, width: int, t_heads: int) -> None:
    for options in ({}, {"causal": True, "key_lengths": tensor([500, 333])}):
        assert_two_baselines(*make({"student": (4, 2, width), "teacher": (t_heads, 2, 64), "rows": 500, "keys": 500, **options}, (dtype, dtype)), True)


@pytest.mark.parametrize("name", ["two share one", "groups of two and three"])
def test_what_is_not_read(name: str) -> None:
    """NaN behind key_lengths changes no bit; rows that see nothing give 0 and gradient 0."""
    tensors, options = make({**CASES[name], "key_lengths": tensor([0, 21])}, (FP32, FP32))
    clean = run("triton", tensors, options, True)
    for i in (1, 2, 4):
        for item, length in enumerate(options["key_lengths"].tolist()):
            tensors[i][item, :, length:] = NAN
    again = run("triton", tensors, options, True)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))
    assert not any(x[0].any() for x in again)


def test_rows_that_see_no_key_are_not_read() -> None:
    with ops.use("triton"):
        attention_cases.check_blind_rows("no keys of one item", FP32, DEVICE)


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize("name", ["two share one", "groups of two and three"])
def test_rows_before_the_first_key_are_not_read(name: str, with_values: bool) -> None:
    """NaN in both models' queries and in the gradients of rows that come before every key, or whose item has none, reaches nothing."""
    (q, k, v, tq, tk), options = make({**CASES[name], "rows": 40, "keys": 20, "key_lengths": tensor([20, 0])}, (FP32, FP32))
    blind = torch.ones(2, 1, 40, dtype=torch.bool, device=DEVICE)
    blind[0, :, 20:] = False
    found = []
    for filler in (0.0, NAN):
        query, teacher = (x.masked_fill(blind[..., None], filler) for x in (q, tq))
        leaves = [x.detach().requires_grad_() for x in ((query, k, v) if with_values else (query, k))]
        with ops.use("triton"):
            results = ops.flash_attention_distill(*leaves, teacher, tk, **options) if with_values else (ops.attention_kl(*leaves, teacher, tk, **options),)
            ones = [torch.ones_like(x).masked_fill(blind if x.dim() == 3 else blind[..., None], filler) for x in results]
            found.append([*results, *torch.autograd.grad(results, leaves, ones)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and all(x.any() for x in found[0])
    assert not any(x.masked_select(blind if x.dim() == 3 else blind[..., None]).any() for x in found[0][: len(results) + 1])


def test_out_is_that_of_flash_attention_and_kl_that_of_attention_kl() -> None:
    """One gradient alone, too: without the maps' it is flash_attention's."""
    tensors, options = make(CASES["two share one"], (FP32, FP32))
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    with ops.use("triton"):
        out, kl = ops.flash_attention_distill(q, k, v, *tensors[3:], **options)
        plain = ops.flash_attention(q, k, v, **options)
        maps = ops.attention_kl(q, k, *tensors[3:], **options)
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kl, maps, rtol=1e-5, atol=1e-6)
        g = torch.randn_like(out)
        for a, b in zip(torch.autograd.grad(out, (q, k, v), g, retain_graph=True), torch.autograd.grad(plain, (q, k, v), g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        for a, b in zip(torch.autograd.grad(kl.sum(), (q, k)), torch.autograd.grad(maps.sum(), (q, k)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_equal_maps_have_no_divergence() -> None:
    q, k = torch.randn(2, 2, 20, 16, device=DEVICE), torch.randn(2, 2, 40, 16, device=DEVICE)
    kl, dq, dk = run("triton", [q, k, k, q, k], {}, False)
    assert kl.abs().max() < 3e-6 and dq.abs().max() < 1e-6 and dk.abs().max() < 1e-5


def test_choice() -> None:
    """A float64 teacher and wide heads are declined with a reason."""
    q = torch.randn(1, 1, 2, 4, device=DEVICE)
    wide = torch.randn(1, 1, 2, 257, device=DEVICE)
    with ops.use("triton"):
        assert next(row for row in ops.explain("attention_kl", q, q, q, q) if row.chosen).backend == "triton"
        rows = {row.backend: row for row in ops.explain("attention_kl", q, q, q.double(), q.double())}
        assert "teacher_q is torch.float64" in rows["triton"].reasons[0]
        rows = {row.backend: row for row in ops.explain("flash_attention_distill", q, q, q, wide, wide)}
        assert "teacher_q has head size 257" in rows["triton"].reasons[0]
