"""An op: its schemas, the choice of a backend for each call, and the way there.

An op has one schema a pass (`cvmk::<op>_forward`, `cvmk::<op>_backward`), derived from its `Call` and `Out`; its implementation for every device
picks a backend at run time, so a graph made by `torch.compile` or `torch.export` holds the op and not a choice. A call that nobody observes
goes straight to the implementation; any other goes through PyTorch's dispatcher, where autograd stands as a kernel of the op
(`_autograd.py`), so that transforms, tracers and modes find it where they look for it.

Backends are found by file: `cvmk/ops/<backend>/<module>.py` holds `BACKENDS`, for the op module of the same name. Adding a
backend is adding that file.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import _C
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from cvmk import nvtx
from cvmk.ops._autograd import autograd_kernels, forward_function, refuse_tangents
from cvmk.ops._backend import PREFERENCE, Backend, allowed, no_backend
from cvmk.ops._call import fields_of, make, picked
from cvmk.ops._dtypes import not_needed
from cvmk.ops._measured import warn_where_unmeasured
from cvmk.ops._storage import CHECKING_MEMORY, guarded, shares_memory_with_itself
from cvmk.ops._watch import autocast_enabled, unobserved

library = torch.library.Library("cvmk", "DEF")
OPS: dict[str, Op] = {}
_IMPLEMENTED_KEYS = ("CPU", "CUDA")
_CACHE_LIMIT = 4096


class Op:
    """An op with a forward pass and, where it is differentiable, a backward pass.

    name            the op's name; the passes are `torch.ops.cvmk.<name>_forward` and `..._backward`.
    call, out       the NamedTuples of its arguments and results (`_call.py`).
    fake_forward    call -> out: shapes and dtypes of the results.
    differentiable  names of the tensors that have a gradient; without any there is no backward pass.
    saved           names of the results that the backward pass reads.
    principal       the field whose dtype and device decide; the first one by default.
    module          name of the files that hold the op's backends; that of the call's module by default.
    keeps           a flag among the call's fields, False as it is prepared, that autograd sets where it records the call: only then does the forward pass
                    keep what the backward pass needs. (Within a transform no tensor tells before that its gradient will be wanted.)
    stand_ins       (call, results) -> tensors that are kept for the backward pass in place of the call's, for a call that nobody traces: those whose
                    values it does not read need not stay in memory. The results' derivatives by stand-ins that ask for a gradient, with the results among
                    them taken for what they were made of, must be those by the call's tensors: second derivatives are made of them.
    function        makes the autograd function, where the op's derivative is not made as others' are.

    The backward pass's schema has the gradients of the results (each may be absent), the call's tensors, the saved results, the call's other
    fields, and `bool[] needs`, one a differentiable tensor. It returns one gradient each; one that is not needed comes back without elements.
    """

    def __init__(
        self,
        name: str,
        call: type,
        out: type,
        *,
        fake_forward: Callable[[Any], Any],
        differentiable: Sequence[str] = (),
        saved: Sequence[str] = (),
        principal: str | None = None,
        module: str | None = None,
        keeps: str | None = None,
        stand_ins: Callable[[Any, Any], Sequence[torch.Tensor | None]] | None = None,
        function: Callable[[Op], type[torch.autograd.Function]] = forward_function,
    ) -> None:
        fields, results = fields_of(call), fields_of(out)
        self.name, self.call, self.out = name, call, out
        self.fields, self.tensors, self.written, self.outputs = fields.names, fields.tensors, fields.written, len(results.names)
        self.differentiable = tuple([fields.names.index(field) for field in differentiable])
        self.saved = tuple([results.names.index(field) for field in saved])
        self._saved_places = picked([self.saved.index(i) if i in self.saved else -1 for i in range(self.outputs)])
        self.principal = principal or fields.names[0]
        self._principal_at = fields.names.index(self.principal)
        self.keeps = None if keeps is None else fields.names.index(keeps)
        self.stand_ins = stand_ins
        self.constants = tuple([i for i in range(fields.tensors) if i not in self.differentiable])
        self._lists = frozenset([i for i, kind in enumerate(fields.declared) if "[]" in kind])
        self._run_directly = self.run_written if fields.written else self.run_forward
        self.module = module or call.__module__.rpartition(".")[2]
        self.needs = _needs(tuple(differentiable))
        self.prepare: Callable[..., Any] | None = None
        self._fake_forward = fake_forward
        self._backends: list[Backend] | None = None
        self._chosen: dict[Any, _Choices] = {}
        self._apply: Callable[..., Any] | None = None
        self._forward = self._define_forward(fields.declared, results.declared)
        if differentiable:
            self._backward = self._define_backward(fields.declared, results)
        if differentiable or function is not forward_function:
            # The `apply` of PyTorch's Python class looks for transforms first; here it runs where none is, or as a kernel below them.
            self._apply = super(torch.autograd.Function, function(self)).apply  # type: ignore[misc]
            autograd_kernels(self, library)
        OPS[name] = self

    # -- schemas ---------------------------------------------------------------------------------------------------------------
    def _define_forward(self, declared: Sequence[str], results: Sequence[str]) -> Any:
        def implementation(*arguments: Any) -> Any:
            return self._as_returned(self.run_forward(make(self.call, arguments)))

        def fake(*arguments: Any) -> Any:
            return self._as_returned(self._fake_forward(make(self.call, arguments)))

        returns = results[0] if len(results) == 1 else f"({', '.join(results)})"
        packet = self._define("forward", f"({', '.join(declared)}) -> {returns}", implementation, fake)
        if self.written:

            def version_bump(keyset: Any, *arguments: Any) -> Any:
                increment_version([arguments[i] for i in self.written if not arguments[i].is_inference()])
                with _C._AutoDispatchBelowADInplaceOrView():
                    return packet.redispatch(keyset & _C._after_ADInplaceOrView_keyset, *arguments)

            library.impl(f"{self.name}_forward", version_bump, "ADInplaceOrView", with_keyset=True)
        return packet

    def _define_backward(self, declared: Sequence[str], results: Any) -> Any:
        grads = [f"Tensor? grad_{name}" for name in results.names]
        saved = [f"Tensor {results.names[i]}" for i in self.saved]
        schema = ", ".join([*grads, *declared[: self.tensors], *saved, *declared[self.tensors :], "bool[] needs"])

        def implementation(*arguments: Any) -> Any:
            grads, call, saved, needs = self.parts(arguments)
            found = self.run_backward(grads, call, saved, needs)
            several = [not_needed(call[self._principal_at]) if x is None else x for x in (found if isinstance(found, tuple) else (found,))]
            return several[0] if len(several) == 1 else tuple(several)

        def fake(*arguments: Any) -> Any:
            _, call, _, needs = self.parts(arguments)
            like, found = call[self._principal_at], []
            for i, need in zip(self.differentiable, needs, strict=True):
                tensor = call[i]
                found.append(tensor.new_empty(tensor.shape) if need and tensor is not None else not_needed(like))
            return found[0] if len(found) == 1 else tuple(found)

        returns = ", ".join(["Tensor"] * len(self.differentiable))
        return self._define("backward", f"({schema}) -> " + (f"({returns})" if len(self.differentiable) > 1 else returns), implementation, fake)

    def _define(self, which: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        full = f"{self.name}_{which}"
        library.define(full + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in _IMPLEMENTED_KEYS:
            library.impl(full, implementation, key)
        torch.library.register_fake(f"cvmk::{full}", fake, lib=library)
        return getattr(torch.ops.cvmk, full).default

    def _as_returned(self, results: Any) -> Any:
        """Results as the dispatcher takes them; None of an op that only writes to its arguments."""
        if not self.outputs:
            return None
        if self.outputs == 1:
            return results if isinstance(results, torch.Tensor) else results[0]
        return tuple(results)

    def parts(self, arguments: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """(gradients, call, saved, needs) of the backward schema's arguments."""
        first, kept = self.outputs + self.tensors, self.outputs + self.tensors + len(self.saved)
        grads: Any = make(self.out, arguments[: self.outputs])
        call: Any = make(self.call, (*arguments[self.outputs : first], *arguments[kept:-1]))
        return grads, call, self.saved_out(arguments[first:kept]), make(self.needs, arguments[-1])

    def saved_out(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The saved results in their places of an `Out`; None in the others."""
        return make(self.out, self._saved_places((*tensors, None)))

    def prepared_by(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the function that checks the public arguments and makes a `Call` of them; `explain` calls it too."""
        self.prepare = prepare
        return prepare

    # -- a call ----------------------------------------------------------------------------------------------------------------
    def __call__(self, call: Any) -> Any:
        """Run the forward pass, with autograd where a tensor asks for it. Returns the results as a tuple, or the only one."""
        if forward_ad._current_level >= 0:
            refuse_tangents(self, self.fields, call)
        asks = unobserved(call[: self.tensors])
        if asks is False:
            return self._run_directly(call)
        if asks is None:
            return self._forward(*call)
        if self._apply is not None and self.asks(call):
            return self._apply(None, *call)
        with torch.no_grad():  # a constant argument (a teacher's logits) may ask for a gradient: the result has none to give
            return self._run_directly(call)

    def asks(self, arguments: Sequence[Any]) -> bool:
        """Whether one of the differentiable tensors asks for a gradient."""
        for index in self.differentiable or range(self.tensors):
            tensor = arguments[index]
            if tensor is not None and tensor.requires_grad:
                return True
        return False

    def run_written(self, arguments: Sequence[Any]) -> Any:
        """The forward pass of an op that writes to an argument: whoever saved that for a backward pass is told that it has changed."""
        results = self.run_forward(make(self.call, arguments))
        increment_version([arguments[i] for i in self.written if not arguments[i].is_inference()])
        return results

    def _check_written(self, call: Any) -> None:
        """PyTorch's rules for tensors that are written to: RuntimeError for an inference tensor outside of inference mode, and for one whose
        elements share memory."""
        for i in self.written:
            tensor = call[i]
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(f"{self.name} writes to {self.fields[i]}, an inference tensor, outside of inference mode: clone() it first")
            if not tensor.is_contiguous() and shares_memory_with_itself(tensor):
                raise RuntimeError(f"{self.name} writes to {self.fields[i]}, whose elements share memory (expanded, or windows that overlap): clone() it")

    def run_forward(self, call: Any) -> Any:
        """The forward pass behind the schema: choose, call, and hand back contiguous tensors."""
        if self.written:
            self._check_written(call)
        return self.run_by(self.choose("forward", call), call)

    def run_by(self, backend: Backend, call: Any) -> Any:
        """The forward pass of a backend, its results contiguous."""
        function = backend.forward
        if nvtx.LISTENING or autocast_enabled():
            function = self._set_apart(backend, "forward", function, call)
        return contiguous(function(call))

    def run_backward(self, grads: Any, call: Any, saved: Any, needs: Any) -> Any:
        """The backward pass behind the schema."""
        backend = self.choose("backward", call)
        function = backend.backward
        assert function is not None
        if nvtx.LISTENING or autocast_enabled():
            function = self._set_apart(backend, "backward", function, call)
        return contiguous(function(grads, call, saved, needs))

    def _set_apart(self, backend: Backend, which: str, function: Callable[..., Any], call: Any) -> Callable[..., Any]:
        """A pass of a backend as profilers name it, and without autocast: casts are decided by the public function."""
        principal = call[self._principal_at]
        if nvtx.LISTENING and principal.is_cuda:
            function = nvtx.spanned(f"{self.name}_{which} {backend.name}", function)
        if not autocast_enabled():
            return function

        def run(*arguments: Any) -> Any:
            with torch.autocast(principal.device.type, enabled=False):
                return function(*arguments)

        return run

    # -- the choice ------------------------------------------------------------------------------------------------------------
    @property
    def backends(self) -> list[Backend]:
        """The op's backends, the preferred one first."""
        if self._backends is None:
            found: list[Backend] = []
            for folder in PREFERENCE:
                name = f"cvmk.ops.{folder}.{self.module}"
                if importlib.util.find_spec(f"cvmk.ops.{folder}") is None or importlib.util.find_spec(name) is None:
                    continue
                with torch.inference_mode(False):  # a module's constants serve the calls to come, which may have gradients
                    mine = [backend for backend in importlib.import_module(name).BACKENDS if backend.op == self.name]
                found += mine if folder in CHECKING_MEMORY else map(guarded, mine)
            self._backends = found
        return self._backends

    @backends.setter
    def backends(self, backends: Iterable[Backend] | None) -> None:
        """Replace them (tests do); None finds them anew."""
        self._backends = None if backends is None else list(backends)
        self._chosen.clear()

    @property
    def reference(self) -> Backend:
        return next(backend for backend in self.backends if backend.name == "reference")

    def choose(self, which: str, call: Any) -> Backend:
        """The first allowed backend that takes the call. Raises NoBackendError with every reason where none does.

        A choice holds for all calls with the same dtype and device of the principal argument and the same of whatever else was read to
        make it.
        """
        principal = call[self._principal_at]
        key = (which, allowed(), principal.dtype, principal.is_cpu or principal.device)
        choices = self._chosen.get(key)
        if choices is not None:
            chosen = choices.backends.get(choices.key(call) if choices.read else None)
            if chosen is not None:
                return chosen
        recorded = _Recorded(call)
        chosen = self._find(which, call, recorded)
        if choices is not None:
            for name, whole in choices.read.items():
                recorded.note(name, whole)
        if choices is None or choices.read != recorded.read or len(choices.backends) >= _CACHE_LIMIT:
            choices = self._chosen[key] = _Choices(self, recorded.read)
        choices.backends[choices.key(call)] = chosen
        warn_where_unmeasured(self.name, chosen.name, principal.device)
        return chosen

    def _find(self, which: str, call: Any, recorded: _Recorded) -> Backend:
        refusals: list[str] = []
        for backend in self.candidates():
            reasons = backend.reasons(which, call, self.principal, recorded)
            if not reasons:
                return backend
            refusals += reasons
        raise no_backend(self.name, refusals)

    def candidates(self) -> list[Backend]:
        """The allowed backends, in the order in which they are asked."""
        names = allowed()
        if not names:
            return self.backends
        return [backend for name in names for backend in self.backends if backend.name == name]

    def forget_choices(self) -> None:
        """Make every choice anew, where what a choice may not depend on has changed (the instruction sets that are allowed)."""
        self._chosen.clear()


def _needs(names: tuple[str, ...]) -> Any:
    return namedtuple("Needs", names)


def forget_choices() -> None:
    """`Op.forget_choices` of every op."""
    for op in OPS.values():
        op.forget_choices()


def contiguous(results: Any) -> Any:
    """The results of a pass, a tuple or the only one, without gaps; None stays."""
    if not isinstance(results, tuple):
        return results if results is None else results.contiguous()
    for result in results:
        if result is not None and not result.is_contiguous():
            return tuple([result if result is None else result.contiguous() for result in results])
    return results


class _Recorded:
    """A call, and which of its fields were read; of a tensor, whether more than its dtype."""

    def __init__(self, call: Any) -> None:
        self._call, self.read = call, dict[str, bool]()

    def note(self, name: str, whole: bool) -> None:
        self.read[name] = whole or self.read.get(name, False)

    def _note_all(self) -> None:
        for name in self._call._fields:
            self.note(name, True)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._call, name)
        if name not in self._call._fields:
            self._note_all()
            return value
        self.note(name, False)
        return _RecordedTensor(self, name, value) if isinstance(value, torch.Tensor) else value

    def __iter__(self) -> Iterator[Any]:
        self._note_all()
        return iter(self._call)

    def __getitem__(self, at: Any) -> Any:
        self._note_all()
        return self._call[at]

    def __len__(self) -> int:
        return len(self._call)


