"""Positions: tables as exact as the dtype allows, rows that stand at different positions, and none at all."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from mixer_models import make_model

from cvmk.config.schema import ModelConfig
from cvmk.nn import CVMTransformer
from cvmk.nn.positions import Positions, Rotary, Sinusoidal, Span

CONFIG = ModelConfig(d_model=12, heads=2, max_length=40, rotary_base=500.0)


def exact(kind: type[Positions]) -> torch.Tensor:
    if kind is Sinusoidal:
        rows = [[(math.cos if i % 2 else math.sin)(p / 10000 ** ((i - i % 2) / 12)) for i in range(12)] for p in range(40)]
        return torch.tensor(rows, dtype=torch.float64)
    return torch.tensor([[[f(p * 500.0 ** (-2 * i / 6)) for i in range(3)] for p in range(40)] for f in (math.cos, math.sin)], dtype=torch.float64)


@pytest.mark.parametrize("kind", [Sinusoidal, Rotary])
def test_the_table_is_exact_in_every_dtype_whatever_the_module_was_before(kind: type[Positions]) -> None:
    positions, want = kind(CONFIG), exact(kind)  # type: ignore[call-arg]
    close = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}

    def check(table: torch.Tensor) -> None:
        torch.testing.assert_close(table.double(), want, atol=close[table.dtype], rtol=0)

    check(positions.table)
    assert positions.table.dtype == torch.float32 and not positions.state_dict()
    for cast in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.float(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        check(cast(positions).table)
    with torch.device("meta"):
        empty = kind(CONFIG)  # type: ignore[call-arg]
    assert empty.table.is_meta
    for twin in (empty.to_empty(device="cpu"), empty.to_empty(device="cpu"), copy.deepcopy(positions), pickle.loads(pickle.dumps(positions)).float()):
        check(twin.table)


def test_a_model_cast_there_and_back_is_the_model() -> None:
    """Weights that bfloat16 holds exactly: only a table that stayed rounded could make a difference."""
    for kind in ("sinusoidal", "rotary"):
        model = make_model(positions=kind, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        src, tgt = torch.randint(4, 23, (2, 9)), torch.randint(4, 23, (2, 9))
        with torch.no_grad():
            before = model(src, tgt)[0]
            assert torch.equal(model.bfloat16().float()(src, tgt)[0], before)


@pytest.mark.parametrize("kind", [Sinusoidal, Rotary])
def test_rows_that_do_not_agree_get_their_own(kind: type[Positions]) -> None:
    positions = kind(CONFIG).double()  # type: ignore[call-arg]
    x, heads = torch.randn(3, 4, 12, dtype=torch.float64), torch.randn(3, 2, 4, 6, dtype=torch.float64)
    starts = [0, 7, 36]
    together, span = positions(x, Span(torch.tensor(starts), 4, 40))
    for row, start in enumerate(starts):
        alone, own = positions(x[row : row + 1], Span(start, 4, start + 4))
        torch.testing.assert_close(together[row], alone[0], atol=0, rtol=0)
        torch.testing.assert_close(span.rotate(heads)[row], own.rotate(heads[row : row + 1])[0], atol=0, rtol=0)
    assert (span.rotate(heads) is heads) == (kind is Sinusoidal) and (together is x) == (kind is Rotary)


def test_a_model_whose_positions_are_told_by_nothing() -> None:
    """Without a table a bidirectional encoder's output moves with its words, and the state dict is the same."""
    model = make_model(positions="none")
    assert type(model.positions) is Positions and [*model.state_dict()] == [*make_model().state_dict()]
    src = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        output, turned = model.encode(src).output, model.encode(src.flip(1)).output
    torch.testing.assert_close(turned, output.flip(1), atol=1e-12, rtol=0)
    assert isinstance(make_model(positions="rotary").positions, Rotary) and isinstance(CVMTransformer(CONFIG, 9).positions, Sinusoidal)
