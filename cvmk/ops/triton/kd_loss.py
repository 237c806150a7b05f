"""`kd_loss` in Triton: two launches forward (rows, then their sum), one backward.

The forward pass saves five statistics a row and reads both logits; the backward pass reads both again and writes the gradient. In place of
the student's logits the first launch writes the gradient too, and the backward pass touches it only where the incoming one is not 1.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import triton
from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import not_needed
from cvmk.ops.kd_loss import NUMBERS, Call, Loss, Losses, Out, ScaleCall, heat, matrix, op, vector
from cvmk.ops.triton._launch import Case, kernels, launch, sample
from cvmk.ops.triton._tuning import Config, Tuned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Upstream = tuple[Tensor | None, ...]
"""The gradients of the loss and of its parts, scalars or None."""


# -- block sizes --------------------------------------------------------------------------------------------------------------
def _rows_config(key: str, capability: tuple[int, int]) -> Config:
    """One sweep: nine programs of four warps on a multiprocessor have 72 KB on their way. Where a row is read again: one or two programs
    of sixteen warps, so that the rows in flight (32000 entries of both sides in bfloat16: 34 MB) are found in the L2 cache. The kernel of
    three sweeps has no registers for more than eight entries a thread."""
    width, sweeps = int(key.rpartition("v")[2]), int(key.split()[1])
    if width >= 8192 and sweeps > 1:
        return {"PER_THREAD": 16 if sweeps == 2 else 8, "num_warps": 16, "num_stages": 1}
    return {"PER_THREAD": 16, "num_warps": 4 if width >= 2048 else 2 if width >= 1024 else 1, "num_stages": 1}


def _rows_candidates(key: str, capability: tuple[int, int]) -> list[Config]:
    return [{"PER_THREAD": n, "num_warps": w, "num_stages": 1} for n in (8, 16, 32) for w in (2, 4, 8, 16)]


def _gradient_config(key: str, capability: tuple[int, int]) -> Config:
    width = int(key.rpartition("v")[2])
    return {"BLOCK": min(width, 2048), "num_warps": 4, "num_stages": 1}


def _gradient_candidates(key: str, capability: tuple[int, int]) -> list[Config]:
    return [{"BLOCK": b, "num_warps": w, "num_stages": 1} for b in (1024, 2048, 4096, 8192) for w in (2, 4, 8) if 8 <= b // (32 * w) <= 32]


ROWS = Tuned("kd_rows", _rows_config, _rows_candidates)
GRADIENT = Tuned("kd_gradient", _gradient_config, _gradient_candidates)
TUNED = (ROWS, GRADIENT)


@functools.cache
def key(dtype: torch.dtype, vocabulary: int, sweeps: int) -> str:
    """Tables are by the dtype, by how often a row is read, and by the next power of two of its length, up to 8192."""
    return f"{str(dtype).removeprefix('torch.')} {sweeps} v{min(8192, max(32, 1 << (vocabulary - 1).bit_length()))}"


# -- launches -------------------------------------------------------------------------------------------------------------------
def weight_of_p(divergence: str, mixture: float) -> float:
    """What the teacher's distribution has in the mixture m."""
    return 1.0 - mixture if divergence == "skew_reverse_kl" else mixture


