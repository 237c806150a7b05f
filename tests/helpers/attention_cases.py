"""What every backend of attention must do alike: rows that see no key, positions far from all keys, huge numbers in a bias."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, tensor

from cvmk.ops import flash_attention, flash_attention_distill

INF, NAN = math.inf, math.nan

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


# -- positions far from all keys -----------------------------------------------------------------------------------------------------
LEAST, MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
FAR: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {  # rows and keys, options (lists are tensors of int64)
    "no limit by maxsize": ((5, 70), {"window": (sys.maxsize, sys.maxsize)}),
    "no limit by any integer": ((5, 5), {"window": 10**30}),
    "no limit to the left": ((7, 5), {"window": (sys.maxsize, 1)}),
    "no limit to the right, a start": ((5, 70), {"window": (-1, sys.maxsize), "query_start": [1, 60]}),
    "a window behind its start": ((20, 40), {"window": (2**30 - 1, 2**30 - 1), "query_start": [2**30, 2**30 + 2**29]}),
    "starts, causal": ((5, 70), {"causal": True, "query_start": [MOST, LEAST]}),
    "starts of 32 bits, causal": ((5, 70), {"causal": True, "query_start": tensor([2**31 - 1, -(2**31)], dtype=torch.int32)}),
    "starts that 32 bits wrap to 5": ((5, 70), {"causal": True, "query_start": [2**32 + 5, -(2**32) + 5]}),
    "starts, windows": ((5, 70), {"window": (3, 1), "query_start": [MOST, LEAST]}),
    "starts, half a window": ((40, 70), {"window": (-1, 3), "query_start": [MOST - 3, 2]}),
    "lengths": ((5, 70), {"key_lengths": [MOST, LEAST]}),
    "lengths that 32 bits wrap to 5": ((40, 70), {"key_lengths": [2**32 + 5, -(2**32) + 5], "causal": True}),
    "lengths of 32 bits": ((5, 7), {"key_lengths": tensor([2**31 - 1, -1], dtype=torch.int32), "window": (2, 1)}),
}


def _seen(rows: int, keys: int, options: dict[str, Any]) -> Tensor:
    """Which of the keys each query sees [2, rows, keys], in Python's integers."""
    window = options.get("window", (-1, -1))
    left, right = (window, window) if isinstance(window, int) else window
    right = 0 if options.get("causal") else right
    starts, lengths = (options[name] if name in options else [default] * 2 for name, default in (("query_start", keys - rows), ("key_lengths", keys)))
    return tensor(
        [
            [
                [j < length and (left < 0 or j >= i + start - left) and (right < 0 or j <= i + start + right) for j in range(keys)]
                for i in range(rows)
            ]
            for start, length in zip(map(int, starts), map(int, lengths), strict=True)
        ]
    )  # fmt: skip


def check_far_positions(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Sums of 64 bits are the integers', wherever a window or a length ends."""
    (rows, keys), options = FAR[name]
    make = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 2, n, 16, generator=make).to(device, dtype) for n in (rows, keys, keys))
    seen = _seen(rows, keys, options).to(device)[:, None]
    tensors = {key: torch.as_tensor(value).to(device) for key, value in options.items() if isinstance(value, (list, Tensor))}
    found, want = [], []
    for kept, given in ((found, {**options, **tensors}), (want, {"bias": torch.where(seen, 0.0, -INF)})):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = flash_attention(*leaves, return_lse=True, **given)
        kept += [out, lse, *torch.autograd.grad(out.float().square().sum(), leaves)]
    tolerance = 64 * torch.finfo(dtype).eps
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# -- huge numbers in a bias ----------------------------------------------------------------------------------------------------------
LOWEST, HIGHEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
HUGE: dict[str, tuple[torch.dtype, Any]] = {  # the dtype of the bias, and the number for key j of a row; some rows keep small ones
    "lowest": (torch.float32, lambda j: LOWEST),
    "under what times log2(e) is finite": (torch.float32, lambda j: -2.4e38),
    "3e38": (torch.float32, lambda j: 3e38),
    "highest": (torch.float32, lambda j: HIGHEST),
    "both ends": (torch.float32, lambda j: (LOWEST, HIGHEST, 0.0)[j % 3]),
    "several huge ones": (torch.float32, lambda j: (LOWEST, -3.3e38, -2.4e38, -2.4e38)[j % 4]),
    "lowest and hidden": (torch.float32, lambda j: (-INF, LOWEST)[j % 2]),
    "one finite key": (torch.float32, lambda j: LOWEST if j == 3 else -INF),
    "hidden": (torch.float32, lambda j: -INF),
    "lowest and small ones": (torch.float32, lambda j: (LOWEST, 0.5 * (j % 7))[j % 2]),
    "lowest of bfloat16": (torch.bfloat16, lambda j: torch.finfo(torch.bfloat16).min),
    "lowest of float16": (torch.float16, lambda j: torch.finfo(torch.float16).min),
    "lowest of float64": (torch.float64, lambda j: torch.finfo(torch.float64).min),
    "float64 beyond float32": (torch.float64, lambda j: (0.0, -1e300)[j % 2]),
}


