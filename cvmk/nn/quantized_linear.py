"""A linear layer that holds a quantised weight: `ops.int8_linear` or `ops.int4_linear` as a module that is moved, cast, copied and saved like others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cvmk import ops
from cvmk.nn.linear import Activation
from cvmk.ops import QuantizedWeight
from cvmk.ops.quantize import GROUP_SIZES, WEIGHT_TENSORS, rounded_rows

_SMOOTH = "smooth_scale"
_RANGE = "input_range"


class QuantizedLinear(nn.Module):
    """activation(x W^T + b) with W [N, K] in 8 or 4 bits.

    weight        `QuantizedWeight` of `ops.quantize_int8`, `ops.quantize_int4` or `QuantizedWeight.from_tensors`.
    bias          [N], floating, or None. It becomes a parameter.
    smooth_scale  [K], floating, or None; 8 bits only: SmoothQuant's scale, by which W was multiplied before it was quantised.
    activations   what the weight is multiplied with: "token", rows of x that are quantised to 8 bits each by its largest magnitude, as `ops.int8_linear`
                  does (the default of 8 bits), "static" (8 bits only), all by one magnitude, or "float", x as it is (the default of 4 bits).
    input_range   [1], floating, above 0: that magnitude, of x / smooth_scale; with "static" only, whose sign it is.

    The weight stands packed for its device. In a state dict it is canonical, so that every machine loads it, whatever its processor: the tensors
    of `QuantizedWeight.tensors` as "weight.values", "weight.scales" and, where there are some, "weight.zeros" and "weight.order"; with them
    "smooth_scale", "input_range" and "bias". A pickle holds them in this form too. `.to(device)` packs the weight for the new device; `.half()`,
    `.bfloat16()`, `.double()` and `.to(dtype)` cast the bias and leave the weight, `smooth_scale` and `input_range`, which are float32 by definition.

    Raises TypeError and ValueError for arguments that do not fit.
    """

    weight_key: ClassVar[str] = "weight."
    """What stands before the names of the weight's tensors in a state dict."""
    bias: nn.Parameter | None
    smooth_scale: Tensor | None
    input_range: Tensor | None
    BITS: ClassVar[int | None] = None
    """The bits of every layer of the class; None: any."""

    _weight_values: Tensor  # with the next three, the weight; packed, they are nobody else's affair
    _weight_scales: Tensor
    _weight_zeros: Tensor | None
    _weight_order: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        smooth_scale: Tensor | None = None,
        activations: str | None = None,
        input_range: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"QuantizedLinear: weight is a {type(weight).__name__}; quantise it with ops.quantize_int8 or quantize_int4, or use from_linear")
        if self.BITS not in (None, weight.bits):
            raise ValueError(f"{type(self).__name__}: the weight has {weight.bits} bits and not {self.BITS}")
        _check_vector("bias", bias, weight.out_features, weight.device)
        _check_vector(_SMOOTH, smooth_scale, weight.in_features, weight.device)
        if smooth_scale is not None and weight.bits != 8:
            raise ValueError(f"QuantizedLinear: smooth_scale goes with 8 bits and the weight has {weight.bits}: leave it out")
        _check_vector(_RANGE, input_range, 1, weight.device)
        self.activations = _checked_activations(activations, weight.bits, input_range is not None)
        self.out_features, self.in_features, self.bits, self.group_size = weight.out_features, weight.in_features, weight.bits, weight.group_size
        self._hold(weight.pack())
        self._place(_SMOOTH, None if smooth_scale is None else smooth_scale.detach().float())
        self._place(_RANGE, None if input_range is None else input_range.detach().float())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        bits: int = 8,
        group_size: int = 64,
        symmetric: bool = True,
        order: Tensor | None = None,
        smooth_scale: Tensor | None = None,
        activations: str | None = None,
        input_range: Tensor | None = None,
    ) -> QuantizedLinear:
        """A float layer's weight, rounded to nearest in 8 bits (`ops.quantize_int8`) or 4 (`ops.quantize_int4`, to which `group_size`, `symmetric`
        and `order` belong), on the layer's device; its bias copied.

        Raises TypeError for what is no `torch.nn.Linear`, ValueError for a weight that cannot be quantised so.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"QuantizedLinear.from_linear: linear is a {type(linear).__name__}, not a torch.nn.Linear")
        _check_bits(bits)
        _check_vector(_SMOOTH, smooth_scale, linear.in_features, linear.weight.device)
        if bits == 8:
            smoothed = linear.weight if smooth_scale is None else linear.weight.detach().float() * smooth_scale.float()
            weight = ops.quantize_int8(smoothed)
        else:
            weight = ops.quantize_int4(linear.weight, group_size, symmetric=symmetric, order=order)
        bias = None if linear.bias is None else linear.bias.detach().clone().requires_grad_(linear.bias.requires_grad)
        return cls(weight, bias, smooth_scale=smooth_scale, activations=activations, input_range=input_range).train(linear.training)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        group_size: int = 64,
        smooth: bool = False,
        activations: str | None = None,
        input_range: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """A layer of zeros for `load_state_dict`; `dtype` is the bias'. Raises ValueError for sizes that no quantised weight has."""
        _check_bits(bits)
        if min(in_features, out_features) < 1 or (bits == 4 and (group_size not in GROUP_SIZES or in_features % group_size)):
            groups = f" in groups of {group_size}: they are of 32, 64 or 128 and divide the inputs" if bits == 4 else ""
            raise ValueError(f"QuantizedLinear: no weight of {bits} bits is [{out_features}, {in_features}]{groups}")
        scales: tuple[int, ...]
        if bits == 8:
            values, scales, group_size = torch.zeros(out_features, in_features, dtype=torch.int8, device=device), (out_features,), in_features
        else:  # 8 stands for 0, in both halves of a byte
            values = torch.full((out_features, in_features // 2), 0x88, dtype=torch.uint8, device=device)
            scales = (out_features, in_features // group_size)
        weight = QuantizedWeight(values, values.new_ones(scales, dtype=torch.float32), None, None, out_features, in_features, bits, group_size)
        vector = values.new_zeros(out_features, dtype=dtype or torch.get_default_dtype()).requires_grad_() if bias else None
        scale, span = (values.new_ones(count, dtype=torch.float32) if wanted else None for wanted, count in ((smooth, in_features), (input_range, 1)))
        return cls(weight, vector, smooth_scale=scale, activations=activations, input_range=span)

    # -- the weight --------------------------------------------------------------------------------------------------------------
    @property
    def weight(self) -> QuantizedWeight:
        """W, packed for the device that it is on. It may be replaced by one of the same sizes."""
        tensors = self._weight_values, self._weight_scales, self._weight_zeros, self._weight_order
        return QuantizedWeight(*tensors, self.out_features, self.in_features, self.bits, self.group_size, self._layout)

    @weight.setter
    def weight(self, weight: QuantizedWeight) -> None:
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"QuantizedLinear: weight is a {type(weight).__name__}; quantise it with ops.quantize_int8 or ops.quantize_int4")
        wrong = self._differences(weight)
        if wrong:
            raise ValueError(f"QuantizedLinear: {wrong}")
        self._hold(weight.pack())

    def _hold(self, weight: QuantizedWeight) -> None:
        for name in WEIGHT_TENSORS:
            self._place(_held(name), getattr(weight, name))
        self._layout = weight.layout

    def _place(self, name: str, tensor: Tensor | None) -> None:
        """Keep a tensor as a buffer; None as an attribute, since torch.export miscounts buffers that are None."""
        self._buffers.pop(name, None)
        self.__dict__.pop(name, None)
        if tensor is None:
            self.__dict__[name] = None
        else:
            self.register_buffer(name, tensor, persistent=False)

    def _differences(self, weight: QuantizedWeight) -> str:
        """Why a weight does not belong into this layer; empty where it does."""
        found, own = (f"a weight of {w.bits} bits [{w.out_features}, {w.in_features}]" for w in (weight, self))
        if found == own and weight.group_size != self.group_size:
            found, own = (f"{text} in groups of {w.group_size}" for text, w in ((found, weight), (own, self)))
        return "" if found == own else f"{found} was given where the layer has {own}"

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """x [..., K], floating -> [..., N] (half of them for swiglu) in x's dtype."""
        if self.bits == 8:
            return ops.int8_linear(x, self.weight, self.bias, smooth_scale=self.smooth_scale, input_range=self.input_range, activation=activation)
        return ops.int4_linear(rounded_rows(x) if self.activations == "token" else x, self.weight, self.bias, activation=activation)

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.bits == 4 else ""
        smooth = ", smooth_scale=True" if self.smooth_scale is not None else ""
        rows = f", activations={self.activations!r}" if self.bits == 4 or self.activations == "static" else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, bits={self.bits}{group}{smooth}{rows}"

    # -- moved and cast ----------------------------------------------------------------------------------------------------------
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What `.to`, `.half`, `.cuda`, `.share_memory` and their like do to every tensor. Whatever `fn` casts, the weight keeps its types."""
        own = (*map(_held, WEIGHT_TENSORS), _SMOOTH, _RANGE)
        kept = {name: self._buffers.pop(name) for name in own if name in self._buffers}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(kept)
        weight = self.weight
        moves = fn(torch.empty(0, dtype=torch.uint8, device=weight.device)).device != weight.device
        if moves:
            weight = weight.plain()
        moved: dict[str, Any] = {name: _moved(fn, getattr(weight, name)) for name in WEIGHT_TENSORS}
        weight = replace(weight, **moved)
        self._hold(weight.pack() if moves else weight)
        self._place(_SMOOTH, _moved(fn, self.smooth_scale))
        self._place(_RANGE, _moved(fn, self.input_range))
        return self

    # -- saved and loaded --------------------------------------------------------------------------------------------------------
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.weight.tensors().items():
            destination[f"{prefix}{self.weight_key}{name}"] = tensor
        for name, vector in ((_SMOOTH, self.smooth_scale), (_RANGE, self.input_range)):
            if vector is not None:
                destination[prefix + name] = vector

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        at = prefix + self.weight_key
        own = {at + name for name in WEIGHT_TENSORS}
        whole = (f"{prefix}weight", prefix + _SMOOTH, prefix + _RANGE)
        ours = {key: state_dict[key] for key in state_dict if key in own or key.startswith(f"{prefix}weight.") or key in whole}
        rest = {key: value for key, value in state_dict.items() if key not in ours}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        tensors = {name: ours.pop(key) for name in WEIGHT_TENSORS if (key := at + name) in ours}
        vectors = {name: ours.pop(prefix + name, None) for name in (_SMOOTH, _RANGE)}
        here = [name for name in vectors if getattr(self, name) is not None]
        if f"{prefix}weight" in ours:
            del ours[f"{prefix}weight"]
            error_msgs.append(
                f"{prefix}weight is one tensor, of a layer that is not quantised: load it into torch.nn.Linear, then use QuantizedLinear.from_linear"
            )
            return
        if strict:
            unexpected_keys.extend(ours)
        missing = [at + name for name in ("values", "scales") if name not in tensors]
        missing += [prefix + name for name in here if vectors[name] is None]
        if len(missing) == 2 + len(here) and not tensors:
            missing_keys.extend(missing)  # nothing of the weight: without `strict` it stays
        elif missing:
            error_msgs.append(f"{' and '.join(missing)} is missing beside {prefix}weight's other tensors: a weight is loaded whole")
        else:
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            self._load(tensors, vectors, prefix, assign, error_msgs)

    def _load(self, tensors: dict[str, Tensor], vectors: Mapping[str, Tensor | None], prefix: str, assign: bool, error_msgs: list[str]) -> None:
        """The weight and its vectors from their canonical tensors; nothing is changed where one does not fit."""
        smooth, span = vectors[_SMOOTH], vectors[_RANGE]
        here = self.weight.device
        if here.type == "meta" and not assign:
            return  # as PyTorch: a parameter without memory takes nothing in
        device = tensors["values"].device if assign else here
        try:
            weight = QuantizedWeight.from_tensors({name: tensor.detach().to(device) for name, tensor in tensors.items()})
            wrong = self._differences(weight)
            if wrong:
                raise ValueError(wrong)
            if smooth is not None:
                if self.bits != 8:
                    raise ValueError("smooth_scale goes with 8 bits")
                _check_vector(_SMOOTH, smooth, self.in_features, smooth.device)
            if span is not None:
                if self.activations != "static":
                    raise ValueError(f"input_range goes with activations by one magnitude, and these are {self.activations!r}")
                _check_vector(_RANGE, span, 1, span.device)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        self._hold(weight)
        for name, vector in vectors.items():
            self._place(name, None if vector is None else vector.detach().to(device, torch.float32))

    def __getstate__(self) -> dict[str, Any]:
        """For a pickle: the weight in its canonical form."""
        plain = self.weight.plain()
        tensors = {_held(name): tensor for name in WEIGHT_TENSORS if (tensor := getattr(plain, name)) is not None}
        return {**super().__getstate__(), "_buffers": {**self._buffers, **tensors}, "_layout": plain.layout}

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLinear:
        made = self.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold(self.weight.pack())


def _held(name: str) -> str:
    """The buffer that holds a tensor of the weight."""
    return f"_weight_{name}"


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Tensor | None:
    """fn(tensor) as far as it moves; its bytes are handed over, which no cast of floating numbers touches."""
    if tensor is None:
        return None
    whole = tensor.detach().contiguous()
    found = fn(whole.view(-1).view(torch.uint8))
    if whole.device.type == "meta":  # `to_empty`: whatever was in that memory would be an order of inputs that are not there
        return torch.zeros_like(whole, device=found.device)
    if found.dtype != torch.uint8:  # `.type(dtype)` casts integers too
        return whole.to(found.device)
    return found.view(whole.dtype).view(whole.shape)


def _checked_activations(activations: str | None, bits: int, ranged: bool) -> str:
    """The activations of a layer of so many bits; `ranged` says whether it has an input_range. Raises ValueError for what it does not have."""
    allowed = ("token", "static") if bits == 8 else ("float", "token")
    if activations is not None and activations not in allowed:
        raise ValueError(f"QuantizedLinear: activations is {activations!r}, and a weight of {bits} bits has {' or '.join(map(repr, allowed))}")
    found = activations or ("static" if ranged and bits == 8 else allowed[0])
    if ranged != (found == "static"):
        raise ValueError(f"QuantizedLinear: activations are {found!r}, which {'need an' if found == 'static' else 'have no'} input_range")
    return found


def _check_bits(bits: int) -> None:
    if bits not in (8, 4):
        raise ValueError(f"QuantizedLinear: bits is {bits!r}, not 8 or 4")


def _check_vector(name: str, vector: Tensor | None, length: int, device: torch.device) -> None:
    if vector is None:
        return
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        raise TypeError(f"QuantizedLinear: {name} is {vector.dtype if isinstance(vector, Tensor) else type(vector).__name__}; it must be a floating tensor")
    if vector.shape != (length,):
        raise ValueError(f"QuantizedLinear: {name} is {list(vector.shape)}; it must be [{length}]")
    if vector.device != device:
        raise ValueError(f"QuantizedLinear: {name} is on {vector.device} and the weight on {device}; they must be on one device")
