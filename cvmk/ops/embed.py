"""`embed`: rows of an embedding matrix, scaled, with positions and dropout."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvmk.ops._call import make, number
from cvmk.ops._dropout import checked_probability, draw_seed
from cvmk.ops._op import Op

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def embed(ids: Tensor, weight: Tensor, positions: Tensor | None = None, *, scale: float = 1.0, dropout_p: float = 0.0) -> Tensor:
    """dropout(scale * weight[ids] + positions): the input of a model's first layer (Vaswani et al. 2017, section 3.4).

    ids        [...] int32 or int64, from 0 to V - 1.
    weight     [V, n] float64, float32, bfloat16 or float16; has a gradient.
    positions  None, or [..., n], any floating dtype, whose leading dimensions are the last ones of ids (a table [T, n] for ids [N, T]): a constant
               without a gradient.
    scale      a finite number.
    dropout_p  probability, in [0, 1), with which an element is set to 0; the others are divided by 1 - dropout_p.

    Returns [..., n] in the dtype of weight, under autocast too; computed in float32 (float64 for float64) and rounded once.

    Gradient. With M the mask of dropout, dweight[v] = scale / (1 - p) sum over the places i with ids_i = v of M_i dout_i, summed in float32 in the order
    of the places: the same bits for any number of threads, and every time. Nothing of the size of weight is made but that gradient, and it is written
    once.

    Dropout draws one seed from torch's generator for the device of weight; element j of place i is element (0, i, j) of the hash in `cvmk.ops._dropout`.

    Raises TypeError for a wrong dtype, and for positions or a number that ask for a gradient, ValueError for a wrong shape, device or number, and, on the
    CPU, IndexError for an id that has no row. (On a GPU nothing looks at ids before; Triton's kernel gives NaN for such a one.)
    """
    call = prepare(ids, weight, positions, scale=scale, dropout_p=dropout_p)
    if call.dropout_p > 0:
        call = call._replace(dropout_seed=draw_seed(weight.device))
    found: Tensor = op(call)
    return found


class Call(NamedTuple):
    ids: Tensor
    weight: Tensor
    positions: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    dropout_p: float


class Out(NamedTuple):
    out: Tensor


op = Op(
    "embed", Call, Out, fake_forward=lambda c: Out(c.weight.new_empty((*c.ids.shape, c.weight.shape[1]))), differentiable=("weight",), principal="weight"
)


def wrong_id(id: int, place: int, vocabulary: int) -> IndexError:
    return IndexError(f"embed: ids holds {id} at place {place}, and weight has the rows 0 to {vocabulary - 1}")


@op.prepared_by
def prepare(ids: Tensor, weight: Tensor, positions: Tensor | None = None, *, scale: float = 1.0, dropout_p: float = 0.0) -> Call:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, not {ids.dtype}")
    if weight.dtype not in _FLOATS:
        raise TypeError(f"weight must be float64, float32, bfloat16 or float16, not {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight must be [V, n] with n of at least 1, not of shape {list(weight.shape)}")
    if ids.device != weight.device:
        raise ValueError(f"ids are on {ids.device}, and weight on {weight.device}: move them there")
    if positions is not None:
        _check_positions(positions, ids, weight)
    scale = number("scale", scale)
    if not abs(scale) < math.inf:
        raise ValueError(f"scale must be a finite number, not {scale}")
    return make(Call, (ids, weight, positions, None, scale, checked_probability(dropout_p)))


def _check_positions(positions: Tensor, ids: Tensor, weight: Tensor) -> None:
    shape: Any = positions.shape
    if positions.dtype not in _FLOATS:
        raise TypeError(f"positions must be float64, float32, bfloat16 or float16, not {positions.dtype}")
    if positions.requires_grad and torch.is_grad_enabled():
        raise TypeError("positions ask for a gradient, which embed does not give: detach them, or add them to what it returns")
    lead = len(shape) - 1
    if lead < 0 or lead > ids.dim() or shape[-1] != weight.shape[1] or (lead and shape[:-1] != ids.shape[ids.dim() - lead :]):
        raise ValueError(f"positions must be [..., {weight.shape[1]}] with the last dimensions of ids {list(ids.shape)} before it, not of shape {list(shape)}")
    if positions.device != weight.device:
        raise ValueError(f"positions are on {positions.device}, and weight on {weight.device}: move them there")
