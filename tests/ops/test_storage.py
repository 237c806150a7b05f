"""Tensors whose storage was given back, and zero tensors: an error in every op and backend, where there was a fault of the process or a wrong number.

(CUDA's kernels: tests/ops/cuda/test_storage.py.)
"""

from __future__ import annotations

import pytest
import storage_cases
import torch

from cvmk import ops
from cvmk.ops import native, triton
from cvmk.ops._op import OPS
from cvmk.ops._storage import has_no_memory

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(native.library() is None, reason="the native library is not there")),
    pytest.param("triton", marks=pytest.mark.skipif(triton.reason() is not None, reason=str(triton.reason()))),
]


def device(backend: str, op: str) -> str:
    if backend not in [each.name for each in OPS[op].backends]:
        pytest.skip(f"{op} is not written for {backend}")
    return "cuda" if backend == "triton" and not triton.INTERPRETED else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", storage_cases.CASES)
def test_no_memory_is_read_where_there_is_none(op: str, backend: str) -> None:
    storage_cases.check(op, backend, device(backend, op))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "op,names",
    [
        ("flash_attention", ("q", "k", "v", "bias")),
        ("flash_attention_distill", ("q", "k", "v", "teacher_q", "teacher_k")),
        ("attention_kl", ("student_q", "student_k", "teacher_q", "teacher_k")),
        ("selective_scan", ("u", "delta", "A", "z")),
        ("causal_conv1d", ("x", "weight", "bias", "initial_state")),
        ("causal_conv1d_update", ("state", "x", "weight", "bias")),
        ("adamw", ("param", "grad", "exp_avg", "exp_avg_sq")),
        ("selective_state_update", ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")),
        ("int8_linear", ("x", "scales", "bias")),
        ("int4_linear", ("x", "values", "scales", "zeros", "bias")),
        ("kd_loss", ("student_logits", "teacher_logits")),
        ("residual_norm", ("x", "branch", "weight", "bias")),
        ("embed", ("weight", "positions")),
    ],
)
def test_the_kernels_say_so(op: str, names: tuple[str, ...], backend: str) -> None:
    storage_cases.check_messages(op, backend, names, device(backend, op))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "op,leaf", [("flash_attention", "k"), ("attention_kl", "student_q"), ("selective_scan", "u"), ("residual_norm", "weight"), ("embed", "weight")]
)
def test_storage_given_back_between_the_passes(op: str, leaf: str, backend: str) -> None:
    storage_cases.check_backward(op, backend, leaf, device(backend, op))


def test_weights_and_vectors_that_are_converted() -> None:
    """What is read before a kernel sees it: by PyTorch's operations, some of which end the process."""
    weight = ops.quantize_int8(torch.randn(4, 32))
    for call in (
        lambda: ops.quantize_int8(storage_cases.broken(torch.randn(4, 32), "given back")),
        lambda: ops.quantize_int4(storage_cases.broken(torch.randn(4, 32), "given back"), 32),
        lambda: ops.int8_linear(torch.randn(3, 32), weight, storage_cases.broken(torch.randn(4).double(), "given back")),
        lambda: ops.int8_linear(torch.randn(3, 32), weight, smooth_scale=storage_cases.broken(torch.ones(32).double(), "given back")),
    ):
        with pytest.raises(RuntimeError, match="has no memory behind it"):
            call()


def test_views_and_empty_tensors_are_not_taken_for_it() -> None:
    whole = torch.randn(4, 8)
    gone = torch.randn(2, 3)
    part = gone[1:]
    gone.untyped_storage().resize_(0)
    assert not any(map(has_no_memory, (whole, whole[1:], whole[:, 3:], whole[2:2], torch.empty(0), torch.empty(3, 0))))
    assert has_no_memory(gone) and has_no_memory(part) and has_no_memory(torch._efficientzerotensor((2, 3)))
