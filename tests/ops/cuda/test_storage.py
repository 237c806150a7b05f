"""Tensors whose storage was given back, and zero tensors, on the CUDA kernels."""

from __future__ import annotations

import pytest
import storage_cases
from cuda_on_cpu import DEVICE


@pytest.mark.parametrize("op", ["selective_scan", "selective_state_update", "int8_linear", "int4_linear", "kd_loss"])
def test_no_memory_is_read_where_there_is_none(op: str) -> None:
    storage_cases.check(op, "cuda", DEVICE)
