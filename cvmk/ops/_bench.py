"""How long every backend of an op takes here: typical calls, each timed on every backend that takes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from cvmk import ops


@dataclass(frozen=True)
class Row:
    """Median seconds of one call on one backend; `reasons` instead where the backend does not take the call."""

    op: str
    case: str
    backend: str
    seconds: float | None
    reasons: tuple[str, ...] = ()


def rows(names: list[str], device: torch.device, seconds: float) -> Iterator[Row]:
    """The rows of the ops in `names`, in the order of `CASES`; about `seconds` of measuring each."""
    for op, make in CASES.items():
        if op not in names:
            continue
        case, arguments, options = make(functools.partial(_normal, device))
        call = functools.partial(getattr(ops, op), *arguments, **options)
        for answer in ops.explain(op, *arguments, **options):
            with ops.use(answer.backend):
                reasons = next(row.reasons for row in ops.explain(op, *arguments, **options) if row.backend == answer.backend)
                measured = None if reasons else _median(call, seconds)
            yield Row(op, case, answer.backend, measured, reasons)


def _median(call: Callable[[], Any], seconds: float) -> float:
    """Timer synchronises a GPU by itself, and takes one thread where it is not told another number."""
    with torch.no_grad():
        call()
        return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=seconds).median


Normal = Callable[..., Tensor]
Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def _normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _attention(normal: Normal) -> Call:
    return "causal, batch 8, 8 heads of 64, 512 tokens, bfloat16", tuple(normal(8, 8, 512, 64) for _ in range(3)), {"causal": True}


def _distilled(normal: Normal) -> Call:
    return "batch 32, 4 heads of 32, 32 tokens, bfloat16", tuple(normal(32, 4, 32, 32) for _ in range(5)), {"causal": True}


def _maps(normal: Normal) -> Call:
    return "batch 32, 4 heads of 32, 32 tokens, bfloat16", tuple(normal(32, 4, 32, 32) for _ in range(4)), {}


def _scan(normal: Normal) -> Call:
    single = functools.partial(normal, dtype=torch.float32)
    return (
        "batch 1, 512 channels, 16 states, 512 steps, float32",
        (single(1, 512, 512), single(1, 512, 512), -single(512, 16).exp(), single(1, 16, 512), single(1, 16, 512)),
        {"delta_softplus": True},
    )


def _update(normal: Normal) -> Call:
    single = functools.partial(normal, dtype=torch.float32)
    return (
        "batch 8, 512 channels, 16 states, float32",
        (single(8, 512, 16), single(8, 512), single(8, 512), -single(512, 16).exp(), single(8, 16), single(8, 16)),
        {"dt_softplus": True},
    )


def _conv(normal: Normal) -> Call:
    return "batch 32, 512 channels, 32 steps, width 4, silu, bfloat16", (normal(32, 32, 512).mT, normal(512, 4), normal(512)), {"activation": "silu"}


def _conv_update(normal: Normal) -> Call:
    return "batch 8, 512 channels, width 4, silu, bfloat16", (normal(8, 512, 3), normal(8, 512), normal(512, 4), normal(512)), {"activation": "silu"}


def _adamw(normal: Normal) -> Call:
    param, grad, first, second = (normal(1 << 20).float() for _ in range(4))
    return "1 M parameters, float32", (param, grad, first, second.abs()), {"step": 10, "learning_rate": 1e-6}


def _int8(normal: Normal) -> Call:
    return "64 rows, 512 to 2048, bfloat16", (normal(64, 512), ops.quantize_int8(normal(2048, 512))), {}


def _int4(normal: Normal) -> Call:
    return "64 rows, 512 to 2048, groups of 64, bfloat16", (normal(64, 512), ops.quantize_int4(normal(2048, 512), 64)), {}


def _kd(normal: Normal) -> Call:
    logits = normal(512, 8000)
    return "512 rows of 8000, bfloat16", (logits, normal(512, 8000), torch.arange(512, device=logits.device)), {"temperature": 2.0}


def _linear_kd(normal: Normal) -> Call:
    hidden = normal(512, 128)
    tensors = hidden, normal(8000, 128), normal(512, 256), normal(8000, 256), torch.arange(512, device=hidden.device)
    return "512 rows, 128 and 256 to 8000, bfloat16", tensors, {"temperature": 2.0}


def _residual(normal: Normal) -> Call:
    return "2048 rows of 512, dropout 0.1, bfloat16", (normal(2048, 512), normal(2048, 512), normal(512), normal(512)), {"dropout_p": 0.1}


def _embed(normal: Normal) -> Call:
    weight = normal(8000, 512)
    ids = torch.arange(2048, device=weight.device).mul(7).remainder(8000).view(32, 64)
    return "2048 of 8000 rows of 512, dropout 0.1, bfloat16", (ids, weight, normal(64, 512)), {"scale": 22.6, "dropout_p": 0.1}


CASES: dict[str, Callable[[Normal], Call]] = {
    "adamw": _adamw,
    "flash_attention": _attention,
    "flash_attention_distill": _distilled,
    "attention_kl": _maps,
    "selective_scan": _scan,
    "selective_state_update": _update,
    "causal_conv1d": _conv,
    "causal_conv1d_update": _conv_update,
    "int8_linear": _int8,
    "int4_linear": _int4,
    "kd_loss": _kd,
    "linear_kd_loss": _linear_kd,
    "residual_norm": _residual,
    "embed": _embed,
}
