"""What a backend supports and why it declines, and which backends are allowed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from cvmk.errors import NoBackendError
from cvmk.libraries import BACKENDS, allowed_backends, check_environment

PREFERENCE = BACKENDS
"""Backends in the order in which they are asked."""


@dataclass(frozen=True)
class Backend:
    """One implementation of one op: what it supports is data, what it declines is text.

    forward    takes the op's `Call` and returns its `Out`.
    backward   takes the gradients of the results (an `Out`, None where there is none), the call, the saved results (an `Out`, None for
               those that are not saved) and `Needs`, and returns one gradient a differentiable argument, None (or `not_needed`) where it
               is not wanted. None where the backend has no backward pass.
    forward_with_gradient   where making the gradient is cheapest in the forward pass: takes the call and returns (Out, hand_on), or None to decline.
               hand_on turns the gradient of the first result into what `backward` returns, at most once; None where it cannot (`backward`
               then runs). For calls that nobody traces.
    limits     returns further reasons to decline for the pass ("forward" or "backward") and the call; its answer may depend on nothing
               but the values, dtypes, devices, shapes and strides of the fields that it reads.
    unavailable  says why the backend cannot run in this process at all (a library that did not load, an instruction set), or None.
    by_default   says why the call goes to this backend only where `use` or CVMK_BACKEND names it (a kernel that was not yet measured on
               this device, an interpreter), or None; it is asked as `limits` is.
    """

    op: str
    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    forward_with_gradient: Callable[..., Any] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    devices: tuple[str, ...] = ("cpu", "cuda")
    limits: Callable[[str, Any], list[str]] | None = None
    unavailable: Callable[[], str | None] | None = None
    by_default: Callable[[str, Any], str | None] | None = None

    def missing(self) -> list[str]:
        """Why the backend cannot run in this process; empty when it can."""
        reason = self.unavailable() if self.unavailable is not None else None
        return [] if reason is None else [f"{self.name}: {reason}"]

    def reasons(self, which: str, call: Any, principal: str, recorded: Any = None) -> list[str]:
        """Why the backend cannot take this pass of a call; empty when it can. `principal`: the field whose dtype and device decide;
        `recorded`: the call as `limits` and `by_default` are to read it."""
        found = self._general_reasons(which, getattr(call, principal), principal)
        if found or (self.limits is None and self.by_default is None):
            return found
        recorded = call if recorded is None else recorded
        if self.limits is not None:
            found += [f"{self.name}: {reason}" for reason in self.limits(which, recorded)]
        if self.by_default is not None and not found and self.name not in allowed():
            reason = self.by_default(which, recorded)
            found += [] if reason is None else [f"{self.name}: {reason}; ops.use({self.name!r}) selects it"]
        return found

    def _general_reasons(self, which: str, tensor: torch.Tensor, principal: str) -> list[str]:
        """Why the backend cannot take any call whose principal argument has this dtype and device."""
        found = self.missing()
        if which == "backward" and self.backward is None:
            found.append(f"{self.name}: has no backward pass")
        if tensor.dtype not in self.dtypes:
            found.append(f"{self.name}: {principal} is {tensor.dtype}, not one of {', '.join(str(d) for d in self.dtypes)}")
        if tensor.device.type not in self.devices:
            found.append(f"{self.name}: runs on {', '.join(self.devices)}, not {tensor.device.type}")
        return found


# -- which backends are allowed ------------------------------------------------------------------------------------------------
def _check_names(names: Sequence[str], where: str) -> None:
    for name in names:
        if name not in PREFERENCE:
            raise ValueError(f"{where} names the backend {name!r}; the backends are {', '.join(PREFERENCE)}")


check_environment()
_ENVIRONMENT = allowed_backends()
_allowed = ContextVar("cvmk_backends", default=_ENVIRONMENT)
allowed = _allowed.get
"""The names of the allowed backends in this context, in order; empty where all are, in the order of PREFERENCE."""


def no_backend(what: str, refusals: Sequence[str]) -> NoBackendError:
    """The error for a call of `what` that every allowed backend refuses; it names whoever allows so few, and the remedy."""
    names = allowed()
    refusals = [*refusals, *(f"{name}: not written for {what}" for name in names if not any(reason.startswith(f"{name}: ") for reason in refusals))]
    reasons = "; ".join(refusals)
    if not names:
        return NoBackendError(f"no backend takes this call of {what}: {reasons}", refusals)
    who, remedy = ("CVMK_BACKEND", "unset it") if names is _ENVIRONMENT else ("ops.use", "leave it out")
    limit = f"{who} allows only {', '.join(names)}"
    return NoBackendError(f"no backend takes this call of {what}, for {limit} ({reasons}): {remedy}, or add a backend that takes the call", refusals)


@contextlib.contextmanager
def use(*names: str) -> Iterator[None]:
    """Allow only the named backends, in this order of preference, in this context (a thread, an asyncio task) while the block runs.

    A call that none of them takes raises NoBackendError (a NotImplementedError) with the reasons. A backward pass keeps what was allowed in
    its forward pass, in whatever thread it runs. The environment variable CVMK_BACKEND (names separated by commas) does the same for a whole
    process. Raises ValueError for a name that is no backend.
    """
    _check_names(names, "use()")
    with allowing(names):
        yield


@contextlib.contextmanager
def allowing(names: tuple[str, ...]) -> Iterator[None]:
    """`use` for names that `allowed()` gave."""
    token = _allowed.set(names)
    try:
        yield
    finally:
        _allowed.reset(token)
