"""flash_attention against loops over rows and keys in float64, written here from the law in its docstring."""

from __future__ import annotations

import math
from typing import Any

import attention_cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from transforms import check_transforms

from cvmk.ops import explain, flash_attention, native, use
from cvmk.ops.attention import _prepare, op
from cvmk.ops.reference import attention as reference

INF, NAN = float("inf"), float("nan")
HALF = [torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def inputs(b: int = 2, h: int = 4, hkv: int = 2, tq: int = 5, tk: int = 7, d: int = 4, dv: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return normal(b, h, tq, d, dtype=dtype, seed=1), normal(b, hkv, tk, d, dtype=dtype, seed=2), normal(b, hkv, tk, dv, dtype=dtype, seed=3)


def sees(i: int, j: int, tq: int, tk: int, causal: bool, window: Any, length: int | None, start: int | None) -> bool:
    position = i + (tk - tq if start is None else start)
    if causal and j > position:
        return False
    left, right = (-1, -1) if window is None else (window, window) if isinstance(window, int) else window
    if left >= 0 and j < position - left or right >= 0 and j > position + right:
        return False
    return length is None or j < length


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Any = None,
    key_lengths: Tensor | None = None,
    query_start: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One row at a time, only the visible keys, plain differentiable float64."""
    b, h, tq, d = q.shape
    tk, group = k.shape[2], h // k.shape[1]
    outs, sums = [], []
    for item in range(b):
        for head in range(h):
            for i in range(tq):
                length = None if key_lengths is None else int(key_lengths[item])
                start = None if query_start is None else int(query_start[item])
                keys = [j for j in range(tk) if sees(i, j, tq, tk, causal, window, length, start)]
                scores = []
                for j in keys:
                    s = (q[item, head, i].double() * k[item, head // group, j].double()).sum() * (1 / math.sqrt(d) if scale is None else scale)
                    s = softcap * torch.tanh(s / softcap) if softcap else s
                    scores.append(s if bias is None else s + bias.double().expand(b, h, tq, tk)[item, head, i, j])
                if not keys or all(float(s.detach()) == -INF for s in scores):
                    outs.append(torch.zeros(v.shape[3], dtype=torch.float64))
                    sums.append(torch.tensor(-INF, dtype=torch.float64))
                    continue
                row = torch.stack(scores)
                p = torch.softmax(row, 0)
                if kept is not None:
                    p = p * kept[item, head, i, keys] / (1 - dropout_p)
                outs.append((p[:, None] * v[item, head // group, keys].double()).sum(0))
                sums.append(torch.logsumexp(row, 0))
    return torch.stack(outs).view(b, h, tq, v.shape[3]), torch.stack(sums).view(b, h, tq)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"scale": -0.3},
    "window": {"window": (2, 1)},
    "window one side": {"window": (1, -1)},
    "causal window": {"window": 1, "causal": True},
    "key_lengths": {"key_lengths": torch.tensor([4, 0], dtype=torch.int32)},
    "causal key_lengths": {"key_lengths": torch.tensor([4, 9]), "causal": True},
    "query_start": {"query_start": torch.tensor([-2, 3]), "causal": True},
    "query_start window": {"query_start": torch.tensor([0, 4], dtype=torch.int32), "window": (2, 0), "key_lengths": torch.tensor([3, 6])},
    "query_start far": {"query_start": torch.tensor([5, 0]), "window": (6, -1)},
    "softcap": {"softcap": 0.8},
    "all": {"softcap": 1.5, "causal": True, "window": (3, 0), "key_lengths": torch.tensor([3, 7]), "scale": 0.9},
}
SIZES = {"few queries": (5, 7), "many queries": (7, 4), "one query": (1, 6), "square": (6, 6)}


def finite_lse(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0], pair[1].masked_fill(pair[1] == -INF, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
def test_law(options: str, size: str) -> None:
    q, k, v = inputs(tq=SIZES[size][0], tk=SIZES[size][1])
    out, lse = flash_attention(q, k, v, return_lse=True, **OPTIONS[options])
    want, want_lse = oracle(q, k, v, **OPTIONS[options])
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ["plain", "all", "query_start window"])
def test_gradients_of_the_law(options: str) -> None:
    leaves = [t.requires_grad_() for t in (*inputs(), normal(4, 1, 7, seed=4))]
    weight, weight_lse = normal(2, 4, 5, 3, seed=5), normal(2, 4, 5, seed=6)
    found = []
    for function in (lambda q, k, v, b, **o: flash_attention(q, k, v, bias=b, return_lse=True, **o), lambda q, k, v, b, **o: oracle(q, k, v, bias=b, **o)):
        out, lse = finite_lse(function(*leaves, **OPTIONS[options]))
        found.append(torch.autograd.grad((out * weight).sum() + (lse * weight_lse).sum(), leaves))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 1, 7), (5, 1), (7,), (2, 1, 1, 1), (1, 1, 5, 7), ()])
def test_bias_broadcasts(shape: tuple[int, ...]) -> None:
    q, k, v = inputs()
    mine, theirs = (normal(*shape, seed=7).requires_grad_() for _ in range(2))
    out, (want, _) = flash_attention(q, k, v, bias=mine, causal=True), oracle(q, k, v, bias=theirs, causal=True)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    weight = normal(2, 4, 5, 3, seed=8)
    (got,), (expected,) = torch.autograd.grad((out * weight).sum(), mine), torch.autograd.grad((want * weight).sum(), theirs)
    assert got.shape == mine.shape
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_bias_of_another_dtype() -> None:
    q, k, v = inputs(dtype=torch.float32)
    bias = normal(5, 7, dtype=torch.bfloat16).requires_grad_()
    out = flash_attention(q, k, v, bias=bias)
    torch.testing.assert_close(out, oracle(q, k, v, bias=bias.detach())[0].float())
    out.sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.bfloat16


def test_bias_hides_with_minus_infinity() -> None:
    q, k, v = (t.requires_grad_() for t in inputs())
    bias = torch.zeros(5, 7, dtype=torch.float64)
    bias[:, 4:], bias[2] = -INF, -INF
    bias.requires_grad_()
    out, lse = flash_attention(q, k, v, bias=bias, return_lse=True)
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2])) and (lse[:, :, 2] == -INF).all()
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(out[:, :, keep], oracle(q[:, :, keep], k[:, :, :4], v[:, :, :4])[0])
    for grad in torch.autograd.grad(out.sum() + lse[:, :, keep].sum(), (q, k, v, bias)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_narrow_dtypes(dtype: torch.dtype, options: str) -> None:
    """The forward's error is that of the inputs' rounding; lse is float32."""
    q, k, v = inputs(tq=9, tk=9, d=16, dv=16, dtype=dtype)
    out, lse = flash_attention(q, k, v, return_lse=True, **OPTIONS[options])
    want, want_lse = oracle(q, k, v, **OPTIONS[options])
    assert out.dtype == dtype and lse.dtype == torch.float32
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=tolerance, atol=tolerance)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    weight = normal(*out.shape, seed=9)
    mine = torch.autograd.grad((flash_attention(*leaves, **OPTIONS[options]) * weight.to(dtype)).sum(), leaves)
    theirs = torch.autograd.grad((oracle(*wide, **OPTIONS[options])[0] * weight.to(dtype).double()).sum(), wide)
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=4 * tolerance, atol=4 * tolerance)


def test_large_scores() -> None:
    """A softmax that is one to the last digit, and probabilities that underflow, in float32."""
    q, k, v = inputs(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (q * 40, k * 40, v)]
    out, lse = flash_attention(*leaves, return_lse=True)
    want, want_lse = oracle(*leaves)
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-4)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_agrees_with_pytorch() -> None:
    q, k, v = inputs(hkv=4, tq=16, tk=16, d=8, dv=8, dtype=torch.float32)
    torch.testing.assert_close(flash_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(flash_attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))


# -- far and huge numbers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", attention_cases.FAR)
def test_far_positions(name: str) -> None:
    for dtype in (torch.float64, torch.float32):
        with use("reference"):
            attention_cases.check_far_positions(name, dtype)


@pytest.mark.parametrize("window", [np.int64(2), np.int8(2), torch.tensor(2), (2, np.int32(2)), np.array([2, 2]), torch.tensor([2, 2]), [2, 2]])
def test_windows_of_any_integers(window: Any) -> None:
    q, k, v = inputs()
    assert torch.equal(flash_attention(q, k, v, window=window), flash_attention(q, k, v, window=(2, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", attention_cases.HUGE)
def test_huge_bias(name: str, dtype: torch.dtype) -> None:
    with use("reference"):
        for broadcast in (False, True):
            attention_cases.check_huge_bias(name, dtype, 6, 9, causal=not broadcast, broadcast=broadcast)


@pytest.mark.parametrize("fill", [torch.finfo(torch.float64).min, torch.finfo(torch.float64).max, -1e20])
def test_huge_bias_in_float64(fill: float) -> None:
    """Whatever the score, it rounds away beside such a number: the mean of the values, and its derivatives of every order."""
    q, k, v = (t.requires_grad_() for t in inputs())
    bias = torch.full((5, 7), fill, dtype=torch.float64).requires_grad_()
    out, lse = flash_attention(q, k, v, bias=bias, return_lse=True)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, fill))
    want = torch.autograd.grad((torch.softmax(q @ k.repeat_interleave(2, 1).transpose(2, 3) / 2 + fill, -1) @ v.repeat_interleave(2, 1)).sin().sum(), (q, k, v))
    found = torch.autograd.grad(out.sin().sum(), (q, k, v, bias), create_graph=True)
    for got, expected in zip(found, want, strict=False):
        torch.testing.assert_close(got, expected)
    assert all(x.isfinite().all() for x in torch.autograd.grad(sum(x.square().sum() for x in found), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("softcap", [INF, 1e39, 1e308])
def test_a_cap_that_no_score_comes_near_is_none(softcap: float, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    torch.testing.assert_close(flash_attention(q, k, v, softcap=softcap), flash_attention(q, k, v))


def test_a_scale_that_float32_cannot_hold() -> None:
    q, k, v = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"scale must be a finite number in float32, in which scores are computed, not 1e\+39"):
        flash_attention(q, k, v, scale=1e39)
    assert flash_attention(*inputs(), scale=1e39).isfinite().all()


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
def test_numbers_have_no_gradient(name: str) -> None:
    q, k, v = inputs()
    with pytest.raises(TypeError, match=f"{name} is a tensor that asks for a gradient.*multiply it into an argument"):
        flash_attention(q, k, v, **{name: torch.tensor(0.5, requires_grad=True)})
    torch.manual_seed(0)
    found = flash_attention(q, k, v, **{name: torch.tensor(0.5)})
    torch.manual_seed(0)
    assert torch.equal(found, flash_attention(q, k, v, **{name: 0.5}))


# -- alignment -------------------------------------------------------------------------------------------------------------------
def test_padded_batch_is_masked_as_its_sentences_alone() -> None:
    """Causal alignment goes by the tensors' sizes: right-padded self-attention gives each sentence its own result."""
    q, k, v = inputs(tq=6, tk=6)
    lengths = torch.tensor([6, 4])
    out = flash_attention(q, k, v, causal=True, window=(2, 0), key_lengths=lengths)
    for item, n in enumerate(lengths.tolist()):
        alone = flash_attention(q[item : item + 1, :, :n], k[item : item + 1, :, :n], v[item : item + 1, :, :n], causal=True, window=(2, 0))
        torch.testing.assert_close(out[item : item + 1, :, :n], alone)


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_decoder_with_a_preallocated_cache(window: Any) -> None:
    """Steps of one or more queries over a longer cache, its tail not a number, equal the whole sequence at once."""
    lengths = [6, 4]
    q, k, v = inputs(tq=6, tk=6)
    cache_k, cache_v = (F.pad(t, (0, 0, 0, 3), value=NAN) for t in (k, v))
    for steps in (1, 2):
        filled = torch.tensor(lengths)
        step = flash_attention(
            torch.stack([q[item, :, n - steps : n] for item, n in enumerate(lengths)]),
            torch.stack([torch.where(torch.arange(9)[:, None] < n, cache_k[item], NAN) for item, n in enumerate(lengths)]),
            torch.stack([torch.where(torch.arange(9)[:, None] < n, cache_v[item], NAN) for item, n in enumerate(lengths)]),
            causal=True,
            window=window,
            key_lengths=filled,
            query_start=filled - steps,
        )
        for item, n in enumerate(lengths):
            whole = flash_attention(q[item : item + 1, :, :n], k[item : item + 1, :, :n], v[item : item + 1, :, :n], causal=True, window=window)
            torch.testing.assert_close(step[item], whole[0, :, n - steps :])


# -- packed ----------------------------------------------------------------------------------------------------------------------
def packed_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return normal(9, 4, 4, dtype=dtype, seed=1), normal(10, 2, 4, dtype=dtype, seed=2), normal(10, 2, 3, dtype=dtype, seed=3)


CU_Q, CU_K = torch.tensor([1, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 4, 6, 9])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (1, 1)}, {"causal": True, "window": (2, 0), "softcap": 1.0}])
def test_packed_sequences(options: dict[str, Any]) -> None:
    """Each sequence as if alone, aligned by its own lengths; rows of no sequence give 0 and their content is not used."""
    q, k, v = packed_inputs()
    k[9], v[9] = NAN, NAN
    for t in (q, k, v):
        t.requires_grad_()
    out, lse = flash_attention(q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, return_lse=True, **options)
    assert out.shape == (9, 4, 3) and lse.shape == (4, 9)
    want, want_lse = torch.zeros(9, 4, 3, dtype=torch.float64), torch.full((4, 9), -INF, dtype=torch.float64)
    for s in range(3):
        rows, keys = slice(int(CU_Q[s]), int(CU_Q[s + 1])), slice(int(CU_K[s]), int(CU_K[s + 1]))
        if rows.start < rows.stop:
            one, one_lse = oracle(*(t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys])), **options)
            want[rows], want_lse[:, rows] = one[0].transpose(0, 1), one_lse[0]
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    weight = normal(9, 4, 3, seed=4)
    mine, theirs = (torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (out, want))
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert (mine[0][0] == 0).all() and (mine[1][9] == 0).all()


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "words"),
    [
        ([0, 5, 3, 9], [0, 4, 6, 9], r"cu_seqlens_q\[2\] is 3: it is less than 5"),
        ([0, 3, 9], [2, 1, 9], r"cu_seqlens_k\[1\] is 1: it is less than 2"),
        ([0, 3, 10], [0, 4, 10], r"cu_seqlens_q\[2\] is 10: the tensor has 9 rows"),
        ([-1, 3, 9], [0, 4, 9], r"cu_seqlens_q\[0\] is -1: it is less than 0"),
        ([0, 2**32 + 3, 9], [0, 4, 9], r"cu_seqlens_q\[1\] is 4294967299"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_offsets_that_are_none(backend: str, cu_q: list[int], cu_k: list[int], words: str) -> None:
    """Said by every backend that can see it, also from compiled code."""
    if backend == "native" and native.library() is None:
        pytest.skip("the native library is not there")
    tensors, offsets = packed_inputs(torch.float32), [torch.tensor(cu_q), torch.tensor(cu_k)]

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        return flash_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)

    with use(backend):
        for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
            with pytest.raises(ValueError, match="must rise from 0 or more to .* at most.*" + words):
                function(*tensors, *offsets)


def test_offsets_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: they count as the nearest inside, running up."""
    q, k, v = packed_inputs()
    monkeypatch.setattr(reference, "check_offsets", lambda *_: False)
    wrong, right = torch.tensor([-3, 5, 3, 99]), torch.tensor([0, 5, 5, 9])
    with use("reference"):
        found = flash_attention(q, k[:9], v[:9], cu_seqlens_q=wrong, cu_seqlens_k=wrong)
    torch.testing.assert_close(found, flash_attention(q, k[:9], v[:9], cu_seqlens_q=right, cu_seqlens_k=right))


def test_packed_equals_padded() -> None:
    lengths = torch.tensor([3, 5, 1])
    q, k, v = inputs(b=3, tq=5, tk=5)
    padded = flash_attention(q, k, v, causal=True, key_lengths=lengths)
    pack = [torch.cat([t[item, :, :n].transpose(0, 1) for item, n in enumerate(lengths.tolist())]) for t in (q, k, v, padded)]
    cu = F.pad(lengths.cumsum(0), (1, 0))
    torch.testing.assert_close(flash_attention(*pack[:3], causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu), pack[3])


# -- nothing there, nothing seen ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("b, tq, tk", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 1}, {"key_lengths": 0}, {"softcap": 2.0, "dropout_p": 0.5}])
def test_empties(b: int, tq: int, tk: int, options: dict[str, Any]) -> None:
    leaves = [t.requires_grad_() for t in (*inputs(b=b, tq=tq, tk=tk), torch.ones(1, 1, tq, tk, dtype=torch.float64))]
    options = {name: torch.zeros(b, dtype=torch.int64) if name == "key_lengths" else value for name, value in options.items()}
    out, lse = flash_attention(*leaves[:3], bias=leaves[3], return_lse=True, **options)
    assert out.shape == (b, 4, tq, 3) and (out == 0).all() and (lse == -INF).all()
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and (grad == 0).all()


def test_packed_empties() -> None:
    q, k, v = packed_inputs()
    none = torch.zeros(1, dtype=torch.int32)
    assert (flash_attention(q, k, v, cu_seqlens_q=none, cu_seqlens_k=none) == 0).all()
    assert flash_attention(q[:0], k[:0], v[:0], cu_seqlens_q=none, cu_seqlens_k=none).shape == (0, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_poison_behind_the_lengths(dtype: torch.dtype, poison: float) -> None:
    """What lies behind key_lengths changes no bit of results and gradients; a sentence without keys gives zeros."""
    lengths = torch.tensor([4, 0])
    found = []
    for filler in (0.0, poison):
        q, k, v = inputs(dtype=dtype)
        behind = torch.arange(7)[None, None, :, None] >= lengths[:, None, None, None]
        leaves = [t.requires_grad_() for t in (q, k.masked_fill(behind, filler), v.masked_fill(behind, filler))]
        out, lse = flash_attention(*leaves, causal=True, key_lengths=lengths, return_lse=True)
        assert (out[1] == 0).all() and (lse[1] == -INF).all()
        grads = torch.autograd.grad(out.float().square().sum() + lse.masked_fill(lse == -INF, 0).sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)
        found.append((out, lse, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_poison_in_the_second_derivative() -> None:
    q, k, v = inputs()
    lengths = torch.tensor([4, 0])
    behind = torch.arange(7)[None, None, :, None] >= lengths[:, None, None, None]
    leaves = [t.requires_grad_() for t in (q, k.masked_fill(behind, NAN), v.masked_fill(behind, NAN))]
    first = torch.autograd.grad(flash_attention(*leaves, key_lengths=lengths).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert all(grad.isfinite().all() for grad in second) and any((grad != 0).any() for grad in second)


def test_visible_nan_stays_in_its_rows() -> None:
    q, k, v = inputs()
    q[0, 1, 2] = NAN
    out, lse = flash_attention(q, k, v, return_lse=True)
    bad = torch.zeros(2, 4, 5, dtype=torch.bool)
    bad[0, 1, 2] = True
    assert torch.equal(out.isnan().all(-1), bad) and torch.equal(lse.isnan(), bad)


# -- strides, blocks, repeatability --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", attention_cases.BLIND)
def test_rows_that_see_no_key_are_not_read(name: str, dtype: torch.dtype) -> None:
    with use("reference"):
        attention_cases.check_blind_rows(name, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("heads", [1, 4])
def test_scale_of_zero_in_poisoned_memory(dtype: torch.dtype, heads: int) -> None:
    """Every visible key has the same weight, and what lay in the memory of the results does not matter."""
    torch.use_deterministic_algorithms(True)  # fresh tensors are full of NaN
    try:
        q, k, v = (t.requires_grad_() for t in inputs(1, heads, heads, 7, 33, 64, 16, dtype=dtype))
        with use("reference"):
            out = flash_attention(q, k, v, scale=0.0)
            grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(out.shape), rtol=tolerance, atol=tolerance)
    assert not grads[0].any() and not grads[1].any()
    torch.testing.assert_close(grads[2], torch.full_like(v, 7 / 33), rtol=tolerance, atol=tolerance)


def test_strides() -> None:
    """The model's layout [B, T, H, D], keys cut from a cache and an expanded batch, forward and backward."""
    b, h, t, d = 2, 4, 6, 4
    fused = normal(b, t, 3, h, d, seed=1).requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in fused.unbind(2))
    cache = normal(1, h, 9, d, seed=2)
    for key in (k, cache[:, :, 2:8].expand(b, h, t, d)):
        out = flash_attention(q, key, v, causal=True)
        assert out.is_contiguous()
        torch.testing.assert_close(out, oracle(q, key, v, causal=True)[0])
        # The gradient of a sum is an expanded scalar.
        mine, theirs = torch.autograd.grad(out.sum(), fused)[0], torch.autograd.grad(oracle(q, key, v, causal=True)[0].sum(), fused)[0]
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("limit", [1, 60, 150, 300])
@pytest.mark.parametrize("options", ["plain", "all", "query_start window"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, limit: int, options: str) -> None:
    """Whatever the size of a block, results and first and second derivatives are those of one block."""
    found = []
    for block in (reference.BLOCK, limit):
        monkeypatch.setattr(reference, "BLOCK", block)
        torch.manual_seed(0)
        leaves = [t.requires_grad_() for t in (*inputs(), normal(2, 1, 5, 7, seed=4))]
        out, lse = finite_lse(flash_attention(*leaves[:3], bias=leaves[3], dropout_p=0.3, return_lse=True, **OPTIONS[options]))
        first = torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves, create_graph=True)
        found.append((out, lse, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-10, atol=1e-11)


def test_blocks_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over blocks are held in float32: many blocks lose no more than one."""
    q, k, v = inputs(b=1, h=1, hkv=1, tq=256, tk=8, dtype=torch.float64)
    q, k, v = (t.to(torch.bfloat16).double() for t in (q, k, v))
    wide = [t.clone().requires_grad_() for t in (q, k, v)]
    want = torch.autograd.grad(flash_attention(*wide).sum(), wide[2])[0]
    monkeypatch.setattr(reference, "BLOCK", 16)
    narrow = [t.to(torch.bfloat16).requires_grad_() for t in (q, k, v)]
    got = torch.autograd.grad(flash_attention(*narrow).sum(), narrow[2])[0]
    torch.testing.assert_close(got.double(), want, rtol=0.01, atol=0.01)


def test_runs_are_equal_to_the_bit() -> None:
    found = []
    for _ in range(3):
        torch.manual_seed(5)
        leaves = [t.requires_grad_() for t in inputs(tq=33, tk=33, dtype=torch.float32)]
        out = flash_attention(*leaves, causal=True, dropout_p=0.2)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# -- dropout ---------------------------------------------------------------------------------------------------------------------
def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def kept(seed: Tensor, p: float, b: int, h: int, tq: int, tk: int) -> Tensor:
    """The hash of the docstring, in Python's integers."""
    s0, s1 = (int(word) & 0xFFFFFFFF for word in seed)
    key = mix(mix(s0) ^ s1)
    rows = [[[mix((mix((key + i * h + n) & 0xFFFFFFFF) + row) & 0xFFFFFFFF) for row in range(tq)] for n in range(h)] for i in range(b)]
    columns = [mix(key ^ mix(j)) for j in range(tk)]
    limit = math.floor(p * 2**32)
    return torch.tensor([[[[mix(row ^ column) >= limit for column in columns] for row in head] for head in item] for item in rows])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_by_its_hash(p: float) -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    torch.manual_seed(3)
    out, lse = flash_attention(*leaves, dropout_p=p, causal=True, return_lse=True)
    torch.manual_seed(3)
    mask = kept(torch.randint(-(2**31), 2**31, (2,)), p, 2, 4, 5, 7)
    want, want_lse = oracle(*leaves, causal=True, kept=mask, dropout_p=p)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse)
    weight = normal(*out.shape, seed=4)
    for got, expected in zip(*(torch.autograd.grad((o * weight).sum(), leaves) for o in (out, want)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_dropout_rate_and_independence() -> None:
    """Rates over everything, over rows, columns and heads, and the correlation of neighbours, within five standard deviations."""
    seed, p, n = torch.tensor([123, -456]), 0.25, 64
    keep = reference.dropout_keep(seed, p, reference.Part(slice(0, 8), slice(0, n)), 4, n).double()
    assert keep.shape == (8, 4, n, n)
    for axes, count in (((0, 1, 2, 3), keep.numel()), ((3,), n), ((2,), n), ((0, 2, 3), 8 * n * n)):
        assert ((keep.mean(axes) - (1 - p)).abs() < 5 * math.sqrt(p * (1 - p) / count)).all()
    centred = (keep - (1 - p)) / math.sqrt(p * (1 - p))
    for axis in range(4):
        pairs = centred.narrow(axis, 1, keep.shape[axis] - 1) * centred.narrow(axis, 0, keep.shape[axis] - 1)
        assert abs(pairs.mean()) < 5 / math.sqrt(pairs.numel())
    other = reference.dropout_keep(torch.tensor([124, -456]), p, reference.Part(slice(0, 8), slice(0, n)), 4, n).double()
    assert abs((centred * (other - (1 - p))).mean()) < 5 / math.sqrt(keep.numel())


def test_dropout_draws_from_the_generator_only_when_run() -> None:
    q, k, v = inputs()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    explain("flash_attention", q, k, v, dropout_p=0.5)
    flash_attention(q, k, v)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(flash_attention(q, k, v, dropout_p=0.5), flash_attention(q, k, v, dropout_p=0.5))


# -- derivatives by differences --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [*OPTIONS, "dropout"])
def test_gradcheck(options: str) -> None:
    leaves = [t.requires_grad_() for t in (*inputs(b=2, h=2, hkv=1, tq=2, tk=3, d=2, dv=2), normal(2, 1, 3, seed=4))]

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        extra = {"dropout_p": 0.4} if options == "dropout" else OPTIONS[options]
        return finite_lse(flash_attention(q, k, v, bias=bias, return_lse=True, **extra))

    assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


def test_gradcheck_packed_and_shared() -> None:
    """Packed; and one tensor as queries, keys and values, whose derivatives of every order are the sum over the three places."""
    leaves = [t.requires_grad_() for t in packed_inputs()]
    assert gradgradcheck(lambda q, k, v: flash_attention(q, k, v, causal=True, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K), leaves)
    x = normal(1, 1, 3, 2).requires_grad_()
    assert gradcheck(lambda x: flash_attention(x, x, x), (x,)) and gradgradcheck(lambda x: flash_attention(x, x, x), (x,))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2)])
