"""What a layer remembers between calls: named tensors, rows first, and how many positions each row has taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cvmk.nn.positions import Span

GROWS = -1
"""Stands in a shape for the axis that counts positions."""


class StateTensor(NamedTuple):
    """One tensor of a state: the shape of its rows, with GROWS for the axis of positions (at most one), and its dtype.

    A tensor without such an axis begins as zeros. Of one that grows only what was written is ever read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def axis(self) -> int | None:
        """The axis of positions in the whole tensor, whose first axis is the rows; None for a tensor of fixed size."""
        return self.shape.index(GROWS) + 1 if GROWS in self.shape else None

    def sized(self, positions: int) -> tuple[int, ...]:
        """The shape of a row with room for so many positions."""
        return tuple(positions if size == GROWS else size for size in self.shape)


StateLayout = Mapping[str, StateTensor]
"""The tensors of a state by name."""


def row_nbytes(layout: StateLayout, positions: int) -> int:
    """Bytes of one row of a state with room for so many positions."""
    return sum(math.prod(entry.sized(positions)) * entry.dtype.itemsize for entry in layout.values())


class MixerState:
    """What one mixer remembers of N rows; `state[name]` is the tensor [N, ...] that the layout calls so.

    Tensors are written in place, by `append` where they grow and by copy_ where they do not, so that each is always the
    state's own memory. The number of positions is the affair of whoever holds the state, and is given to its methods.
    """

    def __init__(self, layout: StateLayout, rows: int, max_length: int, device: torch.device) -> None:
        self.layout, self.rows, self.max_length, self.device = layout, rows, max_length, device
        self._axes = {name: entry.axis for name, entry in layout.items()}
        self._tensors = {name: self._empty(entry) for name, entry in layout.items()}

    def _empty(self, entry: StateTensor) -> Tensor:
        shape = (self.rows, *entry.sized(self.max_length))
        return torch.zeros(shape, dtype=entry.dtype, device=self.device) if entry.axis is None else torch.empty(shape, dtype=entry.dtype, device=self.device)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, with the room that is not filled yet."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def append(self, name: str, new: Tensor, span: Span) -> Tensor:
        """Write `new` [N, ...], T positions along the tensor's axis of them, where `span` stands -> the tensor up to span.end, a view.

        Whether padding is written is open; it is never written over what is real.
        """
        tensor, axis = self._tensors[name], self._axes[name]
        assert axis is not None
        if isinstance(span.start, int):
            tensor.narrow(axis, span.start, span.count).copy_(new)
        else:
            _scatter(tensor.movedim(axis, 1), new.movedim(axis, 1).to(tensor.dtype), span.start, span)
        return tensor.narrow(axis, 0, span.end)

    def _part(self, name: str, length: int) -> Tensor:
        tensor, axis = self._tensors[name], self._axes[name]
        return tensor if axis is None else tensor.narrow(axis, 0, length)

    def filled(self, length: int) -> dict[str, Tensor]:
        """The tensors by name, those that grow up to `length` positions; views."""
        return {name: self._part(name, length) for name in self._tensors}

    def reorder(self, rows: Tensor, length: int) -> None:
        """Row i becomes what row rows[i] was (int64 [N]). `length` positions are filled."""
        for tensor in self.filled(length).values():
            tensor.copy_(tensor.index_select(0, rows))

    def select(self, rows: Tensor, length: int) -> None:
        """Keep these rows (int64, in this order, as often as they are named) and free the memory of the others. `length` positions are filled."""
        self.rows = rows.shape[0]
        for name, tensor in self.filled(length).items():
            self._tensors[name] = self._empty(self.layout[name])
            self._part(name, length).copy_(tensor.index_select(0, rows))

    def copy(self, length: int) -> MixerState:
        """The same state in memory of its own. `length` positions are filled."""
        twin = MixerState(self.layout, self.rows, self.max_length, self.device)
        twin.fill(self.filled(length), length)
        return twin

    def fill(self, tensors: Mapping[str, Tensor], length: int, first_row: int = 0) -> None:
        """Copy tensors of other rows, as their `filled(length)` gives them, into the rows from first_row on."""
        for name, tensor in tensors.items():
            self._part(name, length)[first_row : first_row + tensor.shape[0]].copy_(tensor)

    def saved(self, lengths: RowLengths) -> dict[str, Tensor]:
        """Copies of what is filled, with zeros where a row is shorter than the longest: nothing of other times and rows is in them."""
        found = {}
        for name, tensor in self.filled(lengths.longest).items():
            found[name], axis, start = tensor.clone(memory_format=torch.contiguous_format), self._axes[name], lengths.start
            if axis is not None and isinstance(start, Tensor):
                found[name].movedim(axis, 1)[torch.arange(lengths.longest, device=self.device) >= start[:, None]] = 0
        return found


