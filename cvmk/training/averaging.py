"""Checkpoint averaging (Vaswani et al. 2017 §6.1): the mean of the weights at the last validations."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from cvmk.files import explained, write_bytes
from cvmk.formats import read_weights
from cvmk.nn import CVMTransformer


class WeightHistory:
    """The weights at the last `size` validations, each in a file of its own. Raises DataError where one cannot be written or read."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size

    def add(self, step: int, model: CVMTransformer) -> None:
        if self._size < 2:
            return
        write_bytes(self._path(step), safetensors.torch.save(model.state_dict()))
        for old in self.steps()[: -self._size]:
            self._remove(old)

    def steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(path.stem.removeprefix("step-")) for path in self._folder.glob("step-*.safetensors"))

    def drop_after(self, step: int) -> None:
        for later in self.steps():
            if later > step:
                self._remove(later)

    def mean(self) -> dict[str, torch.Tensor] | None:
        """The mean weights, summed in float64; None where there are fewer than two."""
        steps = self.steps()
        if len(steps) < 2:
            return None
        total: dict[str, torch.Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for step in steps:
            for name, tensor in read_weights(self._path(step), remedy="remove it: the average is then one of fewer weights").items():
                dtypes[name] = tensor.dtype
                total[name] = total[name] + tensor.double() if name in total else tensor.double()
        return {name: (tensor / len(steps)).to(dtypes[name]) for name, tensor in total.items()}

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}.safetensors"

    def _remove(self, step: int) -> None:
        with explained(self._path(step), "remove"):
            self._path(step).unlink(missing_ok=True)
