"""States as a flat dict of tensors, and the checks when one comes back: which model it is of, and that every tensor fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvmk.config.schema import ModelConfig
from cvmk.errors import DataError
from cvmk.nn.state import GROWS, StateTensor

HEADER = "header"
FORMAT = 1


def header(kind: str, architecture: Mapping[str, Any]) -> Tensor:
    """What is saved, and of which model: JSON as uint8."""
    return torch.tensor(list(json.dumps({"format": FORMAT, "kind": kind, "model": dict(architecture)}).encode()), dtype=torch.uint8)


def check_header(tensors: Mapping[str, Tensor], kind: str, architecture: Mapping[str, Any]) -> None:
    """DataError unless the tensors are a saved state of this kind, of a model of this architecture."""
    try:
        found = json.loads(bytes(tensors[HEADER].tolist()))
        of, saved = (found["format"], found["kind"]), dict(found["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("the tensors are no saved state of a cvmk model: give what save() returned, all of it") from error
    if of != (FORMAT, kind):
        raise DataError(f"the saved state is of kind {of[1]!r}, format {of[0]!r}, and what is restored here is {kind!r}, format {FORMAT}: restore what fits")
    for key in sorted(saved.keys() | architecture.keys()):
        theirs, ours = (which.get(key, _default(key)) for which in (saved, architecture))
        if theirs != ours:
            raise DataError(f"the state was saved by a model with {key} = {theirs!r} and this one has {ours!r}: restore it into the model that saved it")


def _default(key: str) -> Any:
    field = ModelConfig.model_fields.get(key)
    return None if field is None else field.get_default(call_default_factory=True)


class Reader:
    """Takes tensors out of a saved state one by one, each with its check, and copies them to a device."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._left, self._device = {name: tensor for name, tensor in tensors.items() if name != HEADER}, device

    def number(self, name: str) -> int:
        """A tensor that holds one integer."""
        return int(self.tensor(name, (), torch.int64))

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        """The tensor of that shape (GROWS: any size) and dtype (None: any floating). Raises DataError where it is missing or another."""
        if name not in self._left:
            raise DataError(f"the saved state lacks the tensor {name}: give what save() returned, all of it")
        found = self._left.pop(name)
        fits = found.dim() == len(shape) and all(want in (GROWS, size) for want, size in zip(shape, found.shape, strict=True))
        if not fits or not (found.is_floating_point() if dtype is None else found.dtype == dtype):
            wanted = ", ".join("any" if size == GROWS else str(size) for size in shape)
            have, want = f"{found.dtype} {list(found.shape)}", f"{dtype or 'floating'} [{wanted}]"
            raise DataError(f"the saved state has {name} as {have} where this model has {want}: restore it where it fits")
        return found.to(self._device, copy=True).contiguous()

    def rows(self, prefix: str, layout: Mapping[str, StateTensor], rows: int, positions: int) -> dict[str, Tensor]:
        """The tensors of a layout, so many rows with so many positions."""
        return {name: self.tensor(prefix + name, (rows, *entry.sized(positions)), entry.dtype) for name, entry in layout.items()}

    def finish(self) -> None:
        """DataError where a tensor is left over."""
        if self._left:
            raise DataError(f"the saved state has the unknown tensor {sorted(self._left)[0]}: restore it into the model that saved it")