COARSE: dict[str, tuple[torch.dtype, Any]] = {  # the same, of which float32 has no digits left for the scores: kernels have
    "-300": (torch.float32, lambda j: -300.0),
    "1e3": (torch.float32, lambda j: 1e3),
    "-1e4": (torch.float32, lambda j: -1e4),
    "-1e9": (torch.float32, lambda j: -1e9),
    "1e6 and others near it": (torch.float32, lambda j: 1e6 + 0.5 * (j % 5)),
    "-2.5e38 at single keys": (torch.float32, lambda j: -2.5e38 if j % 4 == 1 else 0.1 * (j % 3)),
    "hidden but for one of -3e38": (torch.float32, lambda j: -3e38 if j == 2 else -INF),
    "-1e9 of which one key is less": (torch.float32, lambda j: -1e9 - 64.0 * (j == 2)),
    "-1e5 of float64": (torch.float64, lambda j: -1e5 + 1e-3 * (j % 7)),
    "-1e4 of bfloat16": (torch.bfloat16, lambda j: -1e4),
}


def make_coarse(bias: Tensor, fill: float) -> None:
    """`fill` as the bias of most rows, of whole items and heads too; and some hidden keys."""
    rows = bias.view(-1, bias.shape[-1])
    rows[torch.arange(rows.shape[0], device=bias.device) % 5 != 2] = fill
    if bias.shape[-1] > 1:
        rows[::3, 4] = -INF


def check_law(exact: list[Tensor], found: list[Tensor]) -> None:
    """out, lse and gradients to a few units of the dtype's rounding: closer than the reference of the dtype comes to the formula's in float64."""
    for what, want, got in zip(("out", "lse", "dq", "dk", "dv", "dbias"), exact, found, strict=True):
        tolerance = 4e-6 if found[0].dtype == torch.float32 else 8 * torch.finfo(found[0].dtype).eps
        largest = 1.0 if what == "lse" else want.abs().max().item()
        same = torch.isclose(got.double(), want, rtol=tolerance, atol=tolerance * max(1.0, largest))
        assert same.all(), f"{what}: {(got.double() - want).abs().max()}"


def _law(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The formula in float64; rows without a key give 0 and -inf. (The derivative of torch.logsumexp is exp(s - lse), which is 1 here.)"""
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    if causal:
        rows, keys = s.shape[-2:]
        s = s.masked_fill(torch.ones(rows, keys, dtype=torch.bool, device=s.device).triu(keys - rows + 1), -INF)
    empty = (s.detach() == -INF).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0)
    p, top = torch.softmax(s, -1).masked_fill(empty, 0), s.detach().amax(-1, keepdim=True)
    lse = (top + (s - top).exp().sum(-1, keepdim=True).log())[..., 0].masked_fill(empty[..., 0], -INF)
    return p @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), lse


def check_huge_bias(name: str, dtype: torch.dtype, rows: int, keys: int, device: str = "cpu", causal: bool = False, broadcast: bool = False) -> None:
    """A finite bias is finite: results and gradients are the float64 formula's, to the rounding of the dtype; every third row has small numbers.

    Where the sum of a score and the bias rounds in float32 to something between, that rounding is allowed for.
    """
    kind, number = {**HUGE, **COARSE}[name]
    make = torch.Generator().manual_seed(6)
    q, k, v, g = (torch.randn(2, n, t, 16, generator=make).to(device, dtype) for n, t in ((4, rows), (2, keys), (2, keys), (4, rows)))
    bias = torch.randn(2, 1, 1 if broadcast else rows, keys, generator=make).to(kind)
    huge = torch.tensor([number(j) for j in range(keys)], dtype=torch.float64).to(kind)
    bias[:, :, [i for i in range(bias.shape[2]) if rows == 1 or i % 3 != 1]] = huge
    g_lse = torch.randn(2, 4, rows, generator=make).to(device, torch.float32)
    found: list[list[Tensor]] = []
    for wide in (True, False):
        leaves = [(x.double() if wide else x).to(device).clone().requires_grad_() for x in (q, k, v, bias)]
        out, lse = _law(*leaves, causal) if wide else flash_attention(*leaves[:3], bias=leaves[3], causal=causal, return_lse=True)
        weight = torch.where(lse == -INF, 0, g_lse.to(lse.dtype))
        grads = torch.autograd.grad((out * g.to(out.dtype)).sum() + (lse.masked_fill(lse == -INF, 0) * weight).sum(), leaves)
        found.append([out.detach(), lse.detach().clamp(min=LOWEST) if not (lse == -INF).all() else lse.detach(), *grads])
    tolerance = max(2e-5 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps, 2.0**-23 * 65504 if kind == torch.float16 else 0)
    for what, want, got in zip(("out", "lse", "dq", "dk", "dv", "dbias"), *found, strict=True):
        scale = max(1.0, want[want.abs() < 1e30].abs().max().item() if (want.abs() < 1e30).any() else 1.0)
        same = torch.isclose(got.double(), want, rtol=max(tolerance, 4 * torch.finfo(got.dtype).eps), atol=tolerance * scale, equal_nan=True)
        same |= got.double() == want
        assert same.all(), f"{what}: {got[~same].flatten()[:5].tolist()} beside {want[~same].flatten()[:5].tolist()}"
