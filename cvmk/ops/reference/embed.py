"""`embed` in PyTorch: any dtype and device, twice differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import accumulation_dtype
from cvmk.ops.embed import Call, Out, wrong_id
from cvmk.ops.reference._dropout import kept_rows


def _rows(c: Call) -> Tensor:
    try:
        return F.embedding(c.ids, c.weight)
    except IndexError:  # which names neither id nor place
        ids = c.ids.flatten()
        place = int(((ids < 0) | (ids >= c.weight.shape[0])).nonzero()[0, 0])
        raise wrong_id(int(ids[place]), place, c.weight.shape[0]) from None


def _dropped(c: Call, values: Tensor) -> Tensor:
    kept = kept_rows(c.dropout_seed, c.dropout_p, c.ids.numel(), c.weight.shape[1])
    return values if kept is None else torch.where(kept.view(values.shape), values / (1 - c.dropout_p), 0.0)


def forward(c: Call) -> Tensor:
    wide = accumulation_dtype(c.weight.dtype)
    found = _rows(c).to(wide) * c.scale
    if c.positions is not None:
        found = found + c.positions.to(wide)
    return _dropped(c, found).to(c.weight.dtype)


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> Tensor | None:
    if not needs.weight:
        return None
    wide = accumulation_dtype(c.weight.dtype)
    return sum_rows(c, _dropped(c, grads.out.to(wide)) * c.scale).to(c.weight.dtype)


def sum_rows(c: Call, rows: Tensor) -> Tensor:
    """The rows [..., n] of the ids, added into those of a matrix of the weight's shape. PyTorch sorts by id on a GPU, so that the order is one there too."""
    found: Tensor = torch.ops.aten.embedding_dense_backward(rows, c.ids, c.weight.shape[0], -1, False)
    return found


BACKENDS = (Backend("embed", "reference", forward, backward),)
