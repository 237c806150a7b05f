"""Weights of quantised linear layers: how they are made, what their bits mean, and how a backend packs them for itself.

The canonical layout, "plain", is what checkpoints hold and what every backend can be packed from (N outputs, K inputs, g the group
size, G = K / g):

8 bits   values  int8 [N, K], -127 ... 127;           w[n, k] = values[n, k] * scales[n]
         scales  float32 [N]
4 bits   values  uint8 [N, K/2]: input 2j of row n is the low nibble of byte [n, j], input 2j + 1 its high nibble, q = 0 ... 15
         scales  float32 [N, G]
         zeros   uint8 [N, G], 0 ... 15, or None: then 8 everywhere (symmetric)
         order   int32 [K], a permutation, or None: stored input k is input order[k] of the layer (GPTQ's activation order)
                 w[n, order[k]] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]

The inputs are stored in the order of the permutation, so a group is always g neighbours.

A backend whose kernels read another arrangement declares it as `LAYOUTS`, a tuple of `Layout`, in its own file
cvmk/ops/<backend>/int8_linear.py or int4_linear.py beside the kernel that reads it; nothing else changes. Weights are packed once,
where they are made or moved (`quantize_int8`, `quantize_int4`, `QuantizedWeight.pack`, `.to`), and hold one copy. The name of the
layout travels with every call, so a backend can decline what it does not read, and the reference takes everything by unpacking.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from cvmk.ops import _backend, _dtypes
from cvmk.ops._storage import refuse_without_memory

PLAIN = "plain"
GROUP_SIZES = (32, 64, 128)
ACTIVATIONS = ("relu", "gelu", "silu", "swiglu")
ACTIVATION_NUMBERS = {name: number for number, name in enumerate((None, *ACTIVATIONS))}
"""The activations as the C++ kernels number them (csrc/gemm/params.h)."""
INT8_MAX_INPUTS = (2**31 - 1) // (127 * 127)
"""The longest row whose int32 sum of products of values of at most 127 cannot overflow: 133144."""
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
WEIGHT_TENSORS = ("values", "scales", "zeros", "order")


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight:
    """The quantised weight [N, K] of a linear layer: a pytree of tensors, in the layout named by `layout`.

    In the layout "plain" the tensors are those of the module's docstring; in any other they are the backend's own affair. The
    constructor checks nothing, so that compiled code may build one from a module's buffers; `from_tensors` checks everything.
    `group_size` is K where a whole row shares a scale.

    It is no `torch.nn.Module` and no tensor, since compiled code makes such weights: a module that keeps one as an attribute neither saves, nor
    loads, nor moves it. `cvmk.nn.QuantizedLinear` is the module that does. A pickle holds the canonical tensors and is packed again for the
    machine that reads it.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    out_features: int
    in_features: int
    bits: int
    group_size: int
    layout: str = PLAIN

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as the weight that was quantised."""
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.values, self.scales, self.zeros, self.order) if tensor is not None)

    def __repr__(self) -> str:
        return f"QuantizedWeight(shape={self.shape}, bits={self.bits}, group_size={self.group_size}, layout={self.layout!r}, device={str(self.device)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.tensors(),)

    def __copy__(self) -> QuantizedWeight:
        return _unflatten(_children(self).values(), _context(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        return _unflatten([copy.deepcopy(tensor, memo) for tensor in _children(self).values()], _context(self))

    # -- packing -------------------------------------------------------------------------------------------------------------
    def plain(self) -> QuantizedWeight:
        """The weight in the canonical layout. Raises ValueError where no backend of this process knows its layout."""
        if self.layout == PLAIN:
            return self
        layout = next((layout for layout in layouts().values() if layout.name == self.layout), None)
        if layout is None:
            raise ValueError(f"no backend here knows the weight layout {self.layout!r}; keep weights in their canonical form (QuantizedWeight.tensors)")
        return layout.unpack(self)

    def pack(self) -> QuantizedWeight:
        """The weight in the layout of the first backend that has one for it here, or in the canonical one; obeys `ops.use`.

        While a graph is traced it stays canonical, so that the graph does not depend on this machine.
        """
        plain = self.plain()
        if torch.compiler.is_compiling():
            return plain
        allowed = _backend.allowed() or _backend.PREFERENCE
        for backend in allowed:
            for (owner, _), layout in layouts().items():
                if owner == backend and layout.bits == self.bits and not layout.reasons(plain):
                    return self if layout.name == self.layout else layout.pack(plain)
        return plain

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The weight on another device, packed for it."""
        if torch.device(device) == self.device:
            return self
        plain = self.plain()
        moved = [tensor if tensor is None else tensor.to(device) for tensor in _children(plain).values()]
        return _unflatten(moved, _context(plain)).pack()

    # -- canonical form --------------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, torch.Tensor]:
        """The canonical tensors by name ("values", "scales", "zeros", "order"; absent ones left out): what a checkpoint holds."""
        return {name: tensor for name, tensor in _children(self.plain()).items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight of canonical tensors, packed for the device that they are on; bits, shape and group size follow from them.

        Reads the data to check it, so it waits for the device. Raises ValueError for tensors that do not fit together.
        """
        weight = _from_tensors(tensors)
        _check_data(weight)
        return weight.pack()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K] in `dtype`, inputs in the layer's own order; products in float32 (float64 for float64)."""
        plain = self.plain()
        stored = dequantized_rows(plain, 0, plain.out_features, dtype)
        return stored if plain.order is None else stored.index_select(1, inverse_order(plain.order))


@dataclass(frozen=True)
class Layout:
    """A backend's own arrangement of a weight.

    `reasons` says why a canonical weight cannot be packed so (its device, an instruction set, a size); empty where it can. `pack`
    turns a canonical weight into one with `layout=name`, free in what its tensors hold; `unpack` is its exact inverse.
    """

    name: str
    bits: int
    pack: Callable[[QuantizedWeight], QuantizedWeight]
    unpack: Callable[[QuantizedWeight], QuantizedWeight]
    reasons: Callable[[QuantizedWeight], list[str]]


@functools.cache
def layouts() -> dict[tuple[str, str], Layout]:
    """Every packed layout, by backend and name."""
    found = {}
    for backend in _backend.PREFERENCE:
        for module in ("int8_linear", "int4_linear"):
            name = f"cvmk.ops.{backend}.{module}"
            if importlib.util.find_spec(f"cvmk.ops.{backend}") is None or importlib.util.find_spec(name) is None:
                continue
            for layout in getattr(importlib.import_module(name), "LAYOUTS", ()):
                found[backend, layout.name] = layout
    return found


def _children(weight: QuantizedWeight) -> dict[str, torch.Tensor | None]:
    return {name: getattr(weight, name) for name in WEIGHT_TENSORS}


def _context(weight: QuantizedWeight) -> list[Any]:
    return [weight.out_features, weight.in_features, weight.bits, weight.group_size, weight.layout]


def _unflatten(leaves: Any, context: Any) -> QuantizedWeight:
    return QuantizedWeight(*leaves, *context)


def _restored(tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """The weight of a pickle, which may come from anywhere."""
    return QuantizedWeight.from_tensors(tensors)


_pytree.register_pytree_node(
    QuantizedWeight,
    lambda weight: (list(_children(weight).values()), _context(weight)),
    _unflatten,
    serialized_type_name="cvmk.ops.QuantizedWeight",
    flatten_with_keys_fn=lambda weight: ([(_pytree.GetAttrKey(name), leaf) for name, leaf in _children(weight).items()], _context(weight)),
)
torch.serialization.add_safe_globals([_restored])  # so that `torch.load` reads weights: canonical tensors, which are checked


# -- quantising ------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def quantize_int8(weight: torch.Tensor) -> QuantizedWeight:
    """Quantise a weight [N, K] to 8 bits, symmetric, one scale an output row; packed for the device that it is on.

    scale[n] = max_k |w[n, k]| / 127 in float32 (at least the smallest normal number), value = round_half_even(w / scale) within
    +-127; so the error of a weight is at most scale / 2. K is at most 133144, so that an int32 sum cannot overflow.

    Raises TypeError for a weight that is not floating, ValueError for one that is not [N >= 1, K >= 1], too wide, or not finite.
    """
    _check_weight("quantize_int8", weight)
    if weight.shape[1] > INT8_MAX_INPUTS:
        raise ValueError(f"quantize_int8: weight has {weight.shape[1]} inputs; int32 sums are exact up to {INT8_MAX_INPUTS}: split the layer")
    wide = weight.detach().to(_dtypes.accumulation_dtype(weight.dtype))
    scales = _divided(wide.abs().amax(1), 127).float().clamp_(min=_SMALLEST_SCALE)
    values = (wide / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight(values, scales, None, None, weight.shape[0], weight.shape[1], 8, weight.shape[1]).pack()


@torch.no_grad()
def quantize_int4(weight: torch.Tensor, group_size: int = 64, *, symmetric: bool = True, order: torch.Tensor | None = None) -> QuantizedWeight:
    """Quantise a weight [N, K] to 4 bits in groups along K by rounding to nearest; packed for the device that it is on.

    symmetric   scale = max|w| / 7.5 over the group, value = round_half_even(w / scale) + 8 within 0 ... 15 (so 0 stays 0).
    otherwise   scale = (max(w, 0) - min(w, 0)) / 15, zero = round(-min(w, 0) / scale), value = round(w / scale) + zero within 0 ... 15.
    In both the error of a weight is at most scale / 2 (to float32 rounding); a group of zeros has scale 1.
    group_size  32, 64 or 128, a divisor of K.
    order       integer permutation [K]: groups are formed of the inputs order[0], order[1], ... (GPTQ's activation order, Frantar
                et al. 2023; of a checkpoint's g_idx: `order_of_groups`).

    Solvers that choose the values themselves (GPTQ, AWQ) build the weight with `pack_int4` and `QuantizedWeight.from_tensors`.

    Raises TypeError for a weight that is not floating; ValueError for one that is not [N >= 1, K >= 1] or not finite, for a group
    size that is not allowed or does not divide K, and for an `order` that is no permutation.
    """
    _check_weight("quantize_int4", weight)
    rows, columns = weight.shape
    if group_size not in GROUP_SIZES:
        raise ValueError(f"quantize_int4: group_size is {group_size}, not one of {', '.join(map(str, GROUP_SIZES))}")
    if columns % group_size:
        raise ValueError(f"quantize_int4: {columns} inputs are no multiple of group_size {group_size}; take a smaller group or int8")
    wide = weight.detach().to(_dtypes.accumulation_dtype(weight.dtype))
    if order is not None:
        order = order.to(device=weight.device, dtype=torch.int32)
        _check_order(order, columns)
        wide = wide.index_select(1, order)
    groups = wide.reshape(rows, columns // group_size, group_size)
    if symmetric:
        zeros, scales = None, _nonzero_scale(_divided(groups.abs().amax(2), 7.5))
        values = (groups / scales[..., None]).round_().add_(8)
    else:
        low, high = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
        steps = _divided(high - low, 15)
        if wide.dtype == torch.float32:  # a range past the largest float has a step that is not
            steps = torch.where(steps.isfinite(), steps, (_divided(high.double() - low.double(), 15)).float())
        scales = _nonzero_scale(steps)
        zeros = (-low / scales).round_().clamp_(0, 15)
        values = (groups / scales[..., None]).round_().add_(zeros[..., None])
        zeros = zeros.to(torch.uint8)
    packed = pack_int4(values.clamp_(0, 15).to(torch.uint8).reshape(rows, columns))
    return QuantizedWeight(packed, scales, zeros, order, rows, columns, 4, group_size).pack()


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] of 0 ... 15, K even -> uint8 [N, K/2]: the even input in the low nibble, the odd one in the high nibble."""
    return values[:, 0::2] | (values[:, 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K/2] -> uint8 [N, K] of 0 ... 15: the inverse of `pack_int4`."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def order_of_groups(group_index: torch.Tensor, group_size: int) -> torch.Tensor:
    """The permutation `order` int32 [K] of GPTQ's g_idx [K] (the group of every input); inputs of one group keep their order.

    Raises ValueError where not every group has exactly `group_size` inputs.
    """
    order = torch.argsort(group_index, stable=True)
    expected = torch.arange(group_index.numel(), device=group_index.device) // group_size
    if not torch.equal(group_index[order].long(), expected):
        raise ValueError(f"order_of_groups: group_index must give each of the groups 0, 1, ... exactly {group_size} inputs")
    return order.to(torch.int32)


def rounded_rows(x: torch.Tensor, input_range: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], floating, as `int8_linear` sees it: each row rounded to 255 steps of its largest magnitude, or of input_range [1] where that is given, in
    x's dtype. The gradient goes straight through.

    With a = max(max_k |x[m, k]|, 2^-100), or max(input_range, 2^-100):  q = clamp(round_half_even(x * (127 / a)), -127, 127),  result
    q * (a / 127). A row that is not finite stays as it is.
    """
    wide = x.detach().to(_dtypes.accumulation_dtype(x.dtype))
    largest = wide.abs().amax(-1, keepdim=True).clamp_(min=2.0**-100)
    if input_range is not None:
        largest = torch.where(largest.isfinite(), input_range.to(wide.dtype).clamp(min=2.0**-100), largest)
    steps = torch.full_like(largest, 127.0)
    rounded = (wide * (steps / largest)).round_().clamp_(-127, 127).mul_(largest / steps)
    rounded = torch.where(largest.isfinite(), rounded, wide).to(x.dtype)
    return x + (rounded - x).detach() if torch.is_grad_enabled() and x.requires_grad else rounded


def inverse_order(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order`."""
    return torch.argsort(order)


def dequantized_rows(weight: QuantizedWeight, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows [start, stop) of a weight in the canonical layout, as `dtype` [rows, K], inputs in stored order."""
    wide = _dtypes.accumulation_dtype(dtype)
    scales = weight.scales[start:stop].to(wide)
    if weight.bits == 8:
        return weight.values[start:stop].to(wide).mul_(scales[:, None]).to(dtype)
    packed = weight.values[start:stop]
    found = torch.empty(*packed.shape, 2, dtype=wide, device=packed.device)
    found[..., 0] = packed & 15
    found[..., 1] = packed >> 4
    groups = found.view(packed.shape[0], -1, weight.group_size)
    groups.sub_(8 if weight.zeros is None else weight.zeros[start:stop, :, None]).mul_(scales[..., None])
    return groups.view(packed.shape[0], -1).to(dtype)


def _divided(tensor: torch.Tensor, number: float) -> torch.Tensor:
    """tensor / number, correctly rounded on every device: on CUDA PyTorch multiplies with the reciprocal of a plain number."""
    return tensor / torch.full_like(tensor, number)


def _nonzero_scale(scales: torch.Tensor) -> torch.Tensor:
    scales = scales.float()
    return torch.where(scales == 0, 1.0, scales.clamp(min=_SMALLEST_SCALE))


# -- checks ----------------------------------------------------------------------------------------------------------------------
def check_linear(name: str, bits: int, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, activation: str | None) -> None:
    """What the quantised linears ask of their arguments. Raises TypeError or ValueError."""
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{name}: weight is a {type(weight).__name__}; make a QuantizedWeight with ops.quantize_int{bits}(weight)")
    if weight.scales.dtype != torch.float32:
        raise TypeError(
            f"{name}: the weight's scales are {weight.scales.dtype} and must be float32: a module that holds them was cast (.half(), .bfloat16(), .double());"
            " cast its other parameters only, or quantise again"
        )
    if weight.bits != bits:
        raise ValueError(f"{name}: weight has {weight.bits} bits; use ops.int{weight.bits}_linear")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x is {x.dtype}; it must be floating")
    sizes = x.shape
    if not sizes or sizes[-1] != weight.in_features:
        raise ValueError(f"{name}: x is {list(sizes)}; its last dimension must be the weight's {weight.in_features} inputs")
    if not (x.is_cpu and weight.values.is_cpu) and x.device != weight.device:
        raise ValueError(f"{name}: x is on {x.device} and weight on {weight.device}; move the weight with weight.to({str(x.device)!r})")
    if bias is not None:
        check_vector(name, "bias", bias, weight.out_features, x)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation is {activation!r}, not None or one of {', '.join(ACTIVATIONS)}")
    if activation == "swiglu" and weight.out_features % 2:
        raise ValueError(f"{name}: swiglu needs an even number of outputs [gate, up]; the weight has {weight.out_features}")


def check_vector(name: str, argument: str, vector: torch.Tensor, length: int, x: torch.Tensor) -> None:
    """A floating vector of `length` on x's device. Raises TypeError or ValueError."""
    if not vector.is_floating_point():
        raise TypeError(f"{name}: {argument} is {vector.dtype}; it must be floating")
    if vector.shape != (length,):
        raise ValueError(f"{name}: {argument} is {list(vector.shape)}; it must be [{length}]")
    if not (vector.is_cpu and x.is_cpu) and vector.device != x.device:
        raise ValueError(f"{name}: {argument} is on {vector.device} and x on {x.device}; they must be on one device")


def outputs(out_features: int, activation: str | None) -> int:
    """Columns of a quantised linear's result."""
    return out_features // 2 if activation == "swiglu" else out_features


def _check_weight(name: str, weight: torch.Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"{name}: weight is {weight.dtype}; it must be floating")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{name}: weight is {list(weight.shape)}; it must be [N, K] with N and K at least 1")
    if torch.compiler.is_compiling():
        return
    refuse_without_memory(name, "weight", weight)
    if not torch.isfinite(weight.float()).all():
        row = int((~torch.isfinite(weight.float())).any(1).nonzero()[0])
        raise ValueError(f"{name}: weight row {row} is not finite in float32; only finite weights can be quantised")


def _check_order(order: torch.Tensor, columns: int) -> None:
    if order.shape != (columns,):
        raise ValueError(f"order is {list(order.shape)}; it must be a permutation of the {columns} inputs")
    if not torch.compiler.is_compiling() and not torch.equal(order.sort().values.long(), torch.arange(columns, device=order.device)):
        raise ValueError(f"order is no permutation of 0 ... {columns - 1}")


def _from_tensors(tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    unknown = sorted(set(tensors) - set(WEIGHT_TENSORS))
    if unknown or "values" not in tensors or "scales" not in tensors:
        raise ValueError(f"a quantised weight needs the tensors values and scales, and may have zeros and order; got {', '.join(sorted(tensors)) or 'none'}")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        raise ValueError("the tensors of a quantised weight must be on one device")
    values, scales = tensors["values"], tensors["scales"]
    zeros, order = tensors.get("zeros"), tensors.get("order")
    if values.dim() != 2 or 0 in values.shape:
        raise ValueError(f"values is {list(values.shape)}; it must have two dimensions of at least 1")
    if scales.dtype != torch.float32:
        raise ValueError(f"scales is {scales.dtype}; it must be float32")
    rows = values.shape[0]
    if values.dtype == torch.int8:
        if scales.shape != (rows,) or zeros is not None or order is not None:
            raise ValueError(f"8-bit values [{rows}, ...] go with scales [{rows}] and neither zeros nor order; scales is {list(scales.shape)}")
        return QuantizedWeight(values, scales, None, None, rows, values.shape[1], 8, values.shape[1])
    if values.dtype != torch.uint8:
        raise ValueError(f"values is {values.dtype}; it must be int8 (8 bits) or uint8 (two 4-bit values a byte)")
    columns = 2 * values.shape[1]
    if scales.dim() != 2 or scales.shape[0] != rows or scales.shape[1] == 0 or columns % scales.shape[1]:
        raise ValueError(f"scales is {list(scales.shape)}; 4-bit values {list(values.shape)} need [{rows}, groups] with groups a divisor of {columns}")
    if zeros is not None and (zeros.shape != scales.shape or zeros.dtype != torch.uint8):
        raise ValueError(f"zeros is {zeros.dtype} {list(zeros.shape)}; it must be uint8 {list(scales.shape)}")
    return QuantizedWeight(values, scales, zeros, None if order is None else order.to(torch.int32), rows, columns, 4, columns // scales.shape[1])


def _check_data(weight: QuantizedWeight) -> None:
    if weight.device.type == "meta":
        return
    if weight.bits == 8 and bool((weight.values == -128).any()):
        raise ValueError("values holds -128; 8-bit values lie within -127 ... 127")
    if weight.bits == 8 and weight.in_features > INT8_MAX_INPUTS:
        raise ValueError(f"values has {weight.in_features} inputs; int32 sums are exact up to {INT8_MAX_INPUTS}: split the layer")
    if weight.bits == 4 and weight.group_size not in GROUP_SIZES:
        raise ValueError(f"scales has groups of {weight.group_size} inputs; they must be one of {', '.join(map(str, GROUP_SIZES))}")
    if not torch.isfinite(weight.scales).all():
        raise ValueError("scales holds an infinity or NaN")
    if weight.zeros is not None and bool((weight.zeros > 15).any()):
        raise ValueError("zeros holds a value above 15")
    if weight.order is not None:
        _check_order(weight.order, weight.in_features)
