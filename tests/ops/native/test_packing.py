"""Packed weights of the quantised linears against an arrangement by PyTorch's own operations, byte for byte, and back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cvmk.ops.native import int4_linear, int8_linear
from cvmk.ops.quantize import QuantizedWeight, pack_int4, quantize_int4, quantize_int8, unpack_int4

PANEL = 16


def panels(x: torch.Tensor) -> torch.Tensor:
    """[N, ...] -> [P, 16, ...], filled up with zeros."""
    missing = -x.shape[0] % PANEL
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, missing)).reshape(-1, PANEL, *x.shape[1:])


def int8_oracle(w: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    values = F.pad(w.values, (0, -w.in_features % 64))
    tiles = panels(values).view(-1, PANEL, values.shape[1] // 4, 4).transpose(1, 2).contiguous()
    sums = panels(w.values.sum(1, dtype=torch.int32)[:, None]).flatten() * -128
    return torch.cat((tiles.flatten(), sums.view(torch.int8))), F.pad(w.scales, (0, -w.out_features % PANEL + PANEL))


def int4_oracle(w: QuantizedWeight) -> tuple[torch.Tensor, ...]:
    codes = panels(F.pad(unpack_int4(w.values), (0, -w.in_features % 128)))
    nibbles = codes.view(-1, PANEL, codes.shape[2] // 128, 4, 32).permute(0, 2, 1, 4, 3)  # panel, block, output, word, nibble
    found = [pack_int4(nibbles.reshape(-1, 4)).flatten(), panels(w.scales).transpose(1, 2).contiguous()]
    return (*found, panels(w.zeros).transpose(1, 2).contiguous()) if w.zeros is not None else tuple(found)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 64), (17, 65), (40, 130), (5, 3), (48, 256)])
def test_int8(rows: int, columns: int) -> None:
    w = quantize_int8(torch.randn(rows, columns)).plain()
    packed = int8_linear.pack(w)
    assert all(torch.equal(a, b) for a, b in zip((packed.values, packed.scales), int8_oracle(w), strict=True))
    back = int8_linear.unpack(packed)
    assert torch.equal(back.values, w.values) and torch.equal(back.scales, w.scales) and back.layout == "plain"


@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 32, 32), (16, 128, 128), (17, 160, 32), (40, 192, 64), (48, 256, 32)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4(rows: int, columns: int, group: int, symmetric: bool) -> None:
    order = torch.randperm(columns) if rows == 17 else None
    w = quantize_int4(torch.randn(rows, columns), group, symmetric=symmetric, order=order).plain()
    packed = int4_linear.pack(w)
    found = [x for x in (packed.values, packed.scales, packed.zeros) if x is not None]
    assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(found, int4_oracle(w), strict=True))
    back = int4_linear.unpack(packed)
    for name in ("values", "scales", "zeros", "order"):
        a, b = getattr(back, name), getattr(w, name)
        assert (a is None and b is None) or torch.equal(a, b), name


def test_sizes_are_checked() -> None:
    library = int8_linear._NATIVE
    assert library is not None
    values, scales = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ValueError, match=r"quantize_int8: the packed values has 7 elements, not 1088"):
        library.pack_int8(values, scales, torch.empty(7, dtype=torch.int8), torch.empty(32), 4, 8)
