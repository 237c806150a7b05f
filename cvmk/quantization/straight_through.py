"""A model that is trained through its rounding: floats that compute what the quantised model will.

Every quantised matrix is W = (q - zero) * scale, q the integers of the grid that are nearest to a float matrix V of its size. A forward pass computes with W,
and rounds the inputs of the matrix as the quantised model does; a backward pass takes both roundings for the identity (straight-through, Bengio et
al. 2013, arXiv 1308.3432), so that the gradient of W becomes that of V. Scales and zeros stay. V begins as near to the matrix that was quantised as leaves
the method's own integers (GPTQ's are not the nearest ones), so that the model begins as the quantised one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cvmk.nn import CVMTransformer
from cvmk.ops import QuantizedWeight
from cvmk.ops.quantize import inverse_order, rounded_rows
from cvmk.quantization.calibration import Pair
from cvmk.quantization.model import Choice, Quantized
from cvmk.quantization.rounding import Grid
from cvmk.quantization.sites import matrix

_INSIDE = 0.49  # of a step from a value of the grid: what rounds to it


class Rounded(nn.Module):
    """The parametrisation of a matrix [N, K] by a float one, on the grid of a quantised weight."""

    scales: Tensor  # [N, groups]
    zeros: Tensor
    order: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        tensors = weight.tensors()
        self.grid = Grid(weight.bits, weight.group_size, weight.zeros is None)
        scales = tensors["scales"].unflatten(0, (weight.out_features, -1)) if weight.bits == 8 else tensors["scales"]
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", tensors["zeros"].float() if "zeros" in tensors else torch.full_like(scales, 0.0 if weight.bits == 8 else 8.0))
        self.register_buffer("order", tensors.get("order"))

    def forward(self, floats: Tensor) -> Tensor:
        """V [N, K] -> W [N, K], with the gradient of the identity."""
        found: Tensor = _Straight.apply(floats, self._nearest)  # type: ignore[no-untyped-call]
        return found

    def start(self, floats: Tensor, weight: QuantizedWeight) -> Tensor:
        """What is nearest to `floats` [N, K] and rounds to `weight`."""
        step = self._unordered(self.scales.repeat_interleave(self.grid.group, 1))
        values = weight.dequantize()
        return values + (floats - values).clamp(-_INSIDE * step, _INSIDE * step)

    def weight(self, floats: Tensor) -> QuantizedWeight:
        """The quantised weight whose values `forward` computes with."""
        values = self.grid.values(self._groups(floats), self.scales, self.zeros).flatten(1)
        return self.grid.weight(values, self.scales, self.zeros, self.order)

    def _nearest(self, floats: Tensor) -> Tensor:
        return self._unordered(self.grid.rounded(self._groups(floats), self.scales, self.zeros).flatten(1))

    def _groups(self, floats: Tensor) -> Tensor:
        return self.grid.groups(floats if self.order is None else floats.index_select(1, self.order))

    def _unordered(self, stored: Tensor) -> Tensor:
        return stored if self.order is None else stored.index_select(1, inverse_order(self.order))


class _Straight(torch.autograd.Function):
    """rounding(x), differentiated as x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def trainable(quantized: Quantized) -> CVMTransformer:
    """The model of this kind of a quantised one, without dropout. Its parameters share no memory with anything. Wrap a pass in
    `torch.nn.utils.parametrize.cached()`, so that a matrix that is used twice is rounded once."""
    source = quantized.model
    config = source.config.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})
    model = CVMTransformer(config, source.vocab_size, source.pad_id)
    model.load_state_dict(source.state_dict())
    for name, choice in quantized.choices.items():
        floats, rounded = matrix(source, name), Rounded(choice.weight)
        floats = floats if choice.smooth is None else floats * choice.smooth
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(rounded.start(floats, choice.weight))
        path, _, leaf = name.rpartition(".")
        _round_inputs(model, choice)
        parametrize.register_parametrization(model.get_submodule(path), leaf, rounded)
    return model.eval()


def quantized_again(quantized: Quantized, model: CVMTransformer, pairs: Sequence[Pair]) -> Quantized:
    """What a model that `trainable` made of a quantised one has become."""
    weights = {}
    for name in quantized.choices:
        path, _, leaf = name.rpartition(".")
        holder: Any = model.get_submodule(path).parametrizations
        weights[name] = holder[leaf][0].weight(holder[leaf].original.detach())
    others = {name: model.get_parameter(name).detach() for name, _ in quantized.model.named_parameters() if name not in weights}
    return quantized.recovered(weights, others, pairs)


def _round_inputs(model: CVMTransformer, choice: Choice) -> None:
    """Let a matrix see its inputs as the quantised layer does."""
    site = choice.site
    if site.module is None or choice.activations == "float":
        return
    if site.kind in ("embeddings", "output"):  # what the output layer reads is what the decoder gives, also where nobody makes the logits
        model.decoder.register_forward_hook(lambda module, given, found: rounded_rows(found, choice.range))
        return
    factor = None if choice.smooth is None else 1 / choice.smooth

    def rounded(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x = given[0] if factor is None else given[0] * factor
        return rounded_rows(x, choice.range), *given[1:]

    model.get_submodule(site.module).register_forward_pre_hook(rounded)
