"""`flash_attention`: softmax attention with masks, bias, soft cap, dropout and a differentiable log-sum-exp."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvmk.ops._call import make, number
from cvmk.ops._dropout import checked_probability, draw_seed
from cvmk.ops._dtypes import accumulation_dtype, autocast_lower
from cvmk.ops._op import Op
from cvmk.ops._watch import autocast_enabled, unobserved

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)
UNBOUNDED = -1
"""A window side without a limit, in `Call.window_left` and `Call.window_right`."""
FAR = 1 << 30
"""Farther than any key: a window side as large as this has no limit."""


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    key_lengths: Tensor | None = None,
    query_start: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(mask(cap(scale q k^T) + bias)) v (Dao et al., FlashAttention, arXiv 2205.14135), exact.

    Arguments
        q            [B, H, Tq, D] float64, float32, bfloat16 or float16; any strides whose last dimension is contiguous.
        k, v         [B, Hkv, Tk, D] and [B, Hkv, Tk, Dv], dtype of q. H is a multiple of Hkv; query head h reads head h // (H // Hkv).
        causal       query i sees the keys j <= i + Tk - Tq (aligned bottom-right: the last query sees the last key).
        window       (left, right): query i sees only the keys from i + Tk - Tq - left to i + Tk - Tq + right; -1, or 2^30 and more, is
                     no limit on that side; one integer w is (w, w). With `causal`, right is 0.
        key_lengths  [B] int32 or int64, any numbers: the keys j >= key_lengths[b] are invisible, and their content in k and v (NaN, say) is
                     not used.
        query_start  [B] int32 or int64, any numbers: the position of query 0 among the keys, in place of Tk - Tq, for `causal` and `window`.
        bias         floating, broadcastable to [B, H, Tq, Tk], added to the scores after scale and soft cap; has a gradient, summed
                     over the broadcast dimensions. -inf hides a key; a finite number, however large, is added as the formula says.
        softcap      c > 0 turns the scaled scores s into c tanh(s / c); 0 is no cap, and so is inf, the limit of the formula.
        scale        factor of q k^T, by default 1 / sqrt(D). These numbers have no gradient: a learned scale is multiplied into q.
        dropout_p    probability, in [0, 1), with which a probability is set to 0; the others are divided by 1 - dropout_p.
        cu_seqlens_q, cu_seqlens_k   [n + 1] int32 or int64, both or none: packed sequences. q is [total_q, H, D], k and v are
                     [total_k, Hkv, ...]; sequence s is the rows cu_seqlens[s] to cu_seqlens[s + 1]. Alignment is per sequence, by its own
                     two lengths. Rows that belong to no sequence give 0 and are not seen. Not with key_lengths and query_start. They
                     rise, from 0 or more to total at most; on the CPU, where their values can be read without waiting for a device, others
                     raise ValueError. On a GPU they must hold this; nothing looks at them there.
        return_lse   also return the log-sum-exp of the scores.

    Returns out [B, H, Tq, Dv] (packed: [total_q, H, Dv]) in the dtype of q, and, where asked for, lse [B, H, Tq] (packed:
    [H, total_q]) in float32 (float64 for float64): the log-sum-exp of each row's scores, before dropout, differentiable.

    Causal alignment and key_lengths. The alignment goes by the tensors' sizes, never by key_lengths, so that a right-padded batch
    (Tq == Tk) is masked as its sentences would be alone. A decoder that keeps its keys in a longer, preallocated cache has its
    queries at the end of what is filled: it passes `query_start=lengths - Tq` with `key_lengths=lengths`; this is what FlashAttention
    does with `cache_seqlens` and `seqused_k`. (With Tq == 1, no window, and key_lengths given, both come to the same.)

    Rows that see no key, or whose scores are all -inf, give out 0, lse -inf and gradient 0; the former's queries and gradients are not
    used. NaN or inf that a row sees gives NaN in that row; a NaN in a key or value that is hidden only by causal, window, bias or packing
    may reach other rows of its head.

    Gradient. With P = exp(S - lse), P' = P after dropout (P' = P M / (1 - p)), and g the gradient of lse:
        dV = P'^T dO,  dP = (dO V^T) M / (1 - p),  D_i = <dO_i, O_i>,  dS = P (dP - D + g),  dbias = dS,
        dX = dS (1 - tanh^2(X / c)) with X = scale q k^T,  dq = scale dX k,  dk = scale dX^T q.

    Dropout draws one seed from torch's generator for the device of q; probability (b, h, i, j) is element (b H + h, i, j) of the hash in
    `cvmk.ops._dropout`. Packed: b = 0, and i, j count packed rows.

    Raises TypeError for a wrong dtype and for a number that asks for a gradient, ValueError for a wrong shape or number.
    """
    call = _prepare(q, k, v, causal, window, key_lengths, query_start, bias, softcap, scale, dropout_p, cu_seqlens_q, cu_seqlens_k)
    if call.dropout_p > 0:
        call = call._replace(dropout_seed=draw_seed(q.device))
    out, lse = op(call)
    return (out, lse) if return_lse else out