def _tile(tensors: tuple[Tensor | None, ...], config: Config) -> dict[str, int]:
    """The tile [R, C] of `kd_rows`, in which a thread has PER_THREAD entries: R times VEC, as the compiler lays tiles out for these tensors.

    VEC entries of the narrowest dtype are 16 bytes where all rows begin on such borders, else one entry.
    """
    narrowest, aligned = 16, True
    for x in tensors:
        if x is not None:
            narrowest = min(narrowest, x.element_size())
            aligned = aligned and x.data_ptr() % 16 == 0 and (x.dim() == 1 or x.stride(0) % 16 == 0)
    entries, warps = config["PER_THREAD"], config["num_warps"]
    vec = min(16 // narrowest, entries) if aligned else 1
    return {"R": entries // vec, "C": 32 * warps * vec, "VEC": vec, "num_warps": warps, "num_stages": config["num_stages"]}


def parts(upstream: Upstream | None, alpha: float, has_teacher: bool) -> dict[str, bool]:
    """Which parts the gradient has; a part of weight 0 is left out, for it may be infinite. Without `upstream` the loss's gradient is 1."""
    g_loss, g_kd, g_ce = (True, None, None) if upstream is None else upstream
    return {
        "KD": has_teacher and ((g_loss is not None and alpha != 0) or g_kd is not None),
        "CE": (g_loss is not None and alpha != 1) or g_ce is not None,
    }


def launch_rows(
    z: Tensor,
    t: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    y: Tensor,
    stats: Tensor,
    losses: Tensor,
    c: Loss,
    gradient: Tensor | None = None,
    upstream: Upstream | None = None,
    count: Tensor | None = None,
) -> None:
    """Statistics [5, n] and losses [2, n] of the rows z, t [n, V] with targets y [n], and their gradient where a tensor for it is given."""
    mixed = t is not None and NUMBERS[c.divergence] >= NUMBERS["js"]
    launch(
        kernels("kd_loss").kd_rows,
        (z.shape[0],),
        z,
        t,
        *biases,
        y,
        stats,
        losses,
        gradient,
        *((None, None, None) if upstream is None else upstream),
        count,
        z.shape[1],
        z.stride(0),
        0 if t is None else t.stride(0),
        0 if gradient is None else gradient.stride(0),
        stats.stride(0),
        c.ignore_index,
        c.temperature,
        c.alpha,
        weight_of_p(c.divergence, c.mixture),
        c.label_smoothing,
        DIVERGENCE=NUMBERS[c.divergence] if t is not None else 0,
        TEACHER=t is not None,
        **parts(upstream, c.alpha, t is not None),
        GRADIENT=gradient is not None,
        AT_ONE=c.temperature == 1,
        SQUARE=c.temperature == 2,
        SMOOTHING=c.label_smoothing != 0,
        **_tile((z, t, *biases, gradient), ROWS.config(key(z.dtype, z.shape[1], 1 + mixed + (gradient is not None)), z.device)),
    )


def launch_total(losses: Tensor, y: Tensor, normalizer: Tensor | None, c: Loss) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, its two parts and the normaliser from the rows' losses [2, N]."""
    loss, kd, ce, count = (losses.new_empty(()) for _ in range(4))
    launch(
        kernels("kd_loss").kd_total,
        (1,),
        losses,
        y,
        normalizer,
        loss,
        kd,
        ce,
        count,
        y.shape[0],
        losses.stride(0),
        c.ignore_index,
        c.temperature,
        c.alpha,
        PART=int(c.alpha) if c.alpha in (0, 1) else 2,
        BLOCK=1024,
        num_warps=8,
    )
    return loss, kd, ce, count


def forward(c: Call) -> Out:
    z, t = matrix(c.student), None if c.teacher is None else matrix(c.teacher)
    y = vector(c.target)
    stats, losses = (z.new_empty((n, y.shape[0]), dtype=torch.float32) for n in (5, 2))
    launch_rows(z, t, (None, None), y, stats, losses, c)
    return Out(*launch_total(losses, y, c.normalizer, c), stats)


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> Tensor | None:
    if not needs.student:
        return None
    present = parts(grads[:3], c.alpha, c.teacher is not None)
    z, t = matrix(c.student), matrix(c.teacher) if c.teacher is not None and present["KD"] else None
    y, stats = vector(c.target), saved.stats.contiguous()
    gradient = c.student.new_empty(c.student.shape)
    config = GRADIENT.config(key(z.dtype, z.shape[1], 1), z.device)
    blocks = -(-z.shape[1] // config["BLOCK"])
    launch(
        kernels("kd_loss").kd_gradient,
        (z.shape[0] * blocks,),
        z,
        t,
        y,
        stats,
        gradient,
        *grads[:3],
        saved.divisor,
        blocks,
        z.shape[1],
        z.stride(0),
        0 if t is None else t.stride(0),
        stats.stride(0),
        c.ignore_index,
        c.temperature,
        c.alpha,
        weight_of_p(c.divergence, c.mixture),
        c.label_smoothing,
        DIVERGENCE=NUMBERS[c.divergence] if t is not None else 0,
        **present,
        AT_ONE=c.temperature == 1,
        SMOOTHING=c.label_smoothing != 0,
        **config,
    )
    return gradient


def in_place(c: Call) -> Losses:
    z, t, y = matrix(c.student), None if c.teacher is None else matrix(c.teacher), vector(c.target)
    count = c.normalizer
    if count is None:
        count = (y != c.ignore_index).sum().clamp_(min=1).to(torch.float32)
    stats, losses = (z.new_empty((n, y.shape[0]), dtype=torch.float32) for n in (5, 2))
    launch_rows(z, t, (None, None), y, stats, losses, c, gradient=z, count=count)
    return Losses(*launch_total(losses, y, count, c)[:3])


def scale(c: ScaleCall) -> Tensor:
    """Multiply the gradient in place of the student's logits with the incoming one, without touching it where that is 1."""
    gradient = matrix(c.gradient)
    config = GRADIENT.config(key(gradient.dtype, gradient.shape[1], 1), gradient.device)
    blocks = -(-gradient.shape[1] // config["BLOCK"])
    launch(kernels("kd_loss").kd_scale, (gradient.shape[0] * blocks,), gradient, c.factor, blocks, gradient.shape[1], gradient.stride(0), **config)
    return not_needed(gradient)


def loss_reasons(c: Loss, name: str) -> list[str]:
    """Why the kernels do not take a call, whose tensor `name` is the teacher's."""
    teacher = getattr(c, name)
    wrong = teacher is not None and teacher.dtype not in DTYPES
    return heat(c) + ([f"{name} is {teacher.dtype}, not float32, bfloat16 or float16"] if wrong else [])


_COMMON: dict[str, Any] = {"dtypes": DTYPES, "devices": triton.DEVICES, "unavailable": triton.reason, "by_default": triton.by_default}
BACKENDS = (
    Backend("kd_loss", "triton", forward, backward, limits=lambda which, c: loss_reasons(c, "teacher"), **_COMMON),
    Backend("kd_loss_in_place", "triton", in_place, limits=lambda which, c: loss_reasons(c, "teacher"), **_COMMON),
    Backend("kd_loss_scale", "triton", scale, **_COMMON),
)


# -- what the compile gate and `cvmk bench --tune` run --------------------------------------------------------------------------------
def _case(dtype: torch.dtype, vocabulary: int, temperature: float, divergence: str, smoothing: float, teacher: bool = True) -> Case:
    def run(device: torch.device) -> Tensor | None:
        rows = 8192 * 32000 // max(vocabulary, 32000)
        z = sample((rows, vocabulary), dtype, device, 3.0)
        t = sample((rows, vocabulary), dtype, device, 3.0) if teacher else None
        y = torch.zeros(rows, dtype=torch.int64, device=device)
        c = Call(z, t, y, None, temperature, 0.5 if teacher else 0.0, divergence, 0.5, smoothing, -100)
        out = forward(c)
        return backward(Out(out.loss, None, None, None, None), c, out, op.needs(True))  # type: ignore[arg-type]

    name = f"{str(dtype).removeprefix('torch.')} V{vocabulary} {divergence if teacher else 'no teacher'} T{temperature:g}"
    return Case(name + (" smoothed" if smoothing else ""), run)


def _in_place(device: torch.device) -> None:
    z, t = (sample((8192, 32000), torch.bfloat16, device, 3.0) for _ in range(2))
    y = torch.zeros(8192, dtype=torch.int64, device=device)
    scale(ScaleCall(z, in_place(Call(z, t, y, None, 2.0, 0.5, "forward_kl", 0.0, 0.0, -100)).loss))


CASES = (
    _case(torch.bfloat16, 32000, 2.0, "forward_kl", 0.0),
    _case(torch.bfloat16, 128256, 1.0, "forward_kl", 0.1),
    _case(torch.bfloat16, 50257, 3.0, "forward_kl", 0.0),
    _case(torch.bfloat16, 1000, 1.0, "forward_kl", 0.0),
    _case(torch.bfloat16, 32000, 2.0, "reverse_kl", 0.0),
    _case(torch.bfloat16, 32000, 1.0, "js", 0.0),
    _case(torch.bfloat16, 32000, 2.0, "skew_reverse_kl", 0.0),
    _case(torch.float32, 32000, 2.0, "forward_kl", 0.0),
    _case(torch.float16, 32000, 2.0, "skew_kl", 0.0),
    _case(torch.bfloat16, 32000, 1.0, "forward_kl", 0.1, teacher=False),
    Case("bfloat16 V32000 forward_kl T2 gradient over the logits", _in_place),
)
