"""What incremental decoding keeps: the decoder's state of its hypotheses, and the encoder's of a source that grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvmk.errors import ConfigError, DataError
from cvmk.nn.memory import Memory
from cvmk.nn.saved import HEADER, Reader, check_header, header
from cvmk.nn.state import GROWS, MixerState, RowLengths, StateLayout, row_nbytes


@dataclass(frozen=True)
class Plan:
    """What a state of one side of a model consists of.

    mixers        the layout of each block's state.
    encoded       that of what the decoder reads of a source: "output", and "cross.<i>.keys" and "cross.<i>.values" of each decoder block.
    limit         positions that the model has.
    architecture  what another model must agree in to go on from a saved state.
    """

    mixers: list[StateLayout]
    encoded: StateLayout
    limit: int
    device: torch.device
    architecture: Mapping[str, Any]

    def nbytes(self, max_length: int) -> int:
        """Bytes of all mixers' states a row."""
        return sum(row_nbytes(layout, max_length) for layout in self.mixers)

    def start(self, rows: int, max_length: int) -> list[MixerState]:
        """The mixers' states of rows that have taken no position yet. Raises ConfigError where there are fewer positions than max_length."""
        if max_length > self.limit:
            raise ConfigError(f"max_length {max_length} is more than model.max_length = {self.limit}: ask for less or train with a larger one")
        return [MixerState(layout, rows, max_length, self.device) for layout in self.mixers]

    def restore(self, read: Reader) -> tuple[list[MixerState], RowLengths, int]:
        """The mixers' states, lengths and room that `_RowsState.tensors` gave."""
        positions, max_length = read.tensor("positions", (GROWS,), torch.int64), read.number("max_length")
        if not 0 <= max_length <= self.limit or ((positions < 0) | (positions > max_length)).any():
            raise DataError(f"the saved state has room for {max_length} positions or rows beyond it, and this model has {self.limit}: the state is damaged")
        lengths = RowLengths.of(positions)
        mixers = self.start(lengths.rows, max_length)
        for layer, state in enumerate(mixers):
            state.fill(read.rows(f"mixers.{layer}.", state.layout, lengths.rows, lengths.longest), lengths.longest)
        return mixers, lengths, max_length


class _RowsState:
    """The mixers' states of N rows, with how many positions each row has taken and how many there is room for."""

    def __init__(self, plan: Plan, mixers: list[MixerState], lengths: RowLengths, max_length: int) -> None:
        self.plan, self.mixers, self.lengths, self.max_length = plan, mixers, lengths, max_length

    @property
    def rows(self) -> int:
        return self.lengths.rows

    @property
    def positions(self) -> Tensor:
        """How many positions each row has taken, int64 [N]."""
        return self.lengths.tensor()

    def _select(self, rows: Tensor) -> None:
        for state in self.mixers:
            state.select(rows, self.lengths.longest)
        self.lengths.select(rows)

    def _saved(self, kind: str) -> dict[str, Tensor]:
        self.lengths.settle()
        mixers = {f"mixers.{layer}.{name}": tensor for layer, state in enumerate(self.mixers) for name, tensor in state.saved(self.lengths).items()}
        return {HEADER: header(kind, self.plan.architecture), "positions": self.positions.clone(), "max_length": torch.tensor(self.max_length), **mixers}