class _RecordedTensor:
    """A tensor of a recorded call, for those who ask for its attributes."""

    def __init__(self, recorded: _Recorded, name: str, tensor: torch.Tensor) -> None:
        self._recorded, self._name, self._tensor = recorded, name, tensor

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """That of the tensor, for isinstance."""
        return type(self._tensor)

    def __getattr__(self, name: str) -> Any:
        self._recorded.note(self._name, name != "dtype")
        return getattr(self._tensor, name)


class _Choices:
    """The backends chosen for calls of one pass, dtype and device, by what else was read to choose: `read` is that of `_Recorded`."""

    def __init__(self, op: Op, read: dict[str, bool]) -> None:
        self.read, self.backends = read, dict[Any, Backend]()
        at = [(op.fields.index(name), whole) for name, whole in read.items()]
        values = [i for i, _ in at if i >= op.tensors and i not in op._lists]
        self._values = itemgetter(*values) if values else None
        self._dtypes = [i for i, whole in at if i < op.tensors and not whole]
        self._others = [i for i, whole in at if i not in values and i not in self._dtypes]

    def key(self, call: Sequence[Any]) -> Any:
        """What the choice hangs on; None where that is nothing."""
        key = self._values(call) if self._values is not None else None
        for i in self._dtypes:
            tensor = call[i]
            key = key, None if tensor is None else tensor.dtype
        if self._others:
            key = key, *[_signature(call[i]) for i in self._others]
        return key


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.shape, value.stride()
    return tuple(value) if isinstance(value, list) else value
