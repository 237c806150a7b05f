"""Derivatives of an op: the first runs the backward pass of a backend, higher ones differentiate the reference's forward, so that a fused
kernel never needs a second derivative of its own.

`Forward` runs by itself where nobody observes a call. Elsewhere it and `Backward` are kernels of PyTorch's dispatcher under its key for autograd: below
vmap and functional transforms, which hand them one sample or one level at a time, and above modes and tracers. Both are entered through the
C++ `apply`, for the Python one would look for the transforms that were already taken care of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import _C, Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from cvmk.ops._backend import allowed, allowing
from cvmk.ops._call import make, picked
from cvmk.ops._watch import grad_enabled, transforms, unobserved

if TYPE_CHECKING:
    from cvmk.ops._op import Op


def autograd_kernels(op: Op, library: torch.library.Library) -> None:
    """Register the op's derivatives with PyTorch's dispatcher."""

    def forward(keyset: Any, *arguments: Any) -> Any:
        refuse_tangents(op, op.fields, arguments)
        if grad_enabled() and op.asks(arguments):
            return _at_this_level(op._apply, keyset, arguments)
        return below(op._forward, keyset, arguments, grad_enabled())

    library.impl(f"{op.name}_forward", forward, "Autograd", with_keyset=True)
    if not op.differentiable:
        return
    apply = super(torch.autograd.Function, _backward_function(op)).apply  # type: ignore[misc]
    leaves = op.outputs + op.tensors
    names = [argument.name for argument in op._backward._schema.arguments][:leaves]

    def backward(keyset: Any, *arguments: Any) -> Any:
        refuse_tangents(op, names, arguments)
        if grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:leaves]):
            return _at_this_level(apply, keyset, arguments)
        return below(op._backward, keyset, arguments, grad_enabled())

    library.impl(f"{op.name}_backward", backward, "Autograd", with_keyset=True)


def refuse_tangents(op: Op, names: Sequence[str], arguments: Sequence[Any]) -> None:
    """No pass carries a forward-mode derivative, and PyTorch takes the derivative of an op that has none for zero."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in zip(names, arguments, strict=False):
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{op.name} has no forward-mode derivative, and {name} has a tangent; differentiate in reverse mode")


def _at_this_level(apply: Any, keyset: Any, arguments: Any) -> Any:
    """An autograd function inside of a functional transform, at the level that is being differentiated."""
    if transforms() is None:
        return apply(keyset, *arguments)
    with enable_single_level_autograd_function():
        return apply(keyset, *arguments)


def below(packet: Any, keyset: Any, arguments: Any, record: bool = True) -> Any:
    """The op on the keys of the dispatcher behind autograd. Inside of a transform the next level decides anew what it records, if gradients
    were on (`record`); behind the last one an implementation records nothing: a constant argument that asks for a gradient gets none."""
    with _C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(record and transforms() is not None):
        return packet.redispatch(keyset & _C._after_autograd_keyset, *arguments)


def forward_function(op: Op) -> type[torch.autograd.Function]:
    """The forward pass with its first derivative."""
    tensors, kept = op.tensors, picked(op.saved)
    places = [i + 1 for i in op.differentiable]
    nothing, needed = [None] * (len(op.fields) + 1), picked(places)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            """keyset: what is left of the dispatcher's keys; None where nobody observes the call."""
            ctx.set_materialize_grads(False)
            hand_on, remembered = None, arguments[:tensors]
            if op.keeps is not None:
                arguments = (*arguments[: op.keeps], True, *arguments[op.keeps + 1 :])
            if keyset is None:
                call: Any = make(op.call, arguments)
                results, hand_on = _forward_directly(op, call)
                if op.stand_ins is not None:
                    remembered = tuple(op.stand_ins(call, make(op.out, results if isinstance(results, tuple) else (results,))))
            else:
                results = below(op._forward, keyset, arguments)
            ctx.save_for_backward(*remembered, *kept(results if isinstance(results, tuple) else (results,)))
            ctx.left = keyset is None, arguments[tensors:], allowed(), hand_on
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            result: list[Any] = nothing.copy()
            given = [grad for grad in grads if grad is not None]
            if not given:
                return tuple(result)
            needs, names = needed(ctx.needs_input_grad), ctx.left[2]
            if names == allowed():
                found = _gradients(ctx, op, grads, given, needs)
            else:
                with allowing(names):
                    found = _gradients(ctx, op, grads, given, needs)
            for at, need, value in zip(places, needs, found if isinstance(found, tuple) else (found,), strict=True):
                if need:
                    result[at] = value
            return tuple(result)

    Forward.__name__, Forward._backward_cls.__name__ = op.name, f"{op.name}_backward"  # what profilers call them
    return Forward


