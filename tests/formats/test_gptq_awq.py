"""Layers of AutoGPTQ and AutoAWQ checkpoints: tensors built word by word as these packages pack them, read back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cvmk.errors import DataError
from cvmk.formats import awq_weight, gptq_weight, read_awq, read_gptq
from cvmk.nn import Int4Linear

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def numbers(inputs: int, outputs: int, groups: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values [K, N], zeros and scales [groups, N]."""
    generator = torch.Generator().manual_seed(inputs + groups)
    values = torch.randint(0, 16, (inputs, outputs), generator=generator)
    zeros = torch.full((groups, outputs), 8) if symmetric else torch.randint(1, 16, (groups, outputs), generator=generator)
    return values, zeros, (torch.rand(groups, outputs, generator=generator) + 0.1).half()


def word(nibbles: list[int]) -> int:
    """The signed int32 of eight values, the first in the lowest four bits."""
    found = sum(value << 4 * place for place, value in enumerate(nibbles))
    return found - 2**32 if found >= 2**31 else found


def gptq_tensors(values: Tensor, zeros: Tensor, scales: Tensor, index: Tensor | None, version: int) -> dict[str, Tensor]:
    inputs, outputs = values.shape
    less = 1 if version == 1 else 0
    words = [[word(values[8 * row : 8 * row + 8, n].tolist()) for n in range(outputs)] for row in range(inputs // 8)]
    zero_words = [[word([(int(z) - less) % 16 for z in zeros[g, 8 * c : 8 * c + 8]]) for c in range(outputs // 8)] for g in range(len(zeros))]
    found = {"qweight": torch.tensor(words, dtype=torch.int32), "qzeros": torch.tensor(zero_words, dtype=torch.int32), "scales": scales}
    return found if index is None else {**found, "g_idx": index.int()}


def awq_tensors(values: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    def words(table: Tensor) -> Tensor:
        rows = [[word([int(row[8 * c + place]) for place in AWQ_ORDER]) for c in range(table.shape[1] // 8)] for row in table]
        return torch.tensor(rows, dtype=torch.int32)

    return {"qweight": words(values), "qzeros": words(zeros), "scales": scales}


def expected(values: Tensor, zeros: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    """[N, K] in float32, number by number of the formula."""
    return ((values - zeros[index]).float() * scales[index].float()).T


def neighbours(inputs: int, groups: int) -> Tensor:
    return torch.arange(inputs) // (inputs // groups)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["none", "trivial", "mixed"])
@pytest.mark.parametrize(("inputs", "groups"), [(64, 2), (128, 1), (512, 2), (192, 1)])
def test_gptq(version: int, symmetric: bool, order: str, inputs: int, groups: int) -> None:
    values, zeros, scales = numbers(inputs, 24, groups, symmetric)
    index = neighbours(inputs, groups)
    if order == "mixed":
        index = index[torch.randperm(inputs, generator=torch.Generator().manual_seed(3))]
    weight = gptq_weight(gptq_tensors(values, zeros, scales, None if order == "none" else index, version), version=version)
    assert torch.equal(weight.dequantize(), expected(values, zeros, scales, index))
    assert (weight.zeros is None) == symmetric and (weight.order is not None) == (order == "mixed" and groups > 1)


def test_gptq_symmetric_zeros_are_sevens() -> None:
    """As published: 0x77777777 in format 1; a zero of 16, packed as 15, is 0 again."""
    values, zeros, scales = numbers(64, 16, 2, True)
    tensors = gptq_tensors(values, zeros, scales, None, 1)
    assert bool((tensors["qzeros"] == 0x77777777).all())
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)
    assert torch.equal(gptq_weight(tensors).dequantize(), expected(values, torch.zeros_like(zeros), scales, neighbours(64, 2)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(symmetric: bool) -> None:
    values, zeros, scales = numbers(128, 24, 2, symmetric)
    weight = awq_weight(awq_tensors(values, zeros, scales))
    assert torch.equal(weight.dequantize(), expected(values, zeros, scales, neighbours(128, 2)))


def test_layers_compute() -> None:
    values, zeros, scales = numbers(128, 24, 2, False)
    x, index = torch.randn(5, 128), neighbours(128, 2)
    layers = [Int4Linear(gptq_weight(gptq_tensors(values, zeros, scales, index, 1))), Int4Linear(awq_weight(awq_tensors(values, zeros, scales)))]
    for layer in layers:
        assert torch.allclose(layer(x), x @ expected(values, zeros, scales, index).T, rtol=1e-4, atol=1e-3)
    assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize(("change", "message"), [
    ({"qweight": None}, "qweight is missing"), ({"scales": torch.ones(2, 16)}, r"scales is \[2, 16\]|must be \[8, 16\]"),
    ({"qweight": torch.zeros(8, 24)}, "qweight is torch.float32"), ({"scales": torch.ones(2, 24, dtype=torch.int32)}, "must be floating"),
    ({"scales": torch.ones(3, 24).half()}, "do not fit"), ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "exactly 32"),
    ({"scales": torch.ones(4, 24).half(), "qzeros": torch.zeros(4, 3, dtype=torch.int32)}, "groups of 16 inputs"),
    ({"scales": torch.full((2, 24), float("inf")).half()}, "infinity"),
])  # fmt: skip
def test_tensors_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    tensors = gptq_tensors(*numbers(64, 24, 2, False), None, 1)
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    with pytest.raises(ValueError, match=message):
        gptq_weight(tensors)


def test_checkpoints(tmp_path: Path) -> None:
    values, zeros, scales = numbers(64, 16, 2, False)
    bias = torch.randn(16).half()
    for version, name in ((1, "gptq"), (2, "gptq_v2")):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {f"model.layers.0.up.{part}": tensor for part, tensor in gptq_tensors(values, zeros, scales, None, version).items()}
        save_file({**tensors, "model.layers.0.up.bias": bias, "model.norm.weight": torch.ones(3)}, folder / "model.safetensors")
        (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "checkpoint_format": name, "quant_method": "gptq"}))
        for path in (folder, folder / "model.safetensors"):
            layers = read_gptq(path)
            assert set(layers) == {"model.layers.0.up"} and isinstance(layers["model.layers.0.up"], Int4Linear)
            assert torch.equal(layers["model.layers.0.up"].weight.dequantize(), expected(values, zeros, scales, neighbours(64, 2)))
            assert torch.equal(layers["model.layers.0.up"].bias.detach(), bias)
        with pytest.raises(DataError, match="is of 4 bits by gptq, and 4 bits by awq can be read"):
            read_awq(folder)
    folder = tmp_path / "awq"
    folder.mkdir()
    save_file({f"up.{part}": tensor for part, tensor in awq_tensors(values, zeros, scales).items()}, folder / "a.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4, "quant_method": "awq", "version": "gemm"}}))
    assert torch.equal(read_awq(folder)["up"].weight.dequantize(), expected(values, zeros, scales, neighbours(64, 2)))
    save_file({"up.qweight": torch.zeros(3, 4)}, folder / "a.safetensors")
    with pytest.raises(DataError, match="up is no layer of 4 bits by awq"):
        read_awq(folder)
    save_file({"up.weight": torch.zeros(3, 4)}, folder / "a.safetensors")
    with pytest.raises(DataError, match="has no layer with a qweight"):
        read_awq(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no safetensors file"):
        read_gptq(tmp_path / "empty")
