"""A graph of ONNX that grows node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

import cvmk

OPSET, IR = 17, 8
"""Old ones, which runtimes of the last years read."""


class Graph:
    """Nodes, constants, inputs and outputs as they come; a value is its name. `used` holds the model's tensors that went in."""

    def __init__(self, name: str) -> None:
        self.name, self.used = name, set[str]()
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def model(self) -> Any:
        """The ModelProto."""
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, list(self._constants.values()))
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR, producer_name="cvmk", producer_version=cvmk.__version__)

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Of the inputs and of the outputs."""
        return [value.name for value in self._inputs], [value.name for value in self._outputs]

    def op(self, kind: str, *inputs: str, count: int = 1, outputs: Sequence[str] = (), name: str | None = None, **attributes: Any) -> Any:
        """A node; its output, or where it has more the list of them."""
        name = name or f"{kind}_{len(self._nodes)}"
        found = [*outputs] or [name if count == 1 else f"{name}.{index}" for index in range(count)]
        self._nodes.append(helper.make_node(kind, inputs, found, name=name, **attributes))
        return found[0] if len(found) == 1 else found

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def number(self, value: float) -> str:
        """A scalar: int64 of a whole number, else float32."""
        kind = np.int64 if isinstance(value, int) else np.float32
        return self.constant(f"{kind.__name__}({value!r})", np.array(value, kind))

    def numbers(self, *values: int) -> str:
        """int64 [n], such as axes and shapes."""
        return self.constant(f"int64{list(values)}", np.array(values, np.int64))

    def input(self, name: str, kind: int, shape: Sequence[str | int]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Sequence[str | int]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def dimension(self, value: str, axis: int) -> str:
        """The size of a dimension, int64 [1]."""
        return str(self.op("Shape", value, start=axis, end=axis + 1))

    def range(self, end: str, start: str | None = None) -> str:
        """start ... end - 1, both int64 [1]; start None is 0."""
        first = self.number(0) if start is None else self.op("Squeeze", start)
        return str(self.op("Range", first, self.op("Squeeze", end), self.number(1)))
