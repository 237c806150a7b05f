"""What every backend of attention must leave unread: rows that see no key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, tensor

from cvmk.ops import flash_attention, flash_attention_distill

BLIND: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {  # sizes of q and k, options
    "no keys of one item": ((3, 2, 7, 16), (3, 1, 9, 16), {"key_lengths": tensor([9, 0, 4])}),
    "before the first key": ((2, 2, 40, 16), (2, 2, 90, 16), {"causal": True, "query_start": tensor([-3, 0])}),
    "more queries than keys": ((1, 4, 150, 24), (1, 2, 130, 24), {"causal": True}),
    "behind the last key": ((2, 1, 8, 16), (2, 1, 100, 16), {"window": (2, -1), "key_lengths": tensor([100, 3])}),
    "window before the keys": ((1, 2, 70, 16), (1, 1, 20, 16), {"window": (4, 2), "query_start": tensor([-9])}),
    "packed": ((12, 2, 16), (10, 2, 16), {"causal": True, "cu_seqlens_q": tensor([1, 5, 8, 10]), "cu_seqlens_k": tensor([0, 2, 2, 9])}),
}


def _run(inputs: list[Tensor], gradients: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    if len(inputs) > 3:
        results: Any = flash_attention_distill(*leaves, *inputs[3:], **options)
    else:
        results = flash_attention(*leaves, **options, return_lse=True)
    torch.autograd.backward(results, gradients)
    return [*(t.detach() for t in results), *(t.grad for t in leaves if t.grad is not None)]


def check_blind_rows(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """NaN in the queries, and in the gradients of the results, of rows that see no key changes no bit of anything."""
    size_q, size_k, options = BLIND[name]
    options = {option: value.to(device) if isinstance(value, Tensor) else value for option, value in options.items()}
    make = torch.Generator().manual_seed(3)
    q, k, v, g = (torch.randn(size, generator=make).to(device, dtype) for size in (size_q, size_k, size_k, size_q))
    _, lse = flash_attention(q, k, v, **options, return_lse=True)
    blind = lse == -torch.inf
    rows = blind.t() if q.dim() == 3 else blind
    assert 0 < int(rows.sum()) < rows.numel()
    g_lse = torch.where(blind, 0, torch.ones_like(lse))
    poison = [torch.where(rows[..., None], torch.nan, t) for t in (q, g)] + [torch.where(blind, torch.nan, g_lse)]
    clean = [torch.where(rows[..., None], 0, t) for t in (q, g)] + [g_lse]
    found, want = (_run([one, k, v], [two, three], options) for one, two, three in (poison, clean))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert not found[0][rows].any() and not found[2][rows].any()
    if q.dim() == 4 and set(options) <= {"causal", "key_lengths"}:
        found, want = (_run([one, k, v, one, k], [two, three], options) for one, two, three in (poison, clean))
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
