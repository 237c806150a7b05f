"""Calls of every op with tensors that have no memory behind them: a storage that was given back, or a zero tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cvmk import ops
from cvmk.ops.quantize import QuantizedWeight
from cvmk.ops.triton import int4_linear

Tensors = dict[str, Tensor]
GIVEN_BACK, WITH_GAPS, ZERO = "given back", "given back, with gaps", "zero tensor"


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _attention(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    tensors = {"q": _normal(1, 2, 3, 16), "k": _normal(1, 2, 5, 16), "v": _normal(1, 2, 5, 16), "bias": _normal(1, 2, 3, 5), "key_lengths": torch.tensor([4])}
    return tensors, ops.flash_attention


def _attention_distill(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    shapes = {"q": 3, "k": 5, "v": 5, "teacher_q": 3, "teacher_k": 5}
    return {name: _normal(1, 2, rows, 16) for name, rows in shapes.items()}, ops.flash_attention_distill


def _attention_kl(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    shapes = {"student_q": 3, "student_k": 5, "teacher_q": 3, "teacher_k": 5}
    return {name: _normal(1, 2, rows, 16) for name, rows in shapes.items()}, ops.attention_kl


def _scan(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    tensors = {"u": _normal(1, 2, 6), "delta": _normal(1, 2, 6).abs(), "A": -_normal(2, 4).abs(), "B": _normal(1, 4, 6), "C": _normal(1, 4, 6)}
    return tensors | {"D": _normal(2), "z": _normal(1, 2, 6), "delta_bias": _normal(2), "initial_state": _normal(1, 2, 4)}, ops.selective_scan


def _update(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    tensors = {"state": _normal(1, 2, 4), "x": _normal(1, 2), "dt": _normal(1, 2).abs(), "A": -_normal(2, 4).abs(), "B": _normal(1, 4), "C": _normal(1, 4)}
    return tensors | {"D": _normal(2), "z": _normal(1, 2), "dt_bias": _normal(2)}, ops.selective_state_update


def _adamw(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    tensors = {"param": _normal(6), "grad": _normal(6), "exp_avg": _normal(6), "exp_avg_sq": _normal(6).abs()}

    def call(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, ...]:
        ops.adamw(param, grad, exp_avg, exp_avg_sq, step=1, learning_rate=0.1)
        return param, exp_avg, exp_avg_sq

    return tensors, call


def _int8(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    made = ops.quantize_int8(_normal(4, 32))

    def call(x: Tensor, values: Tensor, scales: Tensor, **rest: Tensor) -> Any:
        return ops.int8_linear(x, QuantizedWeight(values, scales, None, None, 4, 32, 8, 32, made.layout), **rest)

    return {"x": _normal(3, 32), "values": made.values, "scales": made.scales, "bias": _normal(4), "smooth_scale": _normal(32).abs()}, call


def _int4(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    made = ops.quantize_int4(_normal(4, 64), 32, symmetric=False, order=torch.arange(64).flip(0))
    if backend in ("triton", "cuda"):  # kernels for GPUs take weights in their own layout, which those on the CPU are not packed in by themselves
        made = int4_linear.pack(made.plain())
    assert made.zeros is not None and made.order is not None

    def call(x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor, order: Tensor, bias: Tensor) -> Any:
        return ops.int4_linear(x, QuantizedWeight(values, scales, zeros, order, 4, 64, 4, 32, made.layout), bias)

    return {"x": _normal(3, 64), "values": made.values, "scales": made.scales, "zeros": made.zeros, "order": made.order, "bias": _normal(4)}, call


def _kd_loss(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    tensors = {"student_logits": _normal(3, 7), "teacher_logits": _normal(3, 7), "target": torch.tensor([1, 0, 6])}
    return tensors | {"normalizer": torch.tensor(2.0)}, ops.kd_loss


def _linear_kd_loss(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    tensors = {"student_hidden": _normal(3, 16), "student_weight": _normal(7, 16), "teacher_hidden": _normal(3, 16), "teacher_weight": _normal(7, 16)}
    return tensors | {"target": torch.tensor([1, 0, 6])}, ops.linear_kd_loss


def _residual_norm(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    return {"x": _normal(3, 16), "branch": _normal(3, 16), "weight": _normal(16), "bias": _normal(16)}, ops.residual_norm


def _embed(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    return {"ids": torch.tensor([[1, 0, 6]]), "weight": _normal(7, 16), "positions": _normal(3, 16)}, ops.embed


def _fused_linear(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    return {"x": _normal(3, 32), "weight": _normal(4, 32), "bias": _normal(4)}, ops.fused_linear


def _conv(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    return {"x": _normal(2, 5, 7), "weight": _normal(5, 4), "bias": _normal(5), "initial_state": _normal(2, 5, 3)}, ops.causal_conv1d


def _conv_update(backend: str) -> tuple[Tensors, Callable[..., Any]]:
    return {"state": _normal(2, 5, 3), "x": _normal(2, 5), "weight": _normal(5, 4), "bias": _normal(5)}, ops.causal_conv1d_update


CASES: dict[str, Callable[[str], tuple[Tensors, Callable[..., Any]]]] = {
    "adamw": _adamw,
    "flash_attention": _attention,
    "flash_attention_distill": _attention_distill,
    "attention_kl": _attention_kl,
    "selective_scan": _scan,
    "selective_state_update": _update,
    "causal_conv1d": _conv,
    "causal_conv1d_update": _conv_update,
    "fused_linear": _fused_linear,
    "int8_linear": _int8,
    "int4_linear": _int4,
    "kd_loss": _kd_loss,
    "linear_kd_loss": _linear_kd_loss,
    "residual_norm": _residual_norm,
    "embed": _embed,
}


def broken(tensor: Tensor, kind: str) -> Tensor:
    """A tensor of the same sizes with no memory; the storage that was given back is one of more elements, and the tensor begins within it. With gaps,
    its elements lie two apart, so that kernels are handed a copy."""
    if kind == ZERO:
        return torch._efficientzerotensor(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
    whole = torch.cat([tensor.new_zeros(3), tensor.flatten()])
    view = whole[3:].view(tensor.shape)
    if kind == WITH_GAPS:
        whole = torch.cat([tensor.new_zeros(3), tensor.flatten().repeat_interleave(2)])
        view = whole[3::2].view(tensor.shape)
    whole.untyped_storage().resize_(0)
    return view


def check(op: str, backend: str, device: torch.device | str = "cpu") -> None:
    """Each tensor in turn, each kind, forward: an error that says what happened, or, where PyTorch's own operations met it first, any error or for a zero
    tensor the right numbers. No process ends, and nothing is returned that is not so."""
    with ops.use(backend):
        tensors, call = CASES[op](backend)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        call(**_copies(tensors))
        for name, kind in itertools.product(tensors, (GIVEN_BACK, WITH_GAPS, ZERO)):
            try:
                found = call(**{**_copies(tensors), name: broken(tensors[name], kind)})
            except (RuntimeError, NotImplementedError, ValueError) as error:
                assert str(error), (op, name, kind)
                continue
            assert kind == ZERO, f"{op}: {name} was {kind} and no error came"
            expected = call(**{**_copies(tensors), name: torch.zeros_like(tensors[name])})
            for got, want in zip(_all(found), _all(expected), strict=True):
                torch.testing.assert_close(got, want, msg=f"{op}: {name} was a {kind}, and a wrong number came")


def check_messages(op: str, backend: str, names: tuple[str, ...], device: torch.device | str = "cpu") -> None:
    """The kernels' own refusal, for tensors that reach them as they are."""
    with ops.use(backend):
        tensors, call = CASES[op](backend)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        for name in names:
            with pytest.raises(RuntimeError, match="has no memory behind it: its storage was given back, or it is a zero tensor"):
                call(**{**_copies(tensors), name: broken(tensors[name], GIVEN_BACK)})


def check_backward(op: str, backend: str, leaf: str, device: torch.device | str = "cpu") -> None:
    """A tensor that is given back between the passes, as sharded training does, is refused by the second."""
    with ops.use(backend):
        tensors, call = CASES[op](backend)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        tensors[leaf] = tensors[leaf].clone().requires_grad_()
        loss = sum(out.float().sum() for out in _all(call(**tensors)) if out.requires_grad)
        tensors[leaf].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            loss.backward()  # type: ignore[union-attr]


def _copies(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _all(found: Any) -> Iterator[Tensor]:
    return iter(found if isinstance(found, tuple) else (found,))
