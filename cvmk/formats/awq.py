"""Layers of AutoAWQ checkpoints (version "gemm"), 4 bits, as weights of cvmk, bit for bit.

A layer of K inputs and N outputs with groups of g inputs has
    qweight  int32 [K, N / 8]       eight neighbouring outputs a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest four bits
    qzeros   int32 [K / g, N / 8]   the zero points, likewise
    scales   float16 [K / g, N]
and w = scale * (q - zero). https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from cvmk.formats.gptq import check_shapes, checked, read_layers, unpacked, weight_of
from cvmk.nn import Int4Linear
from cvmk.ops import QuantizedWeight

_PLACE = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where each of a word's eight outputs stands


def awq_weight(tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight of a layer's tensors. Raises ValueError for tensors that do not fit together."""
    words, zeros, scales = checked(tensors)
    inputs, outputs, groups = words.shape[0], 8 * words.shape[1], scales.shape[0]
    check_shapes(words, zeros, scales, (inputs, outputs // 8), groups, outputs, inputs)
    return weight_of(_outputs(words).T, scales.T, _outputs(zeros).T, None)


def read_awq(path: str | os.PathLike[str]) -> dict[str, Int4Linear]:
    """The quantised layers of a checkpoint (a safetensors file with its configuration beside it, or a folder of them), by name. Raises DataError."""
    return read_layers(path, "awq", lambda tensors, config: awq_weight(tensors))


def _outputs(words: Tensor) -> Tensor:
    """int32 [R, N / 8] -> int32 [R, N]."""
    apart: Tensor = unpacked(words).unflatten(1, (-1, 8))
    return apart[..., _PLACE].flatten(1)
