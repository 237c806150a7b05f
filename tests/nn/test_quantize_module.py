"""The linears of other people's modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cvmk.nn import Int4Linear, Int8Linear, Linear, quantize_module
from cvmk.ops import quantize_int8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), Linear(128, 64)
        self.again = self.down
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed, _ = self.attention(x, x, x)
        return self.again(torch.relu(self.up(x + mixed))) + self.down(torch.relu(self.up(x)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.LayerNorm(64), nn.Linear(64, 10)).eval()


@pytest.mark.parametrize(("scheme", "kind", "limit"), [("w8a8", Int8Linear, 0.03), ("w4a16", Int4Linear, 0.2), ("w4a8", Int4Linear, 0.2)])
def test_linears_are_swapped(model: nn.Module, scheme: Any, kind: type, limit: float) -> None:
    x = torch.randn(2, 5, 64)
    before, names = model(x), [name for name, _ in model.named_modules()]
    assert quantize_module(model, scheme) is model
    assert [name for name, _ in model.named_modules()] == names
    block: Any = model[0]  # type: ignore[index]
    assert type(block.up) is kind and block.down is block.again and type(model[2]) is kind  # type: ignore[index]
    assert isinstance(block.attention.out_proj, nn.Linear), "torch.nn.MultiheadAttention reads the weight of its own kind of linear"
    assert 0 < (model(x) - before).norm() / before.norm() < limit
    again = nn.Sequential(Block(), nn.LayerNorm(64), nn.Linear(64, 10)).eval()
    quantize_module(again, scheme).load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_what_stays_and_what_is_refused(model: nn.Module) -> None:
    quantize_module(model, "w8a8", skip=lambda name, layer: name == "2")
    assert type(model[2]) is nn.Linear and type(model[0].up) is Int8Linear  # type: ignore[index, union-attr]
    assert isinstance(quantize_module(nn.Linear(32, 4), "w4a16", group_size=32), Int4Linear)
    odd = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 4))
    with pytest.raises(ValueError, match="1: quantize_int4: 32 inputs are no multiple of group_size 64.*or let `skip` leave it out"):
        quantize_module(odd, "w4a16")
    assert type(odd[0]) is nn.Linear
    with pytest.raises(ValueError, match="scheme is 'w2a2'"):
        quantize_module(odd, "w2a2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Int4Linear: the weight has 8 bits and not 4"):
        Int4Linear(quantize_int8(torch.randn(4, 32)))
