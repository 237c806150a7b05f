"""Named tensors of rows, and how many positions each row has taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cvmk.nn.positions import Span
from cvmk.nn.state import GROWS, MixerState, RowLengths, StateTensor, row_nbytes

CPU = torch.device("cpu")
LAYOUT = {"keys": StateTensor((2, GROWS, 3), torch.float32), "cell": StateTensor((5,), torch.float64), "window": StateTensor((4, 2), torch.bfloat16)}


def filled_state(rows: int, length: int, room: int = 6) -> MixerState:
    state = MixerState(LAYOUT, rows, room, CPU)
    for name in LAYOUT:
        state[name].copy_(torch.randn(state[name].shape))
    state["keys"][:, :, length:] = float("nan")
    return state


def test_tensors_are_as_the_layout_says() -> None:
    state = MixerState(LAYOUT, 3, 6, CPU)
    assert {name: (tuple(state[name].shape), state[name].dtype) for name in LAYOUT} == {
        "keys": ((3, 2, 6, 3), torch.float32),
        "cell": ((3, 5), torch.float64),
        "window": ((3, 4, 2), torch.bfloat16),
    }
    assert not state["cell"].any() and not state["window"].any()
    assert row_nbytes(LAYOUT, 6) == 2 * 6 * 3 * 4 + 5 * 8 + 4 * 2 * 2 and state.nbytes == 3 * row_nbytes(LAYOUT, 6)


def test_rows_move_without_what_is_not_filled() -> None:
    state, rows = filled_state(4, 3), torch.tensor([2, 2, 0, 1])
    before = {name: tensor.clone() for name, tensor in state.filled(3).items()}
    places = {name: state[name].data_ptr() for name in LAYOUT}
    state.reorder(rows, 3)
    for name, tensor in state.filled(3).items():
        assert torch.equal(tensor, before[name][rows])
    assert {name: state[name].data_ptr() for name in LAYOUT} == places
    state.select(torch.tensor([3, 0, 3]), 3)
    for name, tensor in state.filled(3).items():
        assert torch.equal(tensor, before[name][rows][[3, 0, 3]])
    assert state.rows == 3 and state.nbytes == 3 * row_nbytes(LAYOUT, 6)


def test_a_copy_goes_its_own_way() -> None:
    state = filled_state(2, 4)
    twin = state.copy(4)
    for name, tensor in twin.filled(4).items():
        assert torch.equal(tensor, state.filled(4)[name])
        assert tensor.untyped_storage().data_ptr() != state[name].untyped_storage().data_ptr()
    twin["cell"].zero_()
    assert state["cell"].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_writes_where_rows_stand(dtype: torch.dtype) -> None:
    """Rows that agree by one slice, others each at its place; padding never over what is real; what comes in another dtype is cast."""
    state, want = MixerState(LAYOUT, 3, 6, CPU), torch.full((3, 2, 6, 3), float("nan"))

    def put(start: int | Tensor, count: int, end: int, lengths: list[int] | None) -> Tensor:
        new = torch.randn(3, 2, count, 3).to(dtype)
        for row, length in enumerate(lengths or [count] * 3):
            at = start if isinstance(start, int) else int(start[row])
            want[row, :, at : at + length] = new[row, :, :length].float()
        return state.append("keys", new, Span(start, count, end, None if lengths is None else torch.tensor(lengths)))

    assert put(0, 2, 2, None).shape == (3, 2, 2, 3)
    view = put(torch.tensor([2, 0, 1]), 1, 3, None)
    assert view.data_ptr() == state["keys"].data_ptr() and view.shape[2] == 3
    put(torch.tensor([3, 1, 2]), 4, 6, [3, 0, 2])
    for row, length in enumerate((6, 2, 4)):
        assert torch.equal(state["keys"][row, :, :length], want[row, :, :length])


def test_lengths_are_one_number_while_rows_agree() -> None:
    lengths = RowLengths(3, CPU)
    lengths.advance(lengths.span(2, None, 9))
    lengths.advance(lengths.span(2, torch.tensor([1, 1, 1]), 9))
    assert lengths.start == 3 and lengths.longest == 3 and lengths.tensor().tolist() == [3, 3, 3]
    lengths.advance(lengths.span(4, torch.tensor([4, 0, 2]), 9))
    assert isinstance(lengths.start, Tensor) and lengths.start.tolist() == [7, 3, 5] and lengths.longest == 7
    lengths.reorder(torch.tensor([1, 1, 2]))
    assert lengths.tensor().tolist() == [3, 3, 5] and lengths.longest == 7  # what is known without reading the device
    twin = lengths.copy()
    span = lengths.span(4, None, 9)  # the row that was longest is gone, so that there is room
    assert span.end == 9 and lengths.longest == 5
    lengths.advance(span)
    assert lengths.tensor().tolist() == [7, 7, 9] and twin.tensor().tolist() == [3, 3, 5]
    lengths.select(torch.tensor([1, 0]))
    assert lengths.start == 7 and lengths.rows == 2
    with pytest.raises(ValueError, match="room for 9 tokens and this would be token 10"):
        lengths.span(3, None, 9)


def test_a_span_knows_where_it_ends() -> None:
    lengths = RowLengths.of(torch.tensor([1, 5]))
    assert lengths.span(2, torch.tensor([2, 1]), 6).end == 6  # the padding of the second row is beyond the room
    with pytest.raises(ValueError, match="room for 6 tokens and this would be token 7"):
        lengths.span(2, torch.tensor([1, 2]), 6)
    for wrong in ([1], [1, 3], [-1, 1]):
        with pytest.raises(ValueError, match="lengths must be 2 numbers from 0 to 2, one a row"):
            lengths.span(2, torch.tensor(wrong), 6)
    given = torch.tensor([2, 4])
    made = RowLengths.of(given)
    given.zero_()
    assert made.tensor().tolist() == [2, 4]
    assert RowLengths.of(torch.zeros(0, dtype=torch.long)).span(2, None, 2).end == 2


def test_saved_tensors_are_contiguous_copies_without_what_is_not_filled() -> None:
    state = filled_state(2, 3)
    saved = state.saved(RowLengths.of(torch.tensor([3, 1])))
    assert all(tensor.is_contiguous() for tensor in saved.values()) and saved["keys"].shape == (2, 2, 3, 3)
    assert torch.equal(saved["keys"][0], state["keys"][0, :, :3]) and torch.equal(saved["keys"][1, :, :1], state["keys"][1, :, :1])
    assert not saved["keys"][1, :, 1:].any() and torch.equal(saved["cell"], state["cell"])
    state["cell"].zero_()
    assert saved["cell"].all()