# -- the op ---------------------------------------------------------------------------------------------------------------------
class Call(NamedTuple):
    """One call; packed where cu_seqlens_q is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_lengths: Tensor | None
    query_start: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    dropout_seed: Tensor | None
    window_left: int
    window_right: int
    softcap: float
    scale: float
    dropout_p: float


class Out(NamedTuple):
    out: Tensor
    lse: Tensor


def _fake_forward(c: Call) -> Out:
    lse = (c.q.shape[1], c.q.shape[0]) if c.q.dim() == 3 else c.q.shape[:-1]
    return Out(c.q.new_empty((*c.q.shape[:-1], c.v.shape[-1])), c.q.new_empty(lse, dtype=accumulation_dtype(c.q.dtype)))


op = Op("flash_attention", Call, Out, fake_forward=_fake_forward, differentiable=("q", "k", "v", "bias"), saved=("out", "lse"))


def row_bias_gradient(bias: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Where one number is added to all scores of a row, probabilities stay and lse moves with it: sum_j dS_ij = g_i."""
    if grad_lse is None:
        return torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    sums = torch.where(lse == -math.inf, 0.0, grad_lse + lse * 0.0)
    sums = (sums if sums.dim() == 3 else sums[None])[..., None]
    return sums.sum_to_size((1,) * (4 - bias.dim()) + tuple(bias.shape)).reshape(bias.shape).to(bias.dtype)


# -- checks ---------------------------------------------------------------------------------------------------------------------
@op.prepared_by
def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    key_lengths: Tensor | None = None,
    query_start: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Call:
    packed = (cu_seqlens_q is not None or cu_seqlens_k is not None) and _check_packing(q, cu_seqlens_q, cu_seqlens_k, key_lengths, query_start)
    width = check_qk(q, k, ("q", "k"), packed)
    check_values(k, v)
    dropout_p = checked_probability(dropout_p)
    scale = default_scale(width) if scale is None else checked_scale("scale", scale, q.dtype)
    softcap = number("softcap", softcap)
    if softcap:
        softcap = _checked_softcap(softcap, scale, q.dtype)
    if key_lengths is not None:
        check_lengths(key_lengths, q, "key_lengths")
    if query_start is not None:
        check_lengths(query_start, q, "query_start")
    if bias is not None:
        _check_bias(bias, q, k, packed)
    left, right = (UNBOUNDED, UNBOUNDED) if window is None else _window(window)
    if causal:
        right = 0
    if autocast_enabled():
        q, k, v = autocast_lower(q, k, v)
    dtype = q.dtype
    if k.dtype != dtype or v.dtype != dtype:
        raise TypeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    return make(Call, (q, k, v, bias, key_lengths, query_start, cu_seqlens_q, cu_seqlens_k, None, left, right, softcap, scale, dropout_p))


