"""CUDA backends are tested on the GPU where there is one and a library; elsewhere the same kernels, compiled for the CPU, run on CPU tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import cuda_on_cpu
import pytest


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest) -> ModuleType | None:
    """The kernels compiled for the CPU; None where there is a GPU."""
    cache = request.config.cache
    assert cache is not None
    flags = os.environ.get("CVMK_TEST_CUDA_FLAGS", "").split()  # such as -fsanitize=address, in a process that preloads its library
    return cuda_on_cpu.build(cache.mkdir("cuda_on_cpu"), flags) if cuda_on_cpu.DEVICE.type == "cpu" else None


@pytest.fixture(autouse=True)
def cuda_backends(emulated: ModuleType | None) -> Iterator[None]:
    if emulated is None:
        yield
    else:
        with cuda_on_cpu.running(emulated):
            yield
