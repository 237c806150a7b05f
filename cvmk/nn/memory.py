"""Encoded sentences: what decoding reads of a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.errors import DataError
from cvmk.nn.saved import Reader
from cvmk.nn.state import GROWS, StateLayout


@dataclass(frozen=True)
class Memory:
    """Encoded sentences: output [B, S, d], lengths [B], and one pair of keys and values [B, Hkv, S, D] a decoder block.

    `padded` is False where all sentences are S long, so that nothing has to be masked.
    """

    output: Tensor
    lengths: Tensor
    cross: list[tuple[Tensor, Tensor]]
    padded: bool = True

    def select(self, sentences: Tensor) -> Memory:
        """Only these sentences, in this order."""
        cross = [(k.index_select(0, sentences), v.index_select(0, sentences)) for k, v in self.cross]
        return Memory(self.output.index_select(0, sentences), self.lengths.index_select(0, sentences), cross, self.padded)

    @staticmethod
    def join(memories: Sequence[Memory]) -> Memory:
        """The sentences of all, one after the other; shorter ones are padded with zeros."""
        longest = max(memory.output.shape[1] for memory in memories)
        padded = any(memory.padded or memory.output.shape[1] < longest for memory in memories)
        cross = [
            (_stack([memory.cross[layer][0] for memory in memories], longest), _stack([memory.cross[layer][1] for memory in memories], longest))
            for layer in range(len(memories[0].cross))
        ]
        return Memory(_stack([memory.output for memory in memories], longest), torch.cat([memory.lengths for memory in memories]), cross, padded)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name."""
        cross = {f"cross.{layer}.{name}": tensor for layer, pair in enumerate(self.cross) for name, tensor in zip(("keys", "values"), pair, strict=True)}
        return {"output": self.output, "lengths": self.lengths, **cross}

    def save(self) -> dict[str, Tensor]:
        """Copies of everything, each under "memory.<name>", with zeros for padding, which may never have been written."""
        saved = {f"memory.{name}": tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors().items()}
        padding = torch.arange(self.output.shape[1], device=self.lengths.device) >= self.lengths[:, None]
        for name, tensor in saved.items():
            if self.padded and name != "memory.lengths":
                tensor.movedim(-2, 1)[padding] = 0
        return {**saved, "memory.padded": torch.tensor(int(self.padded))}

    @staticmethod
    def restore(read: Reader, layout: StateLayout) -> Memory:
        """What `save` gave; `layout` is that of the tensors but for the lengths. Raises DataError where it does not fit.

        Dtypes are those of the saved tensors: under autocast they are not the model's.
        """
        lengths, padded = read.tensor("memory.lengths", (GROWS,), torch.int64), bool(read.number("memory.padded"))
        output = read.tensor("memory.output", (lengths.shape[0], *layout["output"].shape), None)
        longest = output.shape[1]
        if ((lengths < 0) | (lengths > longest) | ((lengths < longest) & (not padded))).any():
            raise DataError(f"the saved state has sentences of {lengths.tolist()} positions where {longest} are kept: the state is damaged")
        found = {name: read.tensor(f"memory.{name}", (len(lengths), *entry.sized(longest)), None) for name, entry in layout.items() if name != "output"}
        cross = [(found[f"cross.{layer}.keys"], found[f"cross.{layer}.values"]) for layer in range(len(found) // 2)]
        return Memory(output, lengths, cross, padded)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def _stack(tensors: Sequence[Tensor], longest: int) -> Tensor:
    """Tensors [B_i, ..., S_i, D] -> [sum of B_i, ..., longest, D], padded with zeros."""
    return torch.cat([F.pad(tensor, (0, 0, 0, longest - tensor.shape[-2])) for tensor in tensors])
