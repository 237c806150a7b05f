"""`ops._check`: rows for whatever is there, and a wrong kernel is seen, whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from cvmk import ops
from cvmk.ops import _check, _measured, triton
from cvmk.ops._op import OPS

CPU = torch.device("cpu")


def rows(*names: str, backend: str | None = None) -> list[_check.Row]:
    return [row for row in _check.rows(CPU, list(names) or None) if backend in (None, row.backend)]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a copy of the reference in the place of the CUDA backend of an op, with some fields replaced."""
    touched = []

    def put(op: str, **fields: Any) -> None:
        touched.append(OPS[op])
        values = {"name": "cuda", "devices": ("cpu",), "unavailable": None, "by_default": None, "limits": None, **fields}
        OPS[op].backends = [replace(OPS[op].reference, **values), *(backend for backend in OPS[op].backends if backend.name != "cuda")]

    yield put
    for op in touched:
        op.backends = None


@pytest.mark.timeout(400)  # threads that share too few processors wait for each other
def test_every_op_and_backend_has_rows_and_all_are_right() -> None:
    found = rows()
    assert {row.op for row in found} == {*ops.backends_report(), "CVMSketch"} == {*_check.CASES, "CVMSketch"}
    for op, statuses in ops.backends_report().items():
        for status in statuses:
            mine = [row for row in found if (row.op, row.backend) == (op, status.backend)]
            if status.available and not (status.backend == "triton" and triton.INTERPRETED):
                assert any(row.passed for row in mine)
            else:
                assert [row.passed for row in mine] == [None] and mine[0].reasons[0].startswith(status.backend)
    for row in found:
        assert row.passed is not False, row
        if row.passed:
            assert 0 <= row.error <= row.tolerance and row.seconds > 0 and not row.reasons
        else:
            assert row.error is row.tolerance is row.seconds is None and row.reasons
    differentiable = {row.op for row in found if row.passed and row.which == "gradient"}
    assert differentiable == set(ops.backends_report()) - {"adamw", "selective_state_update", "causal_conv1d_update"}
    for dtype in ("float32", "bfloat16", "float16"):
        assert {row.op for row in found if row.passed and row.case.endswith(dtype)} == set(ops.backends_report())


def test_an_exact_backend_is_right(stand_in: Callable[..., None]) -> None:
    stand_in("kd_loss")
    found = rows("kd_loss", backend="cuda")
    assert len(found) == 12 and all(row.passed for row in found)


def test_a_slightly_wrong_forward_pass_is_seen(stand_in: Callable[..., None]) -> None:
    forward = OPS["flash_attention"].reference.forward
    stand_in("flash_attention", forward=lambda call: tuple(x * (1 + 1e-4) for x in forward(call)))
    found = rows("flash_attention", backend="cuda")
    assert all(not row.passed for row in found if row.which == "forward" and row.case.endswith("float32"))
    assert all(row.error > row.tolerance for row in found if not row.passed)


def test_a_wrong_gradient_is_seen(stand_in: Callable[..., None]) -> None:
    backward = OPS["linear_kd_loss"].reference.backward
    assert backward is not None
    stand_in("linear_kd_loss", backward=lambda *arguments: tuple(x if x is None else x * 1.1 for x in backward(*arguments)))
    found = rows("linear_kd_loss", backend="cuda")
    assert {row.which for row in found if row.passed} == {"forward"} and {row.which for row in found if not row.passed} == {"gradient"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_value_that_is_missing_is_seen(stand_in: Callable[..., None], value: float) -> None:
    forward = OPS["attention_kl"].reference.forward

    def spoilt(call: Any) -> Any:
        (result,) = forward(call)
        result = result.clone()
        result.view(-1)[-1] = value
        return (result,)

    stand_in("attention_kl", forward=spoilt)
    assert all(not row.passed for row in rows("attention_kl", backend="cuda") if row.which == "forward")


def test_a_kernel_that_dies_is_a_row(stand_in: Callable[..., None]) -> None:
    def die(call: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    stand_in("attention_kl", forward=die)
    found = rows("attention_kl")
    dead = [row for row in found if row.backend == "cuda"]
    assert all(row.passed is False and row.reasons == ("RuntimeError: CUDA error: an illegal memory access was encountered",) for row in dead) and dead
    assert any(row.passed for row in found if row.backend == "reference"), "the others are still checked"


def test_what_a_backend_declines_is_not_wrong(stand_in: Callable[..., None]) -> None:
    stand_in("kd_loss", limits=lambda which, call: ["not today"] if which == "backward" else [], dtypes=(torch.float32,))
    found = rows("kd_loss", backend="cuda")
    assert [row.passed for row in found if row.case.endswith("float32")] == [True, None, True, None]
    assert all(row.passed is None for row in found if not row.case.endswith("float32"))
    assert {reason for row in found for reason in row.reasons} >= {"cuda: not today"}


def test_the_check_itself_does_not_warn(stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(_measured, "device_class", lambda device: "sm_99")
    _measured.forget()
    stand_in("attention_kl")
    assert rows("attention_kl", backend="cuda") and not recwarn.list
    _measured.forget()