def test_only_some_gradients(wanted: tuple[int, ...]) -> None:
    tensors = [*inputs(), normal(5, 7)]
    everything = [t.clone().requires_grad_() for t in tensors]
    some = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    losses = [flash_attention(*t[:3], bias=t[3], softcap=1.0).square().sum() for t in (everything, some)]
    all_grads = torch.autograd.grad(losses[0], everything)
    for i, grad in zip(wanted, torch.autograd.grad(losses[1], [some[i] for i in wanted]), strict=True):
        torch.testing.assert_close(grad, all_grads[i])


# -- the op in PyTorch's machinery -----------------------------------------------------------------------------------------------------
def schema_arguments(dtype: torch.dtype, kind: str) -> tuple[Any, ...]:
    if kind == "packed":
        return _prepare(*packed_inputs(dtype), cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, causal=True)
    q, k, v = inputs(dtype=dtype)
    if kind == "strided":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        return _prepare(q, k, v)
    found = _prepare(q, k, v, bias=normal(4, 1, 7, dtype=dtype), key_lengths=torch.tensor([3, 0]), causal=True, softcap=2.0, dropout_p=0.2)
    return found._replace(dropout_seed=torch.tensor([1, 2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["all", "packed", "strided"])
def test_opcheck(dtype: torch.dtype, kind: str) -> None:
    arguments = schema_arguments(dtype, kind)
    torch.library.opcheck(torch.ops.cvmk.flash_attention_forward.default, arguments)
    out, lse = torch.ops.cvmk.flash_attention_forward(*arguments)
    for needs in ([True] * 4, [False, True, False, False]):
        torch.library.opcheck(
            torch.ops.cvmk.flash_attention_backward.default,
            (torch.ones_like(out), None if kind == "all" else torch.ones_like(lse), *arguments[:9], out, lse, *arguments[9:], needs),
        )


def test_compile() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, bias: Tensor) -> Tensor:
        out, lse = flash_attention(q * 2, k, v, causal=True, window=(3, -1), key_lengths=lengths, bias=bias, return_lse=True)
        return out.square().sum() + lse.masked_fill(lse == -INF, 0).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for b, t in ((2, 5), (3, 8)):
        found = []
        for function in (step, compiled):
            leaves = [x.requires_grad_() for x in (*inputs(b=b, tq=t, tk=t), normal(t, t))]
            loss = function(*leaves[:3], torch.arange(b) + 2, leaves[3])
            found.append((loss, *torch.autograd.grad(loss, leaves)))
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(eager, traced)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", [*OPTIONS, "bias", "dropout", "packed"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_transforms(backend: str, options: str) -> None:
    """Results, and derivatives of the first and second order, of every option."""
    if backend == "native" and native.library() is None:
        pytest.skip("the native library is not there")
    dtype = torch.float32 if backend == "native" else torch.float64
    leaves, extra = list(inputs(dtype=dtype)), dict(OPTIONS.get(options, {}))
    if options == "packed":
        leaves, extra = list(packed_inputs(dtype)), {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "causal": True}
    elif options in ("bias", "all"):
        leaves.append(normal(4, 1, 7, dtype=dtype, seed=4))

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return finite_lse(flash_attention(q, k, v, bias=bias, return_lse=True, **extra))

    def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = op(_prepare(q, k, v, dropout_p=0.3)._replace(dropout_seed=torch.tensor([3, 4])))
        return found[0]

    tolerance = {"rtol": 1e-3, "atol": 1e-4} if backend == "native" else {}
    with use(backend):
        check_transforms(dropping if options == "dropout" else attend, leaves, **tolerance)


class Layer(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return flash_attention(q, k, v, causal=True, key_lengths=lengths)


class Packed(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return flash_attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)


def test_export() -> None:
    batch, tq, tk = torch.export.Dim("batch"), torch.export.Dim("tq"), torch.export.Dim("tk")
    shapes = ({0: batch, 2: tq}, {0: batch, 2: tk}, {0: batch, 2: tk}, {0: batch})
    program = torch.export.export(Layer(), (*inputs(), torch.tensor([4, 7])), dynamic_shapes=shapes)
    q, k, v = inputs(b=3, tq=4, tk=9)
    lengths = torch.tensor([9, 0, 2])
    torch.testing.assert_close(program.module()(q, k, v, lengths), flash_attention(q, k, v, causal=True, key_lengths=lengths))
    total, n = torch.export.Dim("total"), torch.export.Dim("n")
    x, cu = normal(9, 2, 4), torch.tensor([0, 4, 9])
    packed = torch.export.export(Packed(), (x, x.clone(), x.clone(), cu), dynamic_shapes=({0: total}, {0: total}, {0: total}, {0: n}))
    x, cu = normal(12, 2, 4), torch.tensor([0, 4, 4, 10])
    torch.testing.assert_close(packed.module()(x, x.clone(), x.clone(), cu), flash_attention(x, x, x, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu))


def test_autocast() -> None:
    """As the matrix products that it replaces: float32 comes out as bfloat16, gradients come back as float32."""
    leaves = [t.requires_grad_() for t in inputs(dtype=torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = flash_attention(*leaves, bias=torch.zeros(5, 7), return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    lowered = [t.detach().bfloat16() for t in leaves]
    assert torch.equal(out, flash_attention(*lowered))
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.float().sum(), leaves))


def test_explain_and_use() -> None:
    q, k, v = inputs()
    rows = {row.backend: row for row in explain("flash_attention", q, k, v, causal=True)}
    assert not rows["reference"].reasons
    with use("reference"):
        torch.testing.assert_close(flash_attention(q, k, v), oracle(q, k, v)[0])
        assert next(row for row in explain("flash_attention", q, k, v) if row.chosen).backend == "reference"
    assert op.reference.forward.__wrapped__ is reference.forward  # behind a check of memory (_storage.py)


# -- wrong arguments ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"q": torch.ones(2, 4, 5)}, ValueError, r"q must be \[B, H, T, D\], not of shape \[2, 4, 5\]"),
        ({"q": torch.ones(2, 4, 5, 4, dtype=torch.int64)}, TypeError, "q must be float64, .* not torch.int64"),
        ({"q": torch.ones(2, 4, 5, 4)}, TypeError, "one dtype"),
        ({"k": torch.ones(3, 2, 7, 4), "v": torch.ones(3, 2, 7, 4)}, ValueError, "batch dimension"),
        ({"k": torch.ones(2, 2, 7, 3)}, ValueError, "last dimension"),
        ({"k": torch.ones(2, 3, 7, 4)}, ValueError, "multiple"),
        ({"v": torch.ones(2, 2, 6, 4)}, ValueError, "all but the last"),
        ({"v": torch.ones(2, 2, 7, 4, dtype=torch.int8)}, TypeError, "v must be"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), not 1.0"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"softcap": NAN}, ValueError, "softcap"),
        ({"softcap": 1e-310}, ValueError, "scale / softcap is finite"),
        ({"scale": NAN}, ValueError, "scale must be a finite number, not nan"),
        ({"scale": -INF}, ValueError, "scale must be a finite number"),
        ({"window": (1, 2, 3)}, ValueError, r"two \(left, right\)"),
        ({"window": -2}, ValueError, "window"),
        ({"window": (3, np.int64(-2))}, ValueError, "window"),
        ({"window": 3.0}, TypeError, "window must be an integer or two .* not 3.0"),
        ({"window": True}, TypeError, "window must be an integer"),
        ({"window": (2, np.bool_(True))}, TypeError, "window must be an integer"),
        ({"window": "34"}, TypeError, "window must be an integer"),
        ({"key_lengths": torch.ones(3, dtype=torch.int64)}, ValueError, r"key_lengths must be \[B\] = \[2\]"),
        ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths must be int32 or int64"),
        ({"query_start": torch.ones(2, 1, dtype=torch.int64)}, ValueError, "query_start"),
        ({"bias": torch.ones(5, 7, dtype=torch.bool)}, TypeError, "bias must be floating"),
        ({"bias": torch.ones(5, 6)}, ValueError, r"broadcastable to \[B, H, Tq, Tk\] = \[2, 4, 5, 7\]"),
        ({"cu_seqlens_q": CU_Q}, ValueError, "both"),
        ({"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}, ValueError, r"\[total, H, D\]"),
        ({"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K[:2]}, ValueError, "numbers of sequences"),
        ({"cu_seqlens_q": CU_Q.float(), "cu_seqlens_k": CU_K}, TypeError, "cu_seqlens_q"),
        ({"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K.to("meta")}, ValueError, "cu_seqlens_k must be on cpu as q is, not on meta"),
        ({"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "key_lengths": torch.ones(2, dtype=torch.int64)}, ValueError, "padded batches"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = dict(zip("qkv", inputs(), strict=True))
    with pytest.raises(error, match=words):
        flash_attention(**{**arguments, **changes})
