"""A matrix of embeddings in 8 or 4 bits: rows are looked up, and it may be the output layer as well."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from cvmk.nn.quantized_linear import QuantizedLinear
from cvmk.ops import QuantizedWeight
from cvmk.ops.quantize import inverse_order, unpack_int4


class QuantizedTable(QuantizedLinear):
    """A `QuantizedLinear` without bias, x [..., d] -> [..., V], whose weight [V, d] also has rows for ids.

    In a state dict its tensors are "values", "scales" and so on under its own name.
    """

    weight_key: ClassVar[str] = ""
    _rows: QuantizedWeight | None
    _like: Tensor

    def __init__(self, weight: QuantizedWeight, *, activations: str | None = None, input_range: Tensor | None = None) -> None:
        super().__init__(weight, activations=activations, input_range=input_range)
        self.register_buffer("_like", torch.empty(0, device=weight.device), persistent=False)  # the dtype of rows; it is cast with the module

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...], integers -> the rows [..., d] in the module's dtype; (value - zero) * scale is computed in float32 (float64 for a float64 module)."""
        if self._rows is None:
            self._rows = self.weight.plain()
        weight, dtype = self._rows, torch.promote_types(self._like.dtype, torch.float32)
        values, scales = weight.values[ids], weight.scales[ids].to(dtype)
        if self.bits == 8:
            return (values.to(dtype) * scales[..., None]).to(self._like.dtype)
        codes: Tensor = unpack_int4(values.flatten(0, -2)).unflatten(-1, (-1, self.group_size)).to(dtype)
        codes = codes.unflatten(0, ids.shape) if ids.dim() != 1 else codes
        zeros = 8 if weight.zeros is None else weight.zeros[ids].to(dtype)[..., None]
        found: Tensor = ((codes - zeros) * scales[..., None]).flatten(-2)
        if weight.order is not None:
            found = found.index_select(-1, inverse_order(weight.order))
        return found.to(self._like.dtype)

    def matrix(self) -> Tensor:
        """The whole matrix [V, d] in the module's dtype."""
        return self.weight.dequantize(self._like.dtype)

    def _hold(self, weight: QuantizedWeight) -> None:
        super()._hold(weight)
        self.__dict__["_rows"] = None  # unpacked when it is first asked for

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rows": None}
