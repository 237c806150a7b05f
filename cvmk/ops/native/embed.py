"""`embed` on the CPU kernels of csrc/embed: one pass over rows; the gradient by a counting sort of ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs, make
from cvmk.ops._dropout import words
from cvmk.ops._storage import with_memory
from cvmk.ops.embed import Call, Out, wrong_id
from cvmk.ops.native import library, reason
from cvmk.ops.native._memory import empty

_NATIVE: Any = library()
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _contiguous(c: Call) -> Call:
    """The call without gaps in its tensors."""
    if c.ids.is_contiguous() and c.weight.is_contiguous() and (c.positions is None or c.positions.is_contiguous()):
        return c
    return make(Call, (*(None if tensor is None else with_memory(tensor).contiguous() for tensor in c[:3]), *c[3:]))


def forward(c: Call) -> Tensor:
    c = _contiguous(c)
    out = c.weight.new_empty((*c.ids.shape, c.weight.shape[1]))
    _check(c, _NATIVE.embed_forward(c, out, *words(c.dropout_seed, c.dropout_p)))
    return out


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> Tensor | None:
    if not needs.weight:
        return None
    c = _contiguous(c)
    gradient = empty(c.weight.shape, c.weight.dtype)
    _check(c, _NATIVE.embed_backward(c, grads.out.contiguous(), gradient, *words(c.dropout_seed, c.dropout_p)))
    return gradient


def _check(c: Call, place: int) -> None:
    if place >= 0:
        raise wrong_id(int(c.ids.flatten()[place]), place, c.weight.shape[0])


def _limits(which: str, c: Call) -> list[str]:
    return [] if c.positions is None or c.positions.dtype in TYPES else [f"positions are {c.positions.dtype}"]


def unavailable() -> str | None:
    """Why these kernels cannot run in this process, or None."""
    there = _NATIVE is None or hasattr(_NATIVE, "embed_forward")
    return reason() if there else "cvmk._native is an older build without embed: install the package again"


BACKENDS = (Backend("embed", "native", forward, backward, dtypes=TYPES, devices=("cpu",), limits=_limits, unavailable=unavailable),)
