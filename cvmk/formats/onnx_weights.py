"""Weights in a graph of ONNX: floats, and quantised ones bit for bit, with the arithmetic of `ops.int8_linear` and `ops.int4_linear` around them.

What is made of constants alone (floats of 4-bit values, a transpose) the runtime computes once, when it loads the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from cvmk.formats.onnx_nodes import Graph

if TYPE_CHECKING:
    from cvmk.ops import QuantizedWeight

_SMALLEST_MAXIMUM = 2.0**-100
"""The largest magnitude that a row of activations has at least, when it is rounded (`ops.int8_linear`)."""


@dataclass(frozen=True)
class Codes:
    """A quantised weight [N, K] in the canonical layout of `ops.quantize`.

    values int8 [N, K] or uint8 [N, K / 2]; scales float32 [N] or [N, G]; zeros uint8 [N, G]; order int32 [K]; smooth float32 [K], by which inputs are divided;
    token: whether rows of inputs are rounded to 8 bits each.
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    order: np.ndarray | None
    smooth: np.ndarray | None
    token: bool

    @classmethod
    def of(cls, weight: QuantizedWeight, smooth: np.ndarray | None, *, token: bool) -> Codes:
        tensors = {name: tensor.cpu().numpy() for name, tensor in weight.tensors().items()}
        return cls(tensors["values"], tensors["scales"], tensors.get("zeros"), tensors.get("order"), smooth, token)

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == np.int8 else 4


Weight = np.ndarray | Codes


def rows(graph: Graph, ids: str, name: str, weight: Weight) -> str:
    """ids [batch, T] -> those rows of a weight [N, K], [batch, T, K]."""
    if not isinstance(weight, Codes):
        return str(graph.op("Gather", graph.constant(name, weight), ids))
    values, scales, zeros = _constants(graph, name, weight)
    if weight.bits == 8:
        found = graph.op("Cast", graph.op("Gather", values, ids), to=TensorProto.FLOAT)
        return str(graph.op("Mul", found, graph.op("Unsqueeze", graph.op("Gather", scales, ids), graph.numbers(2))))
    flat = graph.op("Reshape", ids, graph.numbers(-1))
    parts = [None if part is None else str(graph.op("Gather", part, flat)) for part in (values, scales, zeros)]
    found = _unpacked(graph, name, weight, *parts)  # type: ignore[arg-type]
    return str(graph.op("Reshape", found, graph.op("Concat", graph.op("Shape", ids), graph.numbers(2 * weight.values.shape[1]), axis=0)))


def product(graph: Graph, x: str, name: str, weight: Weight, *, output: str | None = None, shared: bool = False) -> str:
    """x [..., K] times the transpose of a weight [N, K]. `shared`: the weight is in the graph already, as `rows` has it, and not to be stored again."""
    node, outputs = name.removesuffix(".weight"), [output] if output else []
    if not isinstance(weight, Codes):
        if shared:
            turned = graph.op("Transpose", graph.constant(name, weight), perm=[1, 0])
        else:
            turned = graph.constant(f"{name}.turned", weight.T)
        return str(graph.op("MatMul", x, turned, name=node, outputs=outputs))
    if not weight.token:
        return str(graph.op("MatMul", x, _floats(graph, name, weight), name=node, outputs=outputs))
    if weight.smooth is not None:
        x = str(graph.op("Mul", x, graph.constant(f"{node}.1/smooth_scale", 1 / weight.smooth)))
    rounded, unit = _rounded_rows(graph, x)
    if weight.bits == 4:
        return str(graph.op("MatMul", graph.op("Mul", rounded, unit), _floats(graph, name, weight), name=node, outputs=outputs))
    values = graph.constant(f"{name}.values", weight.values) if shared else graph.constant(f"{name}.values.turned", weight.values.T)
    values = graph.op("Transpose", values, perm=[1, 0]) if shared else values
    shifted = graph.op("Cast", graph.op("Add", rounded, graph.number(128.0)), to=TensorProto.UINT8)  # the runtime is quickest with bytes without a sign
    sums = graph.op("MatMulInteger", shifted, values, graph.constant("uint8(128)", np.array(128, np.uint8)), name=node)
    scales = graph.constant(f"{name}.scales", weight.scales)
    return str(graph.op("Mul", graph.op("Mul", graph.op("Cast", sums, to=TensorProto.FLOAT), unit), scales, outputs=outputs))


def _rounded_rows(graph: Graph, x: str) -> tuple[str, str]:
    """x [..., K] -> its rows in whole numbers within +-127, and what one stands for [..., 1]."""
    largest = graph.op("ReduceMax", graph.op("Abs", x), axes=[-1], keepdims=1)
    largest = graph.op("Max", largest, graph.number(_SMALLEST_MAXIMUM))
    steps = graph.number(127.0)
    return str(graph.op("Round", graph.op("Mul", x, graph.op("Div", steps, largest)))), str(graph.op("Div", largest, steps))


def _floats(graph: Graph, name: str, weight: Codes) -> str:
    """A weight of 4 bits as floats [K, N], of constants."""
    return str(graph.op("Transpose", _unpacked(graph, name, weight, *_constants(graph, name, weight)), perm=[1, 0]))


def _constants(graph: Graph, name: str, weight: Codes) -> tuple[str, str, str | None]:
    zeros = None if weight.zeros is None else graph.constant(f"{name}.zeros", weight.zeros)
    return graph.constant(f"{name}.values", weight.values), graph.constant(f"{name}.scales", weight.scales), zeros


def _unpacked(graph: Graph, name: str, weight: Codes, values: str, scales: str, zeros: str | None) -> str:
    """Rows of 4 bits, values [R, K / 2] with their scales and zeros [R, G], as floats [R, K]."""
    columns, groups = 2 * weight.values.shape[1], weight.scales.shape[1]
    codes, sixteen = graph.op("Cast", values, to=TensorProto.INT32), graph.constant("int32(16)", np.array(16, np.int32))
    halves = [graph.op("Unsqueeze", graph.op(kind, codes, sixteen), graph.numbers(2)) for kind in ("Mod", "Div")]
    apart: Any = graph.op("Reshape", graph.op("Concat", *halves, axis=2), graph.numbers(-1, groups, columns // groups))
    zero = graph.number(8.0) if zeros is None else graph.op("Unsqueeze", graph.op("Cast", zeros, to=TensorProto.FLOAT), graph.numbers(2))
    wide = graph.op("Sub", graph.op("Cast", apart, to=TensorProto.FLOAT), zero)
    found = graph.op("Reshape", graph.op("Mul", wide, graph.op("Unsqueeze", scales, graph.numbers(2))), graph.numbers(-1, columns))
    if weight.order is not None:
        found = graph.op("Gather", found, graph.constant(f"{name}.places", np.argsort(weight.order).astype(np.int64)), axis=1)
    return str(found)
