"""Reference of `flash_attention`: dense scores, a block of them at a time, so that the temporaries stay small.

Probabilities are powers of two: on the CPU, torch.exp takes a path a hundred times slower where it underflows, and exp2 does not. Scores are
held times log2(e), but where a bias is added, whose numbers may be too large for that (masks of the lowest finite number): these are in
units of 1 until the row's maximum is subtracted, and their probabilities are summed anew in the backward pass, since the log-sum-exp of such
a row keeps nothing of its sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import accumulation_dtype
from cvmk.ops.attention import Call, Out, check_offsets
from cvmk.ops.reference._dropout import at_least, column_words, counting, key_of, mix

LOG2E, LN2 = math.log2(math.e), math.log(2)
BLOCK = 1 << 24
"""Scores held at once: 64 MiB of float32 (or one row of queries of one batch item, where that is more)."""
_FAR = 1 << 62
"""A position so far from all keys that a window's side does not bring it back, and that sums with both are no overflow."""
_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def forward(c: Call) -> Out:
    """(out, lse) of `cvmk.ops.flash_attention`; differentiable any number of times."""
    packed = c.cu_seqlens_q is not None
    q, k, v = (_as_batch(c.q), _as_batch(c.k), _as_batch(c.v)) if packed else (c.q, c.k, c.v)
    mask = Mask.of(q, k, c.window_left, c.window_right, c.key_lengths, c.query_start, c.cu_seqlens_q, c.cu_seqlens_k)
    q, k, v = mask.without_blind(q), mask.without_unread(k).contiguous(), mask.without_unread(v).contiguous()
    rows = []
    for part in blocks(q.shape[0], q.shape[2], q.shape[1] * k.shape[2]):
        e, _ = _scores(part, part.of(q), k, c.bias, mask, c.softcap, c.scale)
        e, total, part_lse = exponentials(e, _unit(c.bias))
        keep = _kept(c, part, q, k)
        if keep is not None:
            e = e * keep / (1 - c.dropout_p)
        out = product(e.to(v.dtype), part.keys(v)).div_(total)
        rows.append((part, out, _narrowed(part_lse, accumulation_dtype(c.q.dtype))))
    out, lse = join([(part, out) for part, out, _ in rows]), join([(part, lse) for part, _, lse in rows])
    return Out(out[0].transpose(0, 1), lse[0]) if packed else Out(out, lse)


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and bias by the formulas in the docstring of `cvmk.ops.flash_attention`."""
    packed, bias = c.cu_seqlens_q is not None, c.bias
    q, k, v, lse = (_as_batch(c.q), _as_batch(c.k), _as_batch(c.v), saved.lse[None]) if packed else (c.q, c.k, c.v, saved.lse)
    grad_out = _as_batch(grads.out) if packed and grads.out is not None else grads.out
    grad_lse = grads.lse[None] if packed and grads.lse is not None else grads.lse
    mask = Mask.of(q, k, c.window_left, c.window_right, c.key_lengths, c.query_start, c.cu_seqlens_q, c.cu_seqlens_k)
    q, k, v = mask.without_blind(q), mask.without_unread(k).contiguous(), mask.without_unread(v).contiguous()
    grad_out = None if grad_out is None else mask.without_blind(grad_out)
    grad_lse = None if grad_lse is None else mask.without_blind(grad_lse[..., None])[..., 0]
    lse2 = finite(LOG2E * lse)[..., None] if bias is None else None
    want_bias = bias is not None and needs.bias
    sums = Sums()
    for part in blocks(q.shape[0], q.shape[2], q.shape[1] * k.shape[2]):
        q_part = part.of(q).contiguous()
        p, tanh = _scores(part, q_part, k, bias, mask, c.softcap, c.scale)
        if lse2 is None:
            p, total, _ = exponentials(p, _unit(bias))
            p = p.div_(total)
        else:
            p = p.sub_(part.of(lse2)).exp2_()
        keep = _kept(c, part, q, k)
        g = None if grad_out is None else part.of(grad_out).contiguous()
        if needs.v and g is not None:
            sums.add("v", part, product_t((p if keep is None else p * keep / (1 - c.dropout_p)).to(v.dtype), g, v.shape[1]))
        if not (needs.q or needs.k or want_bias):
            continue
        ds = grad_scores(p, None if g is None else dot(g, part.keys(v), 1.0), None if grad_lse is None else part.of(grad_lse), keep, c.dropout_p)
        if want_bias and bias is not None:
            sums.add_reduced("bias", part, ds, bias)
        if tanh is not None:
            ds = ds.mul_(1 - tanh.square())
        ds = ds.to(q.dtype)
        if needs.q:
            sums.add("q", part, product(ds, part.keys(k), c.scale), rows=True)
        if needs.k:
            sums.add("k", part, product_t(ds, q_part, k.shape[1], c.scale))
    dq, dk, dv = (sums.total(name, x) if wanted else None for name, x, wanted in (("q", q, needs.q), ("k", k, needs.k), ("v", v, needs.v)))
    dbias = sums.reduced("bias", bias) if want_bias and bias is not None else None
    if packed:
        dq, dk, dv = (None if t is None else t[0].transpose(0, 1) for t in (dq, dk, dv))
    return dq, dk, dv, dbias


BACKENDS = (Backend("flash_attention", "reference", forward, backward),)


# -- blocks of scores -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """A block of scores: some batch items with all their rows, or some rows of one batch item; always all heads."""

    batch: slice
    rows: slice
    whole: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The block of a tensor [B, heads, Tq, ...]."""
        return tensor if self.whole else tensor[self.batch, :, self.rows]

    def keys(self, tensor: Tensor) -> Tensor:
        """What the block reads of a tensor [B, heads, Tk, ...]."""
        return tensor if self.whole else tensor[self.batch]