class DecoderState(_RowsState):
    """The state of N = sentences * copies hypotheses; those of sentence b are the rows b * copies ... (b + 1) * copies - 1.

    Room is for max_length tokens a row, BOS included. Make one by `CVMTransformer.start`, or from a saved one by `restore_decoder`.
    """

    def __init__(self, plan: Plan, memory: Memory, mixers: list[MixerState], lengths: RowLengths, max_length: int, copies: int) -> None:
        super().__init__(plan, mixers, lengths, max_length)
        self.memory, self.copies = memory, copies

    @classmethod
    def start(cls, plan: Plan, memory: Memory, max_length: int, copies: int) -> DecoderState:
        """A state of hypotheses without a token."""
        rows = memory.lengths.shape[0] * copies
        return cls(plan, memory, plan.start(rows, max_length), RowLengths(rows, plan.device), max_length, copies)

    @classmethod
    def restore(cls, plan: Plan, tensors: Mapping[str, Tensor]) -> DecoderState:
        """What `save` gave. Raises DataError where it is of another model, incomplete or damaged."""
        check_header(tensors, "decoder", plan.architecture)
        read = Reader(tensors, plan.device)
        mixers, lengths, max_length = plan.restore(read)
        memory, copies = Memory.restore(read, plan.encoded), read.number("copies")
        read.finish()
        if memory.lengths.shape[0] * copies != lengths.rows:
            raise DataError(f"the saved state has {copies} hypotheses of {memory.lengths.shape[0]} sentences in {lengths.rows} rows: the state is damaged")
        return cls(plan, memory, mixers, lengths, max_length, copies)

    @property
    def position(self) -> int:
        """How many tokens each hypothesis has read. Raises ValueError where they have not read equally many; see `positions`."""
        if not isinstance(self.lengths.start, int):
            raise ValueError("the hypotheses have read different numbers of tokens: use positions, which has one a row")
        return self.lengths.start

    @property
    def nbytes(self) -> int:
        """Bytes of the state, the encoded sentences included."""
        return self.memory.nbytes + sum(state.nbytes for state in self.mixers)

    def reorder(self, rows: Tensor) -> None:
        """Hypothesis i goes on from hypothesis rows[i] (int64 [N]), which must belong to the same sentence."""
        for state in self.mixers:
            state.reorder(rows, self.lengths.longest)
        self.lengths.reorder(rows)

    def select(self, sentences: Tensor) -> None:
        """Keep only these sentences (int64, in this order) with all their hypotheses; the others' memory is freed."""
        self.memory = self.memory.select(sentences)
        rows = sentences
        if self.copies > 1:
            offsets = sentences.new_tensor(range(self.copies))
            rows = (sentences[:, None] * self.copies + offsets).flatten()
        self._select(rows)

    def copy(self) -> DecoderState:
        """A state that goes its own way; the encoded sentences, which nobody writes to, are shared."""
        mixers = [state.copy(self.lengths.longest) for state in self.mixers]
        return DecoderState(self.plan, self.memory, mixers, self.lengths.copy(), self.max_length, self.copies)

    @staticmethod
    def join(states: Sequence[DecoderState]) -> DecoderState:
        """The sentences of several states as one, in order, each where it stands. Raises ValueError unless all are of one model and number of copies."""
        first = states[0]
        if any((state.copies, state.plan.architecture) != (first.copies, first.plan.architecture) for state in states):
            raise ValueError("only states of one model with equally many hypotheses a sentence can be joined")
        max_length = max(state.max_length for state in states)
        lengths = RowLengths.of(torch.cat([state.positions for state in states]))
        mixers = []
        for layer, mixer in enumerate(first.mixers):
            joined, row = MixerState(mixer.layout, lengths.rows, max_length, mixer.device), 0
            for state in states:
                joined.fill(state.mixers[layer].filled(state.lengths.longest), state.lengths.longest, row)
                row += state.rows
            mixers.append(joined)
        return DecoderState(first.plan, Memory.join([state.memory for state in states]), mixers, lengths, max_length, first.copies)

    def save(self) -> dict[str, Tensor]:
        """Everything as a flat dict of contiguous tensors (safetensors stores it as it is), independent of what the state does later.

        `CVMTransformer.restore_decoder` goes on from it with the same bits.
        """
        return {**self._saved("decoder"), "copies": torch.tensor(self.copies), **self.memory.save()}


class EncoderState(_RowsState):
    """The state of N sources that grow, of a causal encoder: what its blocks remember, and what the decoder reads of the words so far.

    Room is for max_length tokens a row. Make one by `CVMTransformer.start_source`, or from a saved one by `restore_encoder`.
    """

    def __init__(self, plan: Plan, mixers: list[MixerState], encoded: MixerState, lengths: RowLengths, max_length: int) -> None:
        super().__init__(plan, mixers, lengths, max_length)
        self.encoded = encoded

    @classmethod
    def start(cls, plan: Plan, rows: int, max_length: int) -> EncoderState:
        """A state of sources without a token."""
        return cls(plan, plan.start(rows, max_length), MixerState(plan.encoded, rows, max_length, plan.device), RowLengths(rows, plan.device), max_length)

    @classmethod
    def restore(cls, plan: Plan, tensors: Mapping[str, Tensor]) -> EncoderState:
        """What `save` gave. Raises DataError where it is of another model, incomplete or damaged."""
        check_header(tensors, "encoder", plan.architecture)
        read = Reader(tensors, plan.device)
        mixers, lengths, max_length = plan.restore(read)
        encoded = MixerState(plan.encoded, lengths.rows, max_length, plan.device)
        encoded.fill(read.rows("encoded.", plan.encoded, lengths.rows, lengths.longest), lengths.longest)
        read.finish()
        return cls(plan, mixers, encoded, lengths, max_length)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return self.encoded.nbytes + sum(state.nbytes for state in self.mixers)

    def memory(self) -> Memory:
        """What is encoded so far: views, which stay right when the source grows."""
        filled = self.encoded.filled(self.lengths.longest)
        cross = [(filled[f"cross.{layer}.keys"], filled[f"cross.{layer}.values"]) for layer in range(len(filled) // 2)]  # and the output
        return Memory(filled["output"], self.positions, cross, padded=not isinstance(self.lengths.start, int))

    def select(self, rows: Tensor) -> None:
        """Keep only these sources (int64, in this order, as often as they are named); the others' memory is freed."""
        self.encoded.select(rows, self.lengths.longest)
        self._select(rows)

    def copy(self) -> EncoderState:
        """A state that goes its own way."""
        length = self.lengths.longest
        mixers = [state.copy(length) for state in self.mixers]
        return EncoderState(self.plan, mixers, self.encoded.copy(length), self.lengths.copy(), self.max_length)

    def save(self) -> dict[str, Tensor]:
        """Everything as a flat dict of contiguous tensors, as `DecoderState.save`. `CVMTransformer.restore_encoder` goes on from it."""
        saved = self._saved("encoder")
        return {**saved, **{f"encoded.{name}": tensor for name, tensor in self.encoded.saved(self.lengths).items()}}
