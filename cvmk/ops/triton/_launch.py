"""How a Triton kernel is launched: the one place that knows the device, the configuration and who records launches."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from cvmk.ops.triton import INTERPRETED


@dataclass(frozen=True)
class Launch:
    """One launch as it would have happened: the kernel, its grid, its run-time arguments in order, its constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass
class Recorder:
    """Launches on a device that is not there: of `capability`, with `multiprocessors`."""

    capability: tuple[int, int]
    multiprocessors: int
    launches: list[Launch] = field(default_factory=list)


_recorder: Recorder | None = None


@functools.cache
def kernels(name: str) -> ModuleType:
    """The module `cvmk.ops.triton.kernels.<name>`, imported when it is first needed."""
    return importlib.import_module(f"cvmk.ops.triton.kernels.{name}")


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any) -> None:
    """Run `kernel` over `grid` with its run-time arguments by position and its `tl.constexpr` arguments by name.

    A grid with a 0 in it launches nothing.
    """
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, tuple(grid), arguments, constants, {"num_warps": num_warps, "num_stages": num_stages}))
        return
    kernel[tuple(grid)](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


@contextlib.contextmanager
def recording(capability: tuple[int, int], multiprocessors: int) -> Iterator[Recorder]:
    """Launch nothing while the block runs, and keep what would have been launched; made for tensors on the device "meta"."""
    global _recorder
    previous, _recorder = _recorder, Recorder(capability, multiprocessors)
    try:
        yield _recorder
    finally:
        _recorder = previous


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that kernels on `device` are compiled for; the interpreter plays an (8, 0)."""
    if _recorder is not None:
        return _recorder.capability
    return (8, 0) if INTERPRETED else _of_device(device.index)[0]


def multiprocessors(device: torch.device) -> int:
    """How many blocks of work fill `device` once; the interpreter plays a device of 4."""
    if _recorder is not None:
        return _recorder.multiprocessors
    return 4 if INTERPRETED else _of_device(device.index)[1]


@functools.cache
def _of_device(index: int | None) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return (properties.major, properties.minor), properties.multi_processor_count


def float32_precision() -> str:
    """How `dot` multiplies float32: in tf32 where PyTorch's own products may, else with three tf32 products that keep float32's accuracy."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@dataclass(frozen=True)
class Case:
    """A call of a backend at a shape that matters: the compile gate records its launches, `cvmk bench --tune` times it.

    `run` gets a device ("meta" in the gate) and calls the backend's own functions, with tensors made by `sample`.
    """

    name: str
    run: Callable[[torch.device], Any]


def sample(shape: Sequence[int], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers on a real device, an empty tensor on "meta"."""
    if device.type == "meta":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return (torch.randn(tuple(shape), device=device) * scale).to(dtype)
