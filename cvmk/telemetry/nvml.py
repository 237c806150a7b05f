"""The GPUs' gauges by NVIDIA's management library, which comes with the driver; without one there are no GPUs to be read.

https://docs.nvidia.com/deploy/nvml-api/: the functions, and the two structures.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_TEMPERATURE_GPU = 0


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))  # percent of the last moments in which a kernel ran, in which memory was accessed


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Gpus:
    """Those that CUDA_VISIBLE_DEVICES leaves, or all. The library is initialised at the first reading and stays so."""

    def __init__(self, library: str = _LIBRARY) -> None:
        self._name = library
        self._library: Any = None
        self._devices: list[tuple[int, ctypes.c_void_p, str]] | None = None

    def read(self) -> list[dict[str, Any]]:
        """Of each: index, name, use (0 to 1), memory and memory_total (bytes), watts, celsius; None for what it does not tell. Empty without a driver."""
        if self._devices is None:
            self._devices = list(self._open())
        return [self._gauges(index, device, name) for index, device, name in self._devices]

    def _open(self) -> Iterator[tuple[int, ctypes.c_void_p, str]]:
        try:
            self._library = ctypes.CDLL(self._name)
        except OSError:
            return
        if self._library.nvmlInit_v2() != 0:
            return
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [str(index) for index in range(count.value)] if visible is None else [name.strip() for name in visible.split(",")]
        for index, name in enumerate(names):
            device = ctypes.c_void_p()
            if name.isdigit():
                found = self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(int(name)), ctypes.byref(device))
            else:
                found = self._call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(name.encode()), ctypes.byref(device))
            if not found:
                return  # as CUDA: a name that is none hides those behind it
            text = ctypes.create_string_buffer(96)
            self._call("nvmlDeviceGetName", device, text, ctypes.c_uint(96))
            yield index, device, text.value.decode("utf-8", "replace")

    def _gauges(self, index: int, device: ctypes.c_void_p, name: str) -> dict[str, Any]:
        use, memory, watts, celsius = _Utilization(), _Memory(), ctypes.c_uint(), ctypes.c_uint()
        has_use = self._call("nvmlDeviceGetUtilizationRates", device, ctypes.byref(use))
        has_memory = self._call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
        has_watts = self._call("nvmlDeviceGetPowerUsage", device, ctypes.byref(watts))
        has_celsius = self._call("nvmlDeviceGetTemperature", device, ctypes.c_uint(_TEMPERATURE_GPU), ctypes.byref(celsius))
        return {
            "index": index,
            "name": name,
            "use": use.gpu / 100 if has_use else None,
            "memory": memory.used if has_memory else None,
            "memory_total": memory.total if has_memory else None,
            "watts": watts.value / 1000 if has_watts else None,
            "celsius": celsius.value if has_celsius else None,
        }

    def _call(self, function: str, *arguments: Any) -> bool:
        """Whether it succeeded; an older driver may not have it."""
        try:
            return int(getattr(self._library, function)(*arguments)) == 0
        except AttributeError:
            return False
