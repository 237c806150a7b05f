"""What an op is, which backends take a call, and why the others do not.

An op has one schema a pass (`cvmk::<op>_forward`, `cvmk::<op>_backward`), declared once with `torch.library`; its implementation
for every device picks a backend at run time, so a graph made by `torch.compile` or `torch.export` holds the op and not a choice.
Autograd stands outside the op (`Op.__call__`): the first derivative runs the backward pass of a backend, higher ones differentiate
the reference's forward, so that a fused kernel never needs a second derivative of its own.

Backends are found by file: `cvmk/ops/<backend>/<module>.py` holds `BACKENDS`, for the op module of the same name. Adding a
backend is adding that file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from cvmk import nvtx
from cvmk.ops._backend import PREFERENCE, Backend, allowed, no_backend
from cvmk.ops._dtypes import accumulation_dtype, autocast_dtype, autocast_float32, autocast_lower, not_needed
from cvmk.ops._op import OPS, library
from cvmk.ops._watch import autocast_enabled, grad_enabled, unobserved

_IMPLEMENTED_KEYS = ("CPU", "CUDA")
_CACHE_LIMIT = 4096
_autocast_enabled, _grad_enabled, _allowed = autocast_enabled, grad_enabled, allowed
__all__ = ["Backend", "accumulation_dtype", "autocast_dtype", "autocast_float32", "autocast_lower", "not_needed", "unobserved"]


class Op:
    """An op with a forward pass and, where it is differentiable, a backward pass.

    name          the op's name; the passes are `torch.ops.cvmk.<name>_forward` and `..._backward`.
    module        name of the files that hold its backends.
    forward       schema of the forward pass from the parenthesis on: the tensors first, then the rest.
    backward      schema of the backward pass, or None. Its arguments are: one optional gradient an output of the forward pass,
                  the forward's tensors, the saved outputs, the forward's other arguments, and `bool[] needs`, one a tensor.
                  It returns one gradient a *differentiable* tensor; one that is not needed comes back with no elements.
    tensors       how many leading arguments of the forward pass are tensors (or None).
    differentiable  indices of the tensors that have a gradient.
    saved         indices of the outputs that the backward pass reads.
    fake          shapes and dtypes of the results: {"forward": function, "backward": function}.
    principal     the argument whose dtype and device decide.
    """

    def __init__(
        self,
        name: str,
        *,
        module: str,
        forward: str,
        fake_forward: Callable[..., Any],
        backward: str | None = None,
        fake_backward: Callable[..., Any] | None = None,
        tensors: int = 0,
        differentiable: tuple[int, ...] = (),
        saved: tuple[int, ...] = (),
        principal: str,
    ) -> None:
        self.name, self.module, self.principal = name, module, principal
        self.tensors, self.differentiable, self.saved = tensors, differentiable, saved
        self.names: dict[str, tuple[str, ...]] = {}
        self.principal_at: dict[str, int] = {}
        self._backends: list[Backend] | None = None
        self._chosen: dict[Any, _Choices] = {}
        self.prepare: Callable[..., tuple[Any, ...]] | None = None
        self._forward = self._register("forward", forward, fake_forward)
        self.outputs = len(self._forward._schema.returns)
        if backward is not None:
            assert fake_backward is not None
            self._backward = self._register("backward", backward, fake_backward)
            self._function = _autograd_function(self)
            # PyTorch's own `apply` first looks for transforms, which are known to be absent where a call goes straight on.
            self._apply = super(torch.autograd.Function, self._function).apply  # type: ignore[misc]
        OPS[name] = self  # type: ignore[assignment]

    def _register(self, which: str, schema: str, fake: Callable[..., Any]) -> Any:
        full = f"{self.name}_{which}"
        library.define(full + schema, tags=(torch.Tag.pt2_compliant_tag,))

        def implementation(*arguments: Any) -> Any:
            return self.run(which, arguments)

        for key in _IMPLEMENTED_KEYS:
            library.impl(full, implementation, key)
        torch.library.register_fake(f"cvmk::{full}", fake, lib=library)
        packet = getattr(torch.ops.cvmk, full).default
        self.names[which] = tuple(argument.name for argument in packet._schema.arguments)
        self.principal_at[which] = self.names[which].index(self.principal)
        return packet

    def prepared_by(self, prepare: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """Decorator: the function that checks the public arguments and turns them into the schema's; `explain` calls it too."""
        @functools.wraps(prepare)
        def named(*args: Any, **kwargs: Any) -> Any:
            return _Recorded(dict(zip(self.names["forward"], prepare(*args, **kwargs), strict=True)))

        self.prepare = named
        return prepare

    def __call__(self, *arguments: Any) -> Any:
        """Run the forward pass on the schema's arguments, with autograd where a tensor asks for it."""
        if forward_ad._current_level >= 0:
            self._refuse_tangents(arguments)
        asks = unobserved(arguments[: self.tensors])
        if asks is False or (asks and not _grad_enabled()):
            return self.run("forward", arguments)
        if self.differentiable and _grad_enabled():
            return self._differentiate(bool(asks), arguments)
        return self._forward(*arguments)

    def _differentiate(self, direct: bool, arguments: Sequence[Any]) -> Any:
        """The forward pass where gradients are on; `direct`: straight to the implementation."""
        for index in self.differentiable:
            tensor = arguments[index]
            if tensor is not None and tensor.requires_grad:
                return (self._apply if direct else self._function.apply)(direct, *arguments)
        with torch.no_grad():  # a constant argument (a teacher's logits) may ask for a gradient: the result has none to give
            return self.run("forward", arguments) if direct else self._forward(*arguments)

    def _refuse_tangents(self, arguments: Sequence[Any]) -> None:
        """No pass carries a forward-mode derivative, and PyTorch takes the derivative of an op that has none for zero."""
        for name, tensor in zip(self.names["forward"], arguments[: self.tensors], strict=False):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(f"{self.name} has no forward-mode derivative, and {name} has a tangent; differentiate in reverse mode")

    def forget_choices(self) -> None:
        self._chosen.clear()

    @property
    def backends(self) -> list[Backend]:
        """The op's backends, the preferred one first."""
        if self._backends is None:
            found = []
            for folder in PREFERENCE:
                name = f"cvmk.ops.{folder}.{self.module}"
                if importlib.util.find_spec(f"cvmk.ops.{folder}") is None or importlib.util.find_spec(name) is None:
                    continue
                found += [backend for backend in importlib.import_module(name).BACKENDS if backend.op == self.name]
            self._backends = found
        return self._backends

    @property
    def reference(self) -> Backend:
        return next(backend for backend in self.backends if backend.name == "reference")

    def choose(self, which: str, arguments: Sequence[Any]) -> Backend:
        """The first allowed backend that takes the call. Raises NotImplementedError with every reason where none does.

        A choice holds for all calls with the same dtype and device of the principal argument and the same of whatever else was read to
        make it.
        """
        principal = arguments[self.principal_at[which]]
        key = (which, _allowed(), principal.dtype, principal.device)
        choices = self._chosen.get(key)
        if choices is not None:
            chosen = choices.backends.get(choices.key(arguments) if choices.at else None)
            if chosen is not None:
                return chosen
        named = _Recorded(dict(zip(self.names[which], arguments, strict=True)))
        chosen = self._find(which, arguments, named)
        if choices is not None:
            named.read.update(self.names[which][at] for at in choices.at)
        at = tuple([at for at, name in enumerate(self.names[which]) if name in named.read])
        if choices is None or choices.at != at or len(choices.backends) >= _CACHE_LIMIT:
            choices = self._chosen[key] = _Choices(at)
        choices.backends[choices.key(arguments)] = chosen
        return chosen

    def _find(self, which: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Backend:
        refusals: list[str] = []
        for backend in self.candidates():
            reasons = backend.reasons(which, _Named(dict(zip(self.names[which], arguments, strict=True))), self.principal, named)
            if not reasons:
                return backend
            refusals += reasons
        raise no_backend(self.name, refusals)

    def candidates(self) -> list[Backend]:
        allowed = _allowed()
        if not allowed:
            return self.backends
        return [backend for name in allowed for backend in self.backends if backend.name == name]

    def run(self, which: str, arguments: Sequence[Any]) -> Any:
        """The implementation behind the schema: choose, call, and hand back contiguous tensors."""
        backend = self.choose(which, arguments)
        function = backend.forward if which == "forward" else backend.backward
        assert function is not None
        if nvtx.LISTENING and arguments[self.principal_at[which]].is_cuda:
            function = nvtx.spanned(f"{self.name}_{which} {backend.name}", function)
        if _autocast_enabled():
            # Casts are decided by the public function; inside, a product of float32 stays one.
            with torch.autocast(arguments[self.principal_at[which]].device.type, enabled=False):
                results = function(*arguments)
        else:
            results = function(*arguments)
        if type(results) is not tuple:
            return results.contiguous()
        for result in results:
            if not result.is_contiguous():
                return tuple([result.contiguous() for result in results])
        return results

class _Named:
    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


class _Recorded(Mapping[str, Any]):
    """Arguments by name, and which of them were read."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values_by_name, self.read = values, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self.values_by_name[name]

    def __getattr__(self, name: str) -> Any:
        if name not in self.values_by_name:
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


class _Choices:
    """The backends chosen for calls of one pass, dtype and device, by what else was read to choose: the arguments at `at`."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at, self.backends = at, dict[Any, Backend]()

    def key(self, arguments: Sequence[Any]) -> Any:
        """What the choice hangs on; None where that is nothing."""
        return tuple([_signature(arguments[i]) for i in self.at]) if len(self.at) > 1 else _signature(arguments[self.at[0]]) if self.at else None


def _signature(value: Any) -> Any:
    if type(value) is str:
        return value
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.shape, value.stride()
    return tuple(value) if isinstance(value, list) else value


def _autograd_function(op: Op) -> Any:
    tensors, outputs = op.tensors, op.outputs
    nothing = [None] * (len(op.names["forward"]) + 1)

    class Backward(torch.autograd.Function):
        """The first derivative by a backend; higher ones by differentiating the reference's forward."""

        @staticmethod
        def forward(ctx: Any, needs: list[bool], *arguments: Any) -> Any:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*arguments[: outputs + tensors])
            ctx.rest, ctx.needs, ctx.count = arguments[outputs + tensors + len(op.saved) :], needs, len(arguments)
            return op._backward(*arguments, needs)

        @staticmethod
        def backward(ctx: Any, *grads_of_grads: Any) -> Any:
            with torch.enable_grad():
                # Views, for one tensor may stand in several places (self-attention of x), and each place needs its own derivative.
                leaves = [leaf.view_as(leaf) if leaf is not None and leaf.requires_grad else leaf for leaf in ctx.saved_tensors]
                grads, inputs = leaves[:outputs], leaves[outputs:]
                again = op.reference.forward(*inputs, *ctx.rest)
                again = (again,) if isinstance(again, torch.Tensor) else again
                pairs = [(out, grad) for out, grad in zip(again, grads, strict=True) if grad is not None and out.requires_grad]
                wanted = [(i, gg) for i, gg in zip(op.differentiable, grads_of_grads, strict=True) if gg is not None and ctx.needs[i]]
                if not pairs or not wanted:
                    return (None,) * (ctx.count + 1)
                first = torch.autograd.grad(
                    [out for out, _ in pairs], [inputs[i] for i, _ in wanted], [grad for _, grad in pairs], create_graph=True, allow_unused=True
                )
                second = [(value, gg) for value, (_, gg) in zip(first, wanted, strict=True) if value is not None and value.requires_grad]
                where = [i for i, leaf in enumerate(leaves) if leaf is not None and leaf.requires_grad]
                if not second or not where:
                    return (None,) * (ctx.count + 1)
                found = torch.autograd.grad(
                    [value for value, _ in second], [leaves[i] for i in where], [gg for _, gg in second], create_graph=True, allow_unused=True
                )
            result: list[Any] = [None] * ctx.count
            for i, value in zip(where, found, strict=True):
                result[i] = value
            return None, *result

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, direct: bool, *arguments: Any) -> Any:
            ctx.set_materialize_grads(False)
            results = op.run("forward", arguments) if direct else op._forward(*arguments)
            several = (results,) if isinstance(results, torch.Tensor) else results
            ctx.save_for_backward(*arguments[:tensors], *[several[i] for i in op.saved])
            ctx.direct, ctx.rest = direct, arguments[tensors:]
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            result: list[Any] = nothing.copy()
            given = [grad for grad in grads if grad is not None]
            if not given:
                return tuple(result)
            needs = list(ctx.needs_input_grad[1 : tensors + 1])
            arguments = (*grads, *ctx.saved_tensors, *ctx.rest)
            if _grad_enabled():  # only where the gradients will be differentiated
                found = Backward.apply(needs, *arguments)
            elif ctx.direct and unobserved(given) is not None:
                found = op.run("backward", (*arguments, needs))
            else:
                found = op._backward(*arguments, needs)
            several = (found,) if isinstance(found, torch.Tensor) else found
            for i, value in zip(op.differentiable, several, strict=True):
                if needs[i]:
                    result[i + 1] = value
            return tuple(result)

    return Forward