def default_scale(width: int) -> float:
    """1 / sqrt(D)."""
    return 1.0 / math.sqrt(width)


def checked_scale(name: str, scale: Any, dtype: torch.dtype) -> float:
    """A factor of scores in the dtype. Raises TypeError and ValueError."""
    factor = number(name, scale)
    if not abs(factor) <= _largest(dtype):
        raise ValueError(f"{name} must be a finite number{'' if dtype == torch.float64 else ' in float32, in which scores are computed'}, not {factor}")
    return factor


def _checked_softcap(softcap: float, scale: float, dtype: torch.dtype) -> float:
    """A cap that scores can be divided by and multiplied with in the dtype; 0 for one that no score comes near. Raises ValueError."""
    if not softcap >= 0.0:
        raise ValueError(f"softcap must be positive, or 0 for none, not {softcap}")
    if softcap >= (2.0**900 if dtype == torch.float64 else 2.0**100):
        return 0.0
    if abs(scale) > softcap * _largest(dtype) or softcap * _largest(dtype) < 1.0:
        raise ValueError(f"softcap must be 0, for none, or so large that scale / softcap is finite, not {softcap} (with scale {scale})")
    return softcap


def _largest(dtype: torch.dtype) -> float:
    """The largest factor: products with it and with log2(e) are finite where scores are of the dtype."""
    return 2.0**1022 if dtype == torch.float64 else 2.0**126


def check_qk(q: Tensor, k: Tensor, names: tuple[str, str], packed: bool = False) -> int:
    """Queries and keys that fit each other; returns their last dimension. Raises TypeError and ValueError."""
    sizes_q, sizes_k, dims = q.shape, k.shape, 3 if packed else 4
    if q.dtype not in _FLOATS or k.dtype not in _FLOATS or len(sizes_q) != dims or len(sizes_k) != dims or sizes_q[-1] == 0 or sizes_k[-1] == 0:
        for tensor, name in ((q, names[0]), (k, names[1])):
            _check_layout(tensor, name, packed)
    if not (q.is_cpu and k.is_cpu) and q.device != k.device:
        raise ValueError(f"{names[0]} and {names[1]} must be on one device, not on {q.device} and {k.device}")
    wrong, width, heads, kv_heads = "", sizes_q[-1], sizes_q[1], sizes_k[1]
    if width != sizes_k[-1]:
        wrong = "they differ in the last dimension"
    elif not packed and sizes_q[0] != sizes_k[0]:
        wrong = "they differ in the batch dimension"
    elif kv_heads == 0 or heads % kv_heads != 0:
        wrong = f"the heads of {names[0]} must be a multiple of those of {names[1]}"
    if wrong:
        raise ValueError(f"{names[0]} {list(sizes_q)} and {names[1]} {list(sizes_k)}: {wrong}")
    return width


def _check_layout(tensor: Tensor, name: str, packed: bool) -> None:
    sizes = tensor.shape
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {tensor.dtype}")
    if len(sizes) != (3 if packed else 4):
        raise ValueError(f"{name} must be {'[total, H, D]' if packed else '[B, H, T, D]'}, not of shape {list(sizes)}")
    if sizes[-1] == 0:
        raise ValueError(f"{name} must have a last dimension of at least 1, not the shape {list(sizes)}")


def check_values(k: Tensor, v: Tensor) -> None:
    """Values that fit the keys. Raises TypeError and ValueError."""
    if v.dtype not in _FLOATS:
        raise TypeError(f"v must be float64, float32, bfloat16 or float16, not {v.dtype}")
    sizes_k, sizes_v = k.shape, v.shape
    if len(sizes_v) != len(sizes_k) or sizes_v[0] != sizes_k[0] or sizes_v[1] != sizes_k[1] or sizes_v[-2] != sizes_k[-2]:
        raise ValueError(f"k {list(sizes_k)} and v {list(sizes_v)} must agree in all but the last dimension")
    if not (v.is_cpu and k.is_cpu) and v.device != k.device:
        raise ValueError(f"k and v must be on one device, not on {k.device} and {v.device}")