def blocks(batch: int, rows: int, row_size: int) -> Iterator[Part]:
    """Blocks of at most BLOCK scores (at least one row of queries), `row_size` being the scores of one row over all heads.

    There is always a block, an empty one where nothing is to be done, so that shapes come out of the same operations.
    """
    items = BLOCK // max(1, rows * row_size)
    if items >= 1:
        for first in range(0, max(1, batch), items):
            yield Part(slice(first, min(first + items, batch)), slice(0, rows), whole=items >= batch)
        return
    step = max(1, BLOCK // row_size)
    for item in range(batch):
        for first in range(0, rows, step):
            yield Part(slice(item, item + 1), slice(first, min(first + step, rows)))


def join(parts: list[tuple[Part, Tensor]]) -> Tensor:
    """One tensor [B, heads, Tq, ...] from its blocks (one at least), in the order of `blocks`."""
    if len(parts) == 1:
        return parts[0][1]
    items: dict[int, list[Tensor]] = {}
    for part, value in parts:
        items.setdefault(part.batch.start, []).append(value)
    return torch.cat([torch.cat(values, 2) if len(values) > 1 else values[0] for values in items.values()])


class Sums:
    """Gradients gathered over the blocks: rows of queries side by side, keys and bias summed."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[Part, Tensor]]] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, part: Part, value: Tensor, rows: bool = False) -> None:
        """One block's gradient of a tensor; `rows`: it belongs to the block's queries only, else to all keys of its batch items."""
        found = self.parts.setdefault(name, [])
        if not rows and found and found[-1][0].batch == part.batch:
            found[-1][1].add_(value)
            return
        partial = not rows and part.rows.start == 0 and value.dtype in (torch.bfloat16, torch.float16)
        found.append((part if rows else Part(part.batch, slice(None)), value.float() if partial else value))

    def total(self, name: str, like: Tensor) -> Tensor:
        """The whole gradient, in the shape and dtype of `like`; zeros where no block had one."""
        return join(self.parts[name]).to(like.dtype) if name in self.parts else like.new_zeros(like.shape)

    def add_reduced(self, name: str, part: Part, value: Tensor, like: Tensor) -> None:
        """One block's gradient of a tensor that was broadcast to the scores."""
        whole = self.sums.get(name)
        if whole is None:
            whole = self.sums[name] = value.new_zeros((1,) * (4 - like.dim()) + tuple(like.shape))
        target = whole[part.batch if whole.shape[0] > 1 else slice(None), :, part.rows if whole.shape[2] > 1 else slice(None)]
        target.add_(value.sum_to_size(target.shape))

    def reduced(self, name: str, like: Tensor) -> Tensor:
        """The gradient in the shape and dtype of `like`."""
        whole = self.sums.get(name)
        return torch.zeros_like(like) if whole is None else whole.view(like.shape).to(like.dtype)


# -- matrix products over heads that share keys -----------------------------------------------------------------------------------
def dot(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k^T: [B, H, Tq, D], [B, Hkv, Tk, D] -> [B, H, Tq, Tk]."""
    b, h, t, d = q.shape
    q3, k3 = _grouped(q, k.shape[1]), k.reshape(b * k.shape[1], k.shape[2], d)
    return _multiply(q3, k3.transpose(1, 2), scale).view(b, h, t, k.shape[2])


def product(p: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """scale p v: [B, H, Tq, Tk], [B, Hkv, Tk, D] -> [B, H, Tq, D]."""
    b, h, t, _ = p.shape
    p3, v3 = _grouped(p, v.shape[1]), v.reshape(b * v.shape[1], v.shape[2], v.shape[3])
    return _multiply(p3, v3, scale).view(b, h, t, v.shape[3])


def product_t(p: Tensor, g: Tensor, heads: int, scale: float = 1.0) -> Tensor:
    """scale p^T g, summed over the query heads of a key head: [B, H, Tq, Tk], [B, H, Tq, D] -> [B, heads, Tk, D]."""
    p3, g3 = _grouped(p, heads), _grouped(g, heads)
    return _multiply(p3.transpose(1, 2), g3, scale).view(p.shape[0], heads, p.shape[3], g.shape[3])


def _multiply(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b, a batch of products."""
    if scale == 0:  # for alpha = 0 PyTorch's products in bfloat16 and float16 hand out memory as they found it (seen in 2.13)
        return torch.bmm(a, b) * 0.0
    return torch.baddbmm(a.new_zeros(1), a, b, beta=0, alpha=scale)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[B, H, T, n] -> [B * heads, H / heads * T, n]: the query heads of one key head, one after the other."""
    return x.reshape(x.shape[0] * heads, x.shape[1] // heads * x.shape[2], x.shape[3])


def _as_batch(x: Tensor) -> Tensor:
    """Packed [total, H, D] -> [1, H, total, D]."""
    return x.transpose(0, 1)[None]


# -- scores and masks ---------------------------------------------------------------------------------------------------------------
def _unit(bias: Tensor | None) -> float:
    """What scores are held times."""
    return LOG2E if bias is None else 1.0


def _scores(part: Part, q: Tensor, k: Tensor, bias: Tensor | None, mask: Mask, softcap: float, scale: float) -> tuple[Tensor, Tensor | None]:
    """The block's masked scores times `_unit` in the dtype of accumulation (or of the bias, where that is wider), in fresh memory; and the
    tanh of the cap, where there is one.

    q is the block's queries, the rest is whole.
    """
    tanh, unit, wide = None, _unit(bias), accumulation_dtype(q.dtype)
    if softcap > 0:
        tanh = torch.tanh(dot(q, part.keys(k), scale / softcap).to(wide))
        s = tanh * (softcap * unit)
    else:
        s = dot(q, part.keys(k), scale * unit).to(wide)
    if bias is not None:
        four = bias.view((1,) * (4 - bias.dim()) + tuple(bias.shape))
        s = s.to(torch.promote_types(wide, bias.dtype))
        s = s.add_(four[part.batch if four.shape[0] > 1 else slice(None), :, part.rows if four.shape[2] > 1 else slice(None)])
    hiding = mask.hiding(part, s)
    return s if hiding is None else s.add_(hiding), tanh


def exponentials(s: Tensor, unit: float = LOG2E) -> tuple[Tensor, Tensor, Tensor]:
    """From scores times `unit`, in place: exp(score - row maximum), its sum (1 for an empty row) [..., 1], and the log-sum-exp [...]."""
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
    e = s.sub_(finite(top))
    e = (e if unit == LOG2E else e.mul_(LOG2E / unit)).exp2_()
    # The largest score adds 2^0 = 1, so that a sum under 1 is that of an empty row.
    total = e.sum(-1, keepdim=True).clamp(min=1)
    return e, total, (total.log() + top / unit).squeeze(-1)


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the dtype; finite numbers stay finite."""
    if x.dtype == dtype:
        return x
    return torch.where(x.isinf(), x, x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)).to(dtype)


def finite(x: Tensor) -> Tensor:
    """Row maxima or log-sum-exps to subtract: the lowest number for -inf, since -inf less itself would be NaN in rows that see nothing."""
    return x.clamp(min=torch.finfo(x.dtype).min)


def grad_scores(p: Tensor, dp: Tensor | None, grad_lse: Tensor | None, keep: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """dS = P (dP - D + g), in place of p or dp; D_i = <dO_i, O_i> is the same as sum_j P_ij dP_ij, which needs no rounded output."""
    if dp is None:
        return p.zero_() if grad_lse is None else p.mul_(grad_lse[..., None])
    dp = dp.to(p.dtype)
    if keep is not None:
        dp.mul_(keep).div_(1 - dropout_p)
    ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
    return ds if grad_lse is None else ds.add_(p.mul_(grad_lse[..., None]))


@dataclass(frozen=True)
class Mask:
    """Which keys a query does not see. Positions count keys: query i of batch item b stands at position[b, i]."""

    position: Tensor | None = None  # [1 or B, Tq]; None: no window
    key_position: Tensor | None = None  # [Tk]
    left: int = -1
    right: int = -1
    unread: Tensor | None = None  # [B, Tk]: keys that nobody sees and whose content is not read
    sequence: tuple[Tensor, Tensor] | None = None  # packed: the sequence of each query [Tq] and key [Tk]
    blind: Tensor | None = None  # [1 or B, 1 or Tq]: queries that see no key and whose content is not read; None: there is none

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        left: int,
        right: int,
        key_lengths: Tensor | None,
        query_start: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Mask:
        rows, keys = q.shape[2], k.shape[2]
        if left < 0 and right < 0 and key_lengths is None and cu_seqlens_q is None:
            return NO_MASK
        row, key = torch.arange(rows, device=q.device), torch.arange(keys, device=q.device)
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            cu_seqlens_q, cu_seqlens_k = _offsets(cu_seqlens_q, rows, "cu_seqlens_q"), _offsets(cu_seqlens_k, keys, "cu_seqlens_k")
            sequence_q, sequence_k = (torch.searchsorted(cu, at, right=True) - 1 for cu, at in ((cu_seqlens_q, row), (cu_seqlens_k, key)))
            last = cu_seqlens_q.shape[0] - 1
            outside = (sequence_k < 0) | (sequence_k >= last)
            sequence_k = sequence_k.masked_fill(outside, -2)
            # The end of a query's sequence lies at the end of its keys': the distance between the two ends aligns bottom-right.
            after = (sequence_q + 1).clamp(max=last)
            position = (row + cu_seqlens_k[after] - cu_seqlens_q[after])[None]
            mine = sequence_q.clamp(min=0, max=last)
            blind = _blind(cu_seqlens_k[mine][None], cu_seqlens_k[(mine + 1).clamp(max=last)][None], position, left, right) | (sequence_q < 0)
            return Mask(position if left >= 0 or right >= 0 else None, key, left, right, outside[None], (sequence_q, sequence_k), blind)
        binding = right >= 0 and (query_start is not None or rows - 1 > right) or left >= 0 and (query_start is not None or keys - 1 > left)
        first: Tensor | int = keys - rows if query_start is None else query_start[:, None].long().clamp(-_FAR, _FAR)
        places = row[None] + first if binding else None
        unseeing = None
        if key_lengths is not None or query_start is not None or rows > keys:
            zero = key.new_zeros((1, 1))
            unseeing = _blind(zero, zero + keys if key_lengths is None else key_lengths[:, None].clamp(max=keys), places, left, right)
        return Mask(places, key, left, right, None if key_lengths is None else key >= key_lengths[:, None], None, unseeing)

    def without_unread(self, x: Tensor) -> Tensor:
        """Keys or values [B, H, Tk, D] with 0 for what must not be read."""
        return x if self.unread is None else _without(x, self.unread[:, None, :, None])

    def without_blind(self, x: Tensor) -> Tensor:
        """Queries [B, H, Tq, D], or a gradient of the rows' results, with 0 for the rows that see no key."""
        return x if self.blind is None else _without(x, self.blind[:, None, :, None])

    def hiding(self, part: Part, like: Tensor) -> Tensor | None:
        """What to add to the scores: -inf where a query does not see a key, else 0; broadcastable to the block, None where all is seen.

        Added and not filled in, for that is several times quicker on the CPU.
        """
        found = None
        for hidden in self._hidden(part):
            term = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            found = term if found is None else found + term
        return found

    def _hidden(self, part: Part) -> Iterator[Tensor]:
        if self.unread is not None:
            yield self.unread[part.batch, None, None, :]
        if self.position is not None and self.key_position is not None:
            position = self.position[part.batch if self.position.shape[0] > 1 else slice(None), None, part.rows, None]
            if self.right >= 0:
                yield self.key_position > position + self.right
            if self.left >= 0:
                yield self.key_position < position - self.left
        if self.sequence is not None:
            yield self.sequence[0][part.rows, None] != self.sequence[1]


NO_MASK = Mask()


def _offsets(offsets: Tensor, total: int, name: str) -> Tensor:
    """Rising offsets within the tensor. Raises ValueError where these can be seen not to be so."""
    return offsets if check_offsets(offsets, total, name) else offsets.clamp(0, total).cummax(0).values


def _blind(first: Tensor, last: Tensor, position: Tensor | None, left: int, right: int) -> Tensor:
    """Which queries see no key, where keys from `first` up to `last` are there and the window is (left, right): [1 or B, 1 or Tq]."""
    if position is not None and left >= 0:
        first = torch.maximum(first, position - left)
    if position is not None and right >= 0:
        last = torch.minimum(last, position + right + 1)
    return last <= first


def _without(x: Tensor, hidden: Tensor) -> Tensor:
    """x with 0 where it is hidden; a product with 0 would keep NaN."""
    if x.requires_grad:
        return x.masked_fill(hidden, 0)
    bits = _BITS[x.dtype]  # the same by a mask of bits, several times quicker on the CPU
    return (x.view(bits) & (hidden.to(bits) - 1)).view(x.dtype)


# -- dropout ----------------------------------------------------------------------------------------------------------------------------
def _kept(c: Call, part: Part, q: Tensor, k: Tensor) -> Tensor | None:
    """Which probabilities of the block stay; None where all do."""
    return None if c.dropout_seed is None or c.dropout_p <= 0 else dropout_keep(c.dropout_seed, c.dropout_p, part, q.shape[1], k.shape[2])


def dropout_keep(seed: Tensor, p: float, part: Part, heads: int, keys: int) -> Tensor:
    """Which probabilities of the block stay: bool [b, H, rows, Tk], by the hash in the docstring of `cvmk.ops.flash_attention`."""
    key = key_of(seed)
    batch, head, row = (counting(n, seed.device) for n in (part.batch.stop, heads, part.rows.stop))
    rows = mix(mix(batch[part.batch, None] * heads + head + key)[..., None] + row[part.rows])
    return at_least(mix(rows[..., None] ^ column_words(key, keys)), p)
