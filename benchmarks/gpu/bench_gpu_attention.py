"""GPU rows of flash_attention and flash_attention_distill beside every backend of scaled_dot_product_attention. Run by contestants.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cvmk import ops
from gpu.contestants import Row

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
TOKENS, HIDDEN = 16384, 2048


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    tokens, hidden = (64, 128) if small else (TOKENS, HIDDEN)
    for size in (64, 128):
        for length in (32,) if small else (512, 1024, 4096, 16384):
            for causal in (False, True):
                yield _plain(device, tokens // length, hidden // size, length, size, causal, "fwd")
        for length in (32,) if small else (1024, 4096):
            yield _plain(device, tokens // length, hidden // size, length, size, True, "fwd+bwd")
    for which in ("key lengths", "bias"):
        yield _masked(device, tokens // 32 if small else 4, hidden // 64, 32 if small else 4096, 64, which)
    for batch, length, size in ((4, 16, 32),) if small else ((64, 64, 64), (256, 32, 64), (512, 32, 32), (512, 64, 64)):
        yield _translation(device, batch, 8, length, size)
    for length in (32,) if small else (512, 2048):
        yield _distill(device, tokens // length, hidden // 64, length, 64)
    yield _decode(device, 4 if small else 64, 8, 64 if small else 8192, 64)


def _normal(device: torch.device, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device).bfloat16().requires_grad_(grad)


def _step(call: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor | None) -> Any:
    out = call()
    return out if grad is None else torch.autograd.grad(out, leaves, grad)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, names: tuple[str, ...], **options: Any) -> dict[str, Callable[[], Any]]:
    def run(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return _step(lambda: scaled_dot_product_attention(q, k, v, **options), (q, k, v), grad)

    return {f"SDPA {name}": functools.partial(run, SDPA[name]) for name in names}


def _plain(device: torch.device, batch: int, heads: int, length: int, size: int, causal: bool, which: str) -> Row:
    backward = which != "fwd"
    q, k, v = (_normal(device, batch, heads, length, size, grad=backward) for _ in range(3))
    grad = _normal(device, batch, heads, length, size) if backward else None
    return Row(
        f"flash_attention {which}",
        f"B{batch} H{heads} T{length} D{size} bf16{' causal' if causal else ''}",
        lambda: _step(lambda: ops.flash_attention(q, k, v, causal=causal), (q, k, v), grad),
        _sdpa(q, k, v, grad, ("flash", "cudnn", "efficient"), is_causal=causal),
        operations=4.0 * batch * heads * length * length * size * (0.5 if causal else 1.0) * (3.5 if backward else 1.0),
        targets=(("best peer", 1.0 if length <= 1024 and not backward else 0.9),),
        arguments=functools.partial(ops.explain, "flash_attention", q, k, v, causal=causal),
    )


def _masked(device: torch.device, batch: int, heads: int, length: int, size: int, which: str) -> Row:
    """The work of the unmasked call: all keys count, and the bias takes none away."""
    q, k, v = (_normal(device, batch, heads, length, size) for _ in range(3))
    options: dict[str, Any] = {"key_lengths": torch.full((batch,), length, device=device)}
    if which == "bias":
        options = {"bias": _normal(device, 1, heads, length, length)}
    peers: dict[str, Any] = {"cvmk unmasked": lambda: ops.flash_attention(q, k, v)}
    if which == "bias":
        peers |= _sdpa(q, k, v, None, ("efficient", "cudnn"), attn_mask=options["bias"])
    return Row(
        f"flash_attention {which}",
        f"B{batch} H{heads} T{length} D{size} bf16",
        lambda: ops.flash_attention(q, k, v, **options),
        {name.replace("cvmk ", "same op, "): call for name, call in peers.items()},
        operations=4.0 * batch * heads * length * length * size,
        targets=(("same op, unmasked", 0.9 if which == "key lengths" else 0.8),),
        arguments=functools.partial(ops.explain, "flash_attention", q, k, v, **options),
    )


def _translation(device: torch.device, batch: int, heads: int, length: int, size: int) -> Row:
    """Padded sentences forward and backward: the mask of the peers is built beforehand, which is to their advantage."""
    q, k, v = (_normal(device, batch, heads, length, size, grad=True) for _ in range(3))
    grad = _normal(device, batch, heads, length, size)
    lengths = torch.randint(length // 2, length + 1, (batch,), device=device)
    mask = (torch.arange(length, device=device) < lengths[:, None])[:, None, None, :].expand(batch, 1, length, length).contiguous()
    return Row(
        "flash_attention fwd+bwd",
        f"B{batch} H{heads} T{length} D{size} bf16 lengths",
        lambda: _step(lambda: ops.flash_attention(q, k, v, key_lengths=lengths), (q, k, v), grad),
        _sdpa(q, k, v, grad, ("cudnn", "efficient", "math"), attn_mask=mask),
        traffic=2.0 * 11 * q.numel(),
        targets=(("best peer", 1.5),),
        host=True,
        arguments=functools.partial(ops.explain, "flash_attention", q, k, v, key_lengths=lengths),
    )


def _distill(device: torch.device, batch: int, heads: int, length: int, size: int) -> Row:
    q, k, v = (_normal(device, batch, heads, length, size, grad=True) for _ in range(3))
    teacher_q, teacher_k = (_normal(device, batch, heads, length, size) for _ in range(2))
    grad = _normal(device, batch, heads, length, size)

    def ours() -> Any:
        out, kl = ops.flash_attention_distill(q, k, v, teacher_q, teacher_k)
        return torch.autograd.grad([out, kl.sum()], (q, k, v), [grad, None])

    return Row(
        "flash_attention_distill fwd+bwd",
        f"B{batch} H{heads} T{length} D{size} bf16",
        ours,
        {"same shape, plain": lambda: _step(lambda: ops.flash_attention(q, k, v), (q, k, v), grad)},
        operations=9 * 2.0 * batch * heads * length * length * size,
        targets=(("same shape, plain", 1 / 1.5),),
        arguments=functools.partial(ops.explain, "flash_attention_distill", q, k, v, teacher_q, teacher_k),
    )


def _decode(device: torch.device, batch: int, heads: int, length: int, size: int) -> Row:
    q = _normal(device, batch, heads, 1, size)
    k, v = (_normal(device, batch, heads, length, size) for _ in range(2))
    return Row(
        "flash_attention decode",
        f"B{batch} H{heads} T{length} D{size} bf16",
        lambda: ops.flash_attention(q, k, v),
        _sdpa(q, k, v, None, ("flash", "cudnn", "efficient")),
        traffic=2.0 * 2 * k.numel(),
        host=True,
        arguments=functools.partial(ops.explain, "flash_attention", q, k, v),
    )