def check_lengths(lengths: Tensor, q: Tensor, name: str) -> None:
    """One integer a batch item. Raises TypeError and ValueError."""
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, not {lengths.dtype}")
    if lengths.dim() != 1 or lengths.shape[0] != q.shape[0]:
        raise ValueError(f"{name} must be [B] = [{q.shape[0]}], not of shape {list(lengths.shape)}")
    if lengths.device != q.device:
        raise ValueError(f"{name} must be on {q.device} as the queries are, not on {lengths.device}")


def _check_packing(
    q: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, key_lengths: Tensor | None, query_start: Tensor | None
) -> bool:
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("packed sequences need both cu_seqlens_q and cu_seqlens_k (the same tensor for self-attention)")
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return False
    if key_lengths is not None or query_start is not None:
        raise ValueError("key_lengths and query_start are for padded batches; packed sequences have their lengths in cu_seqlens_k")
    for tensor, name in ((cu_seqlens_q, "cu_seqlens_q"), (cu_seqlens_k, "cu_seqlens_k")):
        if tensor.dtype not in _INTEGERS:
            raise TypeError(f"{name} must be int32 or int64, not {tensor.dtype}")
        if tensor.dim() != 1 or tensor.shape[0] < 1:
            raise ValueError(f"{name} must be [n + 1] for n sequences, not of shape {list(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, not on {tensor.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"cu_seqlens_q {list(cu_seqlens_q.shape)} and cu_seqlens_k {list(cu_seqlens_k.shape)} tell different numbers of sequences")
    return True


def _check_bias(bias: Tensor, q: Tensor, k: Tensor, packed: bool) -> None:
    if bias.dtype not in _FLOATS:
        raise TypeError(f"bias must be floating (0 for a visible key, -inf for a hidden one), not {bias.dtype}")
    if bias.device != q.device:
        raise ValueError(f"bias must be on {q.device} as q is, not on {bias.device}")
    full = (1, q.shape[1], q.shape[0], k.shape[0]) if packed else (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = bias.dim() <= 4 and all(have == 1 or have == want for have, want in zip(reversed(bias.shape), reversed(full), strict=False))
    if not fits:
        raise ValueError(f"bias must be broadcastable to [B, H, Tq, Tk] = {list(full)}, not of shape {list(bias.shape)}")


def _window(window: Any) -> tuple[int, int]:
    """Both sides of a window, UNBOUNDED where there is no limit. Raises TypeError and ValueError."""
    wrong = f"window must be an integer or two (left, right), each at least 0, or -1 for no limit, not {window!r}"
    try:
        sides = [window, window] if isinstance(window, int) else list(window)
    except TypeError:  # no sequence: an integer of another kind
        sides = [window, window]
    try:
        left, right = [_side(side) for side in sides]
    except TypeError:
        raise TypeError(wrong) from None
    except ValueError:
        raise ValueError(wrong) from None
    return left, right


def _side(side: Any) -> int:
    if isinstance(side, bool) or getattr(side, "dtype", None) == torch.bool:
        raise TypeError("a bool is no number of keys")
    side = operator.index(side)
    if side < UNBOUNDED:
        raise ValueError("less than no limit")
    return UNBOUNDED if side >= FAR else side


def check_offsets(offsets: Tensor, total: int, name: str) -> bool:
    """Whether the offsets of packed sequences can be read without waiting for a device. Raises ValueError where they can and are none:
    they rise, from 0 or more to `total`, the tensors' length, at most."""
    if not offsets.is_cpu or unobserved([offsets]) is None:
        return False
    last = 0
    for i, offset in enumerate(offsets.tolist()):
        if not last <= offset <= total:
            why = f"it is less than {last}" if offset < last else f"the tensor has {total} rows"
            raise ValueError(f"{name} must rise from 0 or more to {total} at most, and {name}[{i}] is {offset}: {why}")
        last = offset
    return True
