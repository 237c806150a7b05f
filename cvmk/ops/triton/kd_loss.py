"""`kd_loss` in Triton: two launches forward (rows, then their sum), one backward.

The forward pass saves five statistics a row and reads both logits; the backward pass reads both again and writes the gradient. In place of
the student's logits the first launch writes the gradient too, and the backward pass touches it only where the incoming one is not 1.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import triton
from cvmk.ops._dispatch import Backend, not_needed
from cvmk.ops.triton._launch import Case, kernels, launch, sample
from cvmk.ops.triton._tuning import Config, Tuned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "js": 2, "skew_kl": 3, "skew_reverse_kl": 4}
"""The divergences as the kernels number them."""
Options = tuple[float, float, str, float, float, int]
"""temperature, alpha, divergence, mixture, label smoothing, ignore index."""
Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]
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
def matrix(logits: Tensor) -> Tensor:
    """[N, V] with a contiguous last dimension."""
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def vector(target: Tensor) -> Tensor:
    """[N], contiguous."""
    return target if target.dim() == 1 and target.is_contiguous() else target.reshape(-1).contiguous()


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
    options: Options,
    gradient: Tensor | None = None,
    upstream: Upstream | None = None,
    count: Tensor | None = None,
) -> None:
    """Statistics [5, n] and losses [2, n] of the rows z, t [n, V] with targets y [n], and their gradient where a tensor for it is given."""
    temperature, alpha, divergence, mixture, smoothing, ignore_index = options
    mixed = t is not None and DIVERGENCES[divergence] >= DIVERGENCES["js"]
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
        ignore_index,
        temperature,
        alpha,
        weight_of_p(divergence, mixture),
        smoothing,
        DIVERGENCE=DIVERGENCES[divergence] if t is not None else 0,
        TEACHER=t is not None,
        **parts(upstream, alpha, t is not None),
        GRADIENT=gradient is not None,
        AT_ONE=temperature == 1,
        SQUARE=temperature == 2,
        SMOOTHING=smoothing != 0,
        **_tile((z, t, *biases, gradient), ROWS.config(key(z.dtype, z.shape[1], 1 + mixed + (gradient is not None)), z.device)),
    )


def launch_total(losses: Tensor, y: Tensor, normalizer: Tensor | None, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, its two parts and the normaliser from the rows' losses [2, N]."""
    temperature, alpha, ignore_index = options[0], options[1], options[5]
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
        ignore_index,
        temperature,
        alpha,
        PART=int(alpha) if alpha in (0, 1) else 2,
        BLOCK=1024,
        num_warps=8,
    )
    return loss, kd, ce, count


def forward(student: Tensor, teacher: Tensor | None, target: Tensor, normalizer: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    z, t = matrix(student), None if teacher is None else matrix(teacher)
    y = vector(target)
    stats, losses = (z.new_empty((n, y.shape[0]), dtype=torch.float32) for n in (5, 2))
    launch_rows(z, t, (None, None), y, stats, losses, options)
    return *launch_total(losses, y, normalizer, options), stats


def backward(
    g_loss: Tensor | None,
    g_kd: Tensor | None,
    g_ce: Tensor | None,
    g_count: Tensor | None,
    g_stats: Tensor | None,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    normalizer: Tensor | None,
    count: Tensor,
    stats: Tensor,
    temperature: float,
    alpha: float,
    divergence: str,
    mixture: float,
    label_smoothing: float,
    ignore_index: int,
    needs: list[bool],
) -> Tensor:
    if not needs[0]:
        return not_needed(student)
    present = parts((g_loss, g_kd, g_ce), alpha, teacher is not None)
    z, t = matrix(student), matrix(teacher) if teacher is not None and present["KD"] else None
    y, stats = vector(target), stats.contiguous()
    gradient = student.new_empty(student.shape)
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
        g_loss,
        g_kd,
        g_ce,
        count,
        blocks,
        z.shape[1],
        z.stride(0),
        0 if t is None else t.stride(0),
        stats.stride(0),
        ignore_index,
        temperature,
        alpha,
        weight_of_p(divergence, mixture),
        label_smoothing,
        DIVERGENCE=DIVERGENCES[divergence] if t is not None else 0,
        **present,
        AT_ONE=temperature == 1,
        SMOOTHING=label_smoothing != 0,
        **config,
    )
    return gradient


def in_place(student: Tensor, teacher: Tensor | None, target: Tensor, normalizer: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    z, t, y = matrix(student), None if teacher is None else matrix(teacher), vector(target)
    count = normalizer
    if count is None:
        count = (y != options[5]).sum().clamp_(min=1).to(torch.float32)
    stats, losses = (z.new_empty((n, y.shape[0]), dtype=torch.float32) for n in (5, 2))
    launch_rows(z, t, (None, None), y, stats, losses, options, gradient=z, count=count)
    return launch_total(losses, y, count, options)[:3]


def multiply(factor: Tensor, student: Tensor) -> Tensor:
    """Multiply the gradient in place of the student's logits with the incoming one, without touching it where that is 1."""
    gradient = matrix(student)
    config = GRADIENT.config(key(gradient.dtype, gradient.shape[1], 1), gradient.device)
    blocks = -(-gradient.shape[1] // config["BLOCK"])
    launch(kernels("kd_loss").kd_scale, (gradient.shape[0] * blocks,), gradient, factor, blocks, gradient.shape[1], gradient.stride(0), **config)
    return not_needed(student)


def _limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    teacher = arguments.get("teacher")
    return [f"teacher is {teacher.dtype}, not float32, bfloat16 or float16"] if teacher is not None and teacher.dtype not in DTYPES else []


_COMMON: dict[str, Any] = {
    "dtypes": DTYPES,
    "devices": triton.DEVICES,
    "limits": _limits,
    "unavailable": triton.reason,
    "by_default": triton.by_default,
}
BACKENDS = (Backend("kd_loss", "triton", forward, backward, **_COMMON), Backend("kd_loss_in_place", "triton", in_place, multiply, **_COMMON))


# -- what the compile gate and `cvmk bench --tune` run --------------------------------------------------------------------------------
def _case(dtype: torch.dtype, vocabulary: int, temperature: float, divergence: str, smoothing: float, teacher: bool = True) -> Case:
    def run(device: torch.device) -> Tensor:
        rows = 8192 * 32000 // max(vocabulary, 32000)
        z = sample((rows, vocabulary), dtype, device, 3.0)
        t = sample((rows, vocabulary), dtype, device, 3.0) if teacher else None
        y = torch.zeros(rows, dtype=torch.int64, device=device)
        options = (temperature, 0.5 if teacher else 0.0, divergence, 0.5, smoothing, -100)
        loss, _, _, count, stats = forward(z, t, y, None, *options)
        return backward(loss, None, None, None, None, z, t, y, None, count, stats, *options, [True])

    name = f"{str(dtype).removeprefix('torch.')} V{vocabulary} {divergence if teacher else 'no teacher'} T{temperature:g}"
    return Case(name + (" smoothed" if smoothing else ""), run)


def _in_place(device: torch.device) -> None:
    z, t = (sample((8192, 32000), torch.bfloat16, device, 3.0) for _ in range(2))
    y = torch.zeros(8192, dtype=torch.int64, device=device)
    loss = in_place(z, t, y, None, 2.0, 0.5, "forward_kl", 0.0, 0.0, -100)[0]
    multiply(loss, z)


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