def _scatter(target: Tensor, new: Tensor, start: Tensor, span: Span) -> None:
    """target[n, start[n] + t] = new[n, t] wherever position t of row n is real. target [N, L, ...], new [N, T, ...]."""
    real = span.real(target.device)
    if real is None:
        target[torch.arange(target.shape[0], device=target.device)[:, None], span.indices()] = new
    else:
        rows, columns = real.nonzero(as_tuple=True)
        target[rows, start[rows] + columns] = new[rows, columns]


class RowLengths:
    """How many positions each of N rows has taken: one number while all rows agree, so that nothing is read from the device then.

    start    that number, else int64 [N].
    longest  a number that no row exceeds, and that a row reached unless rows left since.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.start: int | Tensor = 0
        self.longest = 0

    @classmethod
    def of(cls, lengths: Tensor) -> RowLengths:
        """From one number a row, int64 [N]."""
        made = cls(lengths.shape[0], lengths.device)
        made._set(lengths.clone())
        return made

    def settle(self) -> None:
        """Make `longest` exact, and `start` one number where rows agree again."""
        if isinstance(self.start, Tensor):
            self._set(self.start)

    def _set(self, lengths: Tensor) -> None:
        self.rows = lengths.shape[0]
        least, self.longest = (int(x) for x in lengths.aminmax()) if self.rows else (0, 0)
        self.start = self.longest if least == self.longest else lengths

    def tensor(self) -> Tensor:
        """One number a row, int64 [N]."""
        return torch.full((self.rows,), self.start, device=self.device) if isinstance(self.start, int) else self.start

    def span(self, count: int, lengths: Tensor | None, room: int) -> Span:
        """Where the next `count` positions stand, of which the first lengths [N] (None: all) are real, in a state with so much room.

        Raises ValueError for lengths that do not fit and where there is no room.
        """
        if lengths is None:
            if self.longest + count > room:
                self.settle()
            self._check_room(self.longest + count, room)
            return Span(self.start, count, self.longest + count)
        if lengths.shape != (self.rows,) or (self.rows and not 0 <= int(lengths.min()) <= int(lengths.max()) <= count):
            raise ValueError(f"lengths must be {self.rows} numbers from 0 to {count}, one a row, and are {lengths.tolist()}")
        self._check_room(int((self.tensor() + lengths).max()) if self.rows else 0, room)
        fits = self.longest + count <= room
        return Span(self.start if fits else self.tensor(), count, self.longest + count if fits else room, lengths)

    def _check_room(self, end: int, room: int) -> None:
        if end > room:
            raise ValueError(f"the state has room for {room} tokens and this would be token {end}: start with a larger max_length")

    def advance(self, span: Span) -> None:
        """The rows have taken the real positions of `span`."""
        if span.lengths is not None:
            self._set(self.tensor() + span.lengths)
        else:
            self.start = self.start + span.count
            self.longest += span.count

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        if isinstance(self.start, Tensor):
            self.start = self.start.index_select(0, rows)

    def select(self, rows: Tensor) -> None:
        """Keep these rows."""
        self.rows = rows.shape[0]
        if isinstance(self.start, Tensor):
            self._set(self.start.index_select(0, rows))

    def copy(self) -> RowLengths:
        """The same lengths, on their own. (Tensors of lengths are never written in place.)"""
        twin = RowLengths(self.rows, self.device)
        twin.start, twin.longest = self.start, self.longest
        return twin