def _forward_directly(op: Op, call: Any) -> tuple[Any, Any]:
    """The forward pass and, where the backend makes the gradient along with it, what hands that on."""
    backend = op.choose("forward", call)
    if backend.forward_with_gradient is not None:
        found: tuple[Any, Any] | None = backend.forward_with_gradient(call)
        if found is not None:
            return found
    return op.run_by(backend, call), None


def _gradients(ctx: Any, op: Op, grads: tuple[Any, ...], given: list[Tensor], needs: tuple[bool, ...]) -> Any:
    """What the backward pass returns."""
    direct, rest, names, hand_on = ctx.left
    if hand_on is not None:
        ctx.left = direct, rest, names, None  # what is handed on is its taker's then
    # With gradients on they will be differentiated; a batch of them (is_grads_batched) is no tensor that a kernel can read.
    directly = direct and not grad_enabled() and unobserved(given) is not None and not any(map(is_legacy_batchedtensor, given))
    if hand_on is not None and directly and len(given) == 1 and grads[0] is not None:
        found = hand_on(grads[0])
        if found is not None:
            return found
    saved = ctx.saved_tensors
    tensors, kept = saved[: op.tensors], saved[op.tensors :]
    if directly:
        return op.run_backward(make(op.out, grads), make(op.call, (*tensors, *rest)), op.saved_out(kept), make(op.needs, needs))
    return op._backward(*grads, *tensors, *kept, *rest, list(needs))


def _backward_function(op: Op) -> type[torch.autograd.Function]:
    tensors, outputs = op.tensors, op.outputs

    class Backward(torch.autograd.Function):
        """The first derivative by a backend; higher ones by differentiating the reference's forward."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*arguments[: outputs + tensors])
            ctx.rest, ctx.needs, ctx.count = arguments[outputs + tensors + len(op.saved) : -1], arguments[-1], len(arguments)
            return below(op._backward, keyset, arguments)

        @staticmethod
        def backward(ctx: Any, *grads_of_grads: Any) -> Any:
            with torch.enable_grad():
                # Views, for one tensor may stand in several places (self-attention of x), and each place needs its own derivative.
                leaves = [leaf.view_as(leaf) if leaf is not None and leaf.requires_grad else leaf for leaf in ctx.saved_tensors]
                if any(need and leaf is not None and not leaf.requires_grad for leaf, need in zip(leaves, ctx.needs_input_grad[1:], strict=False)):
                    raise NotImplementedError(
                        f"the derivative of {op.name}'s gradient is asked for after the transform that took the gradient has ended (a Jacobian by"
                        " torch.func.jacrev of a gradient): take it by nested torch.func.grad or by torch.autograd"
                    )
                for i in op.constants:
                    constant = leaves[outputs + i]
                    leaves[outputs + i] = None if constant is None else constant.detach()
                found = _second_derivative(op, leaves, ctx.rest, ctx.needs, grads_of_grads)
            return None, *found, *(None,) * (ctx.count - len(leaves))

    return Backward


def _second_derivative(op: Op, leaves: list[Any], rest: Any, needs: Any, grads_of_grads: Any) -> list[Any]:
    """What the gradients of the first derivative add to the leaves (the results' gradients, the call's tensors)."""
    nothing: list[Any] = [None] * len(leaves)
    grads, inputs = leaves[: op.outputs], leaves[op.outputs :]
    again = op.reference.forward(make(op.call, (*inputs, *rest)))
    again = (again,) if isinstance(again, Tensor) else again
    pairs = [(out, grad) for out, grad in zip(again, grads, strict=True) if grad is not None and out.requires_grad]
    wanted = [(i, gg) for i, gg, need in zip(op.differentiable, grads_of_grads, needs, strict=True) if gg is not None and need]
    if not pairs or not wanted:
        return nothing
    first = torch.autograd.grad(
        [out for out, _ in pairs], [inputs[i] for i, _ in wanted], [grad for _, grad in pairs], create_graph=True, allow_unused=True
    )
    second = [(value, gg) for value, (_, gg) in zip(first, wanted, strict=True) if value is not None and value.requires_grad]
    where = [i for i, leaf in enumerate(leaves) if leaf is not None and leaf.requires_grad]
    if not second or not where:
        return nothing
    found = torch.autograd.grad([value for value, _ in second], [leaves[i] for i in where], [gg for _, gg in second], create_graph=True, allow_unused=True)
    for i, value in zip(where, found, strict=True):
        nothing[i] = value
    return nothing
