"""What incremental decoding keeps: the encoded sentences, and the decoder's state of their hypotheses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cvmk.nn.mixers import MixerState


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


class DecoderState:
    """The state of N = sentences * copies hypotheses; those of sentence b are the rows b * copies ... (b + 1) * copies - 1.

    All rows have read the same number of tokens, `position`; room is for max_length of them.
    """

    def __init__(self, memory: Memory, mixers: list[MixerState], max_length: int, copies: int) -> None:
        self.memory = memory
        self.mixers = mixers
        self.max_length = max_length
        self.copies = copies
        self.position = 0

    @property
    def rows(self) -> int:
        return self.memory.lengths.shape[0] * self.copies

    def reorder(self, rows: Tensor) -> None:
        """Hypothesis i goes on from hypothesis rows[i] (int64 [N]), which must belong to the same sentence."""
        for state in self.mixers:
            state.reorder(rows, self.position)

    def select(self, sentences: Tensor) -> None:
        """Keep only these sentences (int64, in this order) with all their hypotheses; the others' memory is freed."""
        self.memory = self.memory.select(sentences)
        rows = sentences
        if self.copies > 1:
            offsets = sentences.new_tensor(range(self.copies))
            rows = (sentences[:, None] * self.copies + offsets).flatten()
        for state in self.mixers:
            state.select(rows, self.position)
