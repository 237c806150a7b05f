"""Layers of AutoGPTQ and GPTQModel checkpoints, 4 bits, as weights of cvmk, bit for bit.

A layer of K inputs and N outputs with groups of g inputs has
    qweight  int32 [K / 8, N]       eight neighbouring inputs a word, the first in the lowest four bits
    qzeros   int32 [K / g, N / 8]   eight neighbouring outputs a word: the zero points, each less 1 (format "gptq"), or as they are ("gptq_v2")
    scales   float16 [K / g, N]
    g_idx    int32 [K]              the group of each input; groups of neighbours where it is missing
and w = scale * (q - zero). https://github.com/AutoGPTQ/AutoGPTQ, auto_gptq/nn_modules/qlinear
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvmk.errors import DataError
from cvmk.files import read_json
from cvmk.formats.torch_weights import read_weights
from cvmk.nn import Int4Linear
from cvmk.ops import QuantizedWeight
from cvmk.ops.quantize import GROUP_SIZES, order_of_groups, pack_int4

CONFIGS = ("quantize_config.json", "config.json")
_NIBBLES = torch.arange(8, dtype=torch.int32) * 4


def gptq_weight(tensors: Mapping[str, Tensor], *, version: int = 1) -> QuantizedWeight:
    """The weight of a layer's tensors; `version` 1 is the format "gptq", 2 "gptq_v2". Raises ValueError for tensors that do not fit together."""
    if version not in (1, 2):
        raise ValueError(f"version is {version}: GPTQ checkpoints have the versions 1 and 2")
    words, zero_words, scales = checked(tensors)
    inputs, outputs, groups = 8 * words.shape[0], words.shape[1], scales.shape[0]
    check_shapes(words, zero_words, scales, (inputs // 8, outputs), groups, outputs, inputs)
    values = (words[:, None] >> _NIBBLES[None, :, None] & 15).reshape(inputs, outputs)
    zeros = unpacked(zero_words)
    if version == 1:
        zeros = zeros + 1 & 15
    index = tensors.get("g_idx")
    order = None
    if index is not None and not torch.equal(index.long(), torch.arange(inputs) // (inputs // groups)):
        order = order_of_groups(index, inputs // groups)
        values = values[order.long()]
    return weight_of(values.T, scales.T, zeros.T, order)


def read_gptq(path: str | os.PathLike[str]) -> dict[str, Int4Linear]:
    """The quantised layers of a checkpoint (a safetensors file with its configuration beside it, or a folder of them), by name. Raises DataError."""

    def version(config: dict[str, Any]) -> int:
        return 2 if config.get("checkpoint_format", config.get("format")) == "gptq_v2" else 1

    return read_layers(path, "gptq", lambda tensors, config: gptq_weight(tensors, version=version(config)))


# -- what AWQ has too ------------------------------------------------------------------------------------------------------------------
def read_layers(path: str | os.PathLike[str], method: str, weight: Callable[[dict[str, Tensor], dict[str, Any]], QuantizedWeight]) -> dict[str, Int4Linear]:
    """The quantised layers of safetensors files, by name; `weight` makes a weight of a layer's tensors and the checkpoint's configuration."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no safetensors file: name the folder of a checkpoint")
    config = _configuration(path if path.is_dir() else path.parent)
    if config.get("quant_method", method) != method or config.get("bits", config.get("w_bit", 4)) != 4:
        kind = f"{config.get('bits', config.get('w_bit', 4))} bits by {config.get('quant_method', method)}"
        raise DataError(f"{path} is of {kind}, and 4 bits by {method} can be read: use the reader of its method, or another checkpoint")
    found: dict[str, dict[str, Tensor]] = {}
    for file in files:
        for name, tensor in read_weights(file, remedy="get the checkpoint again").items():
            owner, _, part = name.rpartition(".")
            found.setdefault(owner, {})[part] = tensor
    layers = {}
    for name, tensors in found.items():
        if "qweight" in tensors:
            try:
                layers[name] = Int4Linear(weight(tensors, config), tensors.get("bias"))
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}: {name} is no layer of 4 bits by {method} ({error})") from error
    if not layers:
        raise DataError(f"{path} has no layer with a qweight: it is not quantised by {method}")
    return layers


def unpacked(words: Tensor) -> Tensor:
    """int32 [R, N / 8] -> int32 [R, N], eight neighbouring columns a word."""
    return (words[..., None] >> _NIBBLES & 15).flatten(1)


def weight_of(values: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None) -> QuantizedWeight:
    """Of values 0 ... 15 [N, K] in stored order, scales and zeros [N, groups]. Groups of more than 128 inputs become several with the same scale."""
    group = values.shape[1] // scales.shape[1]
    if group not in GROUP_SIZES:
        size = next((size for size in reversed(GROUP_SIZES) if group % size == 0), None)
        if size is None:
            raise ValueError(f"groups of {group} inputs, and cvmk has groups of 32, 64 and 128 and their multiples")
        scales, zeros = (tensor.repeat_interleave(group // size, 1) for tensor in (scales, zeros))
    tensors = {"values": pack_int4(values.to(torch.uint8).contiguous()), "scales": scales.float().contiguous()}
    if bool((zeros != 8).any()):
        tensors["zeros"] = zeros.to(torch.uint8).contiguous()
    if order is not None:
        tensors["order"] = order
    return QuantizedWeight.from_tensors(tensors)


def checked(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's qweight, qzeros and scales. Raises ValueError where one is missing."""
    missing = [name for name in ("qweight", "qzeros", "scales") if name not in tensors or tensors[name].dim() != 2]
    if missing:
        raise ValueError(f"{missing[0]} is missing or has not two dimensions")
    return tensors["qweight"], tensors["qzeros"], tensors["scales"]


def check_shapes(words: Tensor, zeros: Tensor, scales: Tensor, shape: tuple[int, int], groups: int, outputs: int, inputs: int) -> None:
    """Raises ValueError where a layer's tensors do not fit together; `shape` is that of qweight."""
    if groups == 0 or inputs % groups or outputs % 8:
        raise ValueError(f"{inputs} inputs in {groups} groups and {outputs} outputs do not fit: groups divide the inputs, and 8 the outputs")
    for name, tensor, asked in (("qweight", words, shape), ("qzeros", zeros, (groups, outputs // 8)), ("scales", scales, (groups, outputs))):
        if tensor.shape != asked:
            raise ValueError(f"{name} is {list(tensor.shape)}; it must be {list(asked)}")
        if name != "scales" and tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}; it must be int32")
    if not scales.is_floating_point():
        raise ValueError(f"scales is {scales.dtype}; it must be floating")


def _configuration(folder: Path) -> dict[str, Any]:
    """What the checkpoint says of its quantisation; nothing where it says nothing."""
    for name in CONFIGS:
        if (folder / name).is_file():
            found = read_json(folder / name)
            found = found.get("quantization_config", found if name == CONFIGS[0] else {}) if isinstance(found, dict) else {}
            if isinstance(found, dict) and found:
                return found
    return {}

