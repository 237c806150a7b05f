"""attention_kl and flash_attention_distill on the CPU library, at every level of this machine, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from cvmk import ops
from cvmk.ops import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library is not there")
AVAILABLE = native.LEVELS[: native.LEVELS.index(native.isa_level()) + 1] if native.library() is not None else ()
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)]
NAN = float("nan")


@pytest.fixture(params=AVAILABLE)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CVMK_CPU_ISA", request.param)
    return str(request.param)


CASES: dict[str, dict[str, Any]] = {  # (heads, heads of keys, width) of student and teacher, rows, keys, options
    "head by head": {"student": (2, 2, 32), "teacher": (2, 2, 16), "rows": 33, "keys": 65},
    "mean of two": {"student": (4, 2, 32), "teacher": (8, 4, 48), "rows": 33, "keys": 65, "key_lengths": tensor([65, 20])},
    "groups of two and three": {"student": (4, 1, 24), "teacher": (6, 2, 64), "rows": 140, "keys": 140, "causal": True, "key_lengths": tensor([0, 100])},
    "one teacher head, splits": {"student": (2, 2, 64), "teacher": (1, 1, 64), "rows": 40, "keys": 2100, "causal": True},
    "one row": {"student": (3, 1, 64), "teacher": (2, 1, 64), "rows": 1, "keys": 1100},
    "no rows": {"student": (3, 1, 8), "teacher": (2, 1, 8), "rows": 0, "keys": 7},
    "no keys": {"student": (3, 1, 8), "teacher": (2, 1, 8), "rows": 3, "keys": 0},
}


def make(case: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v, teacher_q, teacher_k and the options."""
    options = dict(case)
    (heads, kv_heads, d), (t_heads, t_kv_heads, dt) = options.pop("student"), options.pop("teacher")
    rows, keys = options.pop("rows"), options.pop("keys")
    g = torch.Generator().manual_seed(0)
    shapes = [(heads, rows, d), (kv_heads, keys, d), (kv_heads, keys, 20), (t_heads, rows, dt), (t_kv_heads, keys, dt)]
    return [torch.randn(2, *shape, generator=g).to(dtypes[i > 2]) for i, shape in enumerate(shapes)], options


def run(backend: str, tensors: list[Tensor], options: dict[str, Any], with_values: bool) -> list[Tensor]:
    """(out,) kl and the gradients of q, k (and v)."""
    leaves = [x.detach().requires_grad_() for x in tensors[: 3 if with_values else 2]]
    g = torch.Generator().manual_seed(1)
    with ops.use(backend):
        if with_values:
            out, kl = ops.flash_attention_distill(*leaves, *tensors[3:], **options)
            results = [out, kl]
        else:
            kl = ops.attention_kl(*leaves, *tensors[3:], **options)
            results = [kl]
        loss = sum((x.double() * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in reversed(results))
        return [x.detach() for x in results] + list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_two_baselines(level: str, name: str, dtypes: tuple[torch.dtype, torch.dtype], with_values: bool) -> None:
    tensors, options = make(CASES[name], dtypes)
    exact = run("reference", [x.double() for x in tensors], options, with_values)
    theirs, ours = run("reference", tensors, options, with_values), run("native", tensors, options, with_values)
    results = 2 if with_values else 1
    for i, (want, reference, got) in enumerate(zip(exact, theirs, ours, strict=True)):
        assert got.dtype == reference.dtype and got.shape == reference.shape and got.is_contiguous()
        if got.numel() == 0:
            continue
        floor = 2 * torch.finfo(got.dtype).eps * max(1e-2, want.abs().max().item())
        errors = [(x.double() - want).abs() for x in (reference, got)]
        for measure in (lambda e: e.max(), lambda e: e.square().mean().sqrt()):
            assert measure(errors[1]) <= (2 if i < results else 3) * measure(errors[0]) + floor, i


@pytest.mark.parametrize("dtypes", DTYPES)
def test_what_is_not_read(level: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """NaN behind key_lengths changes no bit; rows that see nothing give 0 and gradient 0."""
    tensors, options = make(CASES["groups of two and three"], dtypes)
    clean = run("native", tensors, options, True)
    for i in (1, 2, 4):
        for item, length in enumerate(options["key_lengths"].tolist()):
            tensors[i][item, :, length:] = NAN
    again = run("native", tensors, options, True)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))
    assert not any(x[0].any() for x in again)


def test_equal_maps_have_no_divergence(level: str) -> None:
    q, k = torch.randn(2, 3, 50, 16), torch.randn(2, 3, 70, 16)
    kl, dq, dk = run("native", [q, k, k, q, k], {}, False)
    assert kl.abs().max() < 3e-6 and dq.abs().max() < 1e-6 and dk.abs().max() < 1e-5


def test_choice() -> None:
    """A float64 teacher is declined with a reason."""
    q = torch.randn(1, 1, 2, 4)
    assert next(row for row in ops.explain("attention_kl", q, q, q, q) if row.chosen).backend == "native"
    rows = {row.backend: row for row in ops.explain("attention_kl", q, q, q.double(), q.double())}
    assert "teacher_q is torch.float64" in rows["native"].reasons[0]


@pytest.mark.parametrize("dtypes", DTYPES[:2])
def test_many_items(level: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """A batch whose items are handed out several at a time: every one as it is alone, to the bit."""
    g = torch.Generator().manual_seed(3)
    shapes = [(2, 5, 16), (1, 40, 16), (1, 40, 8), (1, 5, 16), (1, 40, 16)]
    tensors = [torch.randn(70, *shape, generator=g).to(dtypes[0]) for shape in shapes]

    def gradients(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        with ops.use("native"):
            out, kl = ops.flash_attention_distill(*leaves, *tensors[3:])
            return [out, kl, *torch.autograd.grad((out, kl), leaves, (torch.ones_like(out), torch.ones_like(kl)))]

    together = gradients(tensors)
    for item in (0, 1, 35, 36, 69):
        for alone, batch in zip(gradients([x[item : item + 1] for x in tensors]), together, strict=True):
            assert torch.equal(alone[0], batch[item])
