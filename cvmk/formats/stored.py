"""Quantised weights in a model's file: which tensors belong to one, and that they fit together. Imports neither torch nor numpy; what the numbers are is
looked at by who reads them (`ops.QuantizedWeight.from_tensors`, csrc/engine/model.cpp).

The weight `x.weight` (of embeddings: `embeddings.source`) of a quantised scheme has, in the place of one tensor, those of the canonical layout of
`cvmk.ops.quantize`:
    x.weight.values        int8 [N, K], or uint8 [N, K / 2] with two 4-bit values a byte
    x.weight.scales        float32 [N], or [N, groups]
    x.weight.zeros         uint8 [N, groups]; 4 bits only, where they are not all 8
    x.weight.order         int32 [K]; 4 bits only, where groups are not of neighbours
    x.smooth_scale         float32 [K]; 8 bits only, where SmoothQuant's scale is in no layer before
    x.input_range          float32 [1]; with "activations": "static", the magnitude that 127 stands for (of embeddings: `embeddings.source.input_range`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cvmk.errors import DataError
from cvmk.formats.manifest import CONFIG, QUANTIZED, Scheme, Schemes
from cvmk.formats.tensors import RawTensor

PARTS = ("values", "scales", "zeros", "order")
EMBEDDINGS = "embeddings."
SMOOTH = "smooth_scale"
RANGE = "input_range"
VECTORS = (SMOOTH, RANGE)
"""What a layer may have beside its weight."""


@dataclass(frozen=True)
class StoredWeight:
    """A quantised weight as it stands in a file; `smooth` is the smoothing scale of its layer, `range` its input range."""

    scheme: Scheme
    parts: Mapping[str, RawTensor]
    smooth: RawTensor | None = None
    range: RawTensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.parts["values"].shape
        return rows, columns * (2 if self.scheme.type == "int4" else 1)


def weight_of(layer: str) -> str:
    """The name of the weight of a layer, which a matrix of embeddings is itself."""
    return layer if layer.startswith(EMBEDDINGS) else f"{layer}.weight"


def split_weights(weights: Mapping[str, RawTensor], schemes: Schemes | None, file: Path) -> tuple[dict[str, RawTensor], dict[str, StoredWeight]]:
    """The tensors of a file apart: floating weights by name, and quantised ones by theirs, checked.

    Raises DataError where a tensor of a quantised weight is missing, or is not what its scheme says.
    """
    floats = dict(weights)
    parts: dict[str, dict[str, RawTensor]] = {}
    vectors: dict[str, dict[str, RawTensor]] = {name: {} for name in VECTORS}
    if schemes is None:
        return floats, {}
    for tensor in weights:
        owner, _, part = tensor.rpartition(".")
        if part in PARTS and schemes.of(owner).type in QUANTIZED and tensor not in schemes.weights:
            parts.setdefault(owner, {})[part] = floats.pop(tensor)
        elif part in vectors and tensor not in schemes.weights:
            if schemes.of(weight_of(owner)).type in QUANTIZED:
                vectors[part][weight_of(owner)] = floats.pop(tensor)
    named = [name for name, scheme in schemes.weights.items() if scheme.type in QUANTIZED]
    stored = {}
    smooth, ranges = vectors[SMOOTH], vectors[RANGE]
    for name in (*parts, *(name for name in (*named, *smooth, *ranges) if name not in parts)):
        stored[name] = _checked(name, schemes.of(name), parts.get(name, {}), smooth.get(name), ranges.get(name), file)
    return floats, stored


def _checked(
    name: str, scheme: Scheme, parts: Mapping[str, RawTensor], smooth: RawTensor | None, span: RawTensor | None, file: Path
) -> StoredWeight:
    static = scheme.options.get("activations") == "static"
    missing = [part for part in ("values", "scales") if part not in parts]
    if missing:
        raise DataError(f"{file} lacks the tensor {name}.{missing[0]}: it does not belong to {CONFIG}; restore both")
    extra = [part for part in ("zeros", "order") if part in parts and not scheme.options.get(part)]
    extra += [SMOOTH] if smooth is not None and (scheme.type != "int8" or name.startswith(EMBEDDINGS)) else []
    extra += [RANGE] if span is not None and not static else []
    if extra:
        raise DataError(f"{file} has {extra[0]} for {name}, which its scheme in {CONFIG} does not have: restore both")
    absent = [part for part in ("zeros", "order") if scheme.options.get(part) and part not in parts]
    absent += [RANGE] if static and span is None else []
    if absent:
        raise DataError(f"{file} lacks the tensor {name}.{absent[0]}, which its scheme in {CONFIG} has: restore both")
    wrong = _wrong_eight(parts) if scheme.type == "int8" else _wrong_four(parts, scheme)
    if not wrong and smooth is not None:
        wrong = _wrong(smooth, SMOOTH, "float32", (parts["values"].shape[1],))
    if not wrong and span is not None:
        wrong = _wrong(span, RANGE, "float32", (1,))
    if wrong:
        raise DataError(f"{file} has in {name} {wrong}: restore it or quantise the model again")
    return StoredWeight(scheme, parts, smooth, span)


def _wrong_eight(parts: Mapping[str, RawTensor]) -> str:
    values = parts["values"]
    if values.dtype != "int8" or len(values.shape) != 2 or 0 in values.shape:
        return f"values of {values.dtype} {list(values.shape)} where int8 [outputs, inputs] is asked for"
    return _wrong(parts["scales"], "scales", "float32", (values.shape[0],))


def _wrong_four(parts: Mapping[str, RawTensor], scheme: Scheme) -> str:
    values, group = parts["values"], scheme.options["group"]
    if values.dtype != "uint8" or len(values.shape) != 2 or 0 in values.shape:
        return f"values of {values.dtype} {list(values.shape)} where uint8 [outputs, inputs / 2] is asked for"
    rows, columns = values.shape[0], 2 * values.shape[1]
    if columns % group:
        return f"{columns} inputs, which groups of {group} do not divide"
    shapes = {"scales": ("float32", (rows, columns // group)), "zeros": ("uint8", (rows, columns // group)), "order": ("int32", (columns,))}
    return next((wrong for part, asked in shapes.items() if part in parts and (wrong := _wrong(parts[part], part, *asked))), "")


def _wrong(tensor: RawTensor, name: str, dtype: str, shape: tuple[int, ...]) -> str:
    found, asked = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(shape)}"
    return "" if found == asked else f"{name} of {found} where {asked} is asked for"

