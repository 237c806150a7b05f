"""Tables of block sizes: which one counts, and what the tuner writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cvmk.ops.triton import _launch, _tuner, _tuning
from cvmk.ops.triton._tuning import Config, Tuned

CPU = torch.device("cpu")
BLOCKS = Tuned("blocks", heuristic=lambda key, capability: {"BLOCK": 32}, candidates=lambda key, capability: [{"BLOCK": 64}, {"BLOCK": 128}, {"BLOCK": 256}])
ran: list[Config] = []


def call(key: str) -> None:
    ran.append(BLOCKS.config(key, CPU))
    if ran[-1]["BLOCK"] == 256:
        raise RuntimeError("out of resource: shared memory")


MODULE = SimpleNamespace(TUNED=(BLOCKS,), CASES=(_launch.Case("small", lambda device: call("a")), _launch.Case("both", lambda device: (call("a"), call("b")))))


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CVMK_TUNING", str(tmp_path))
    for module in (_tuning, _tuner):
        monkeypatch.setattr(module, "capability", lambda device: (8, 0))
    _tuning.forget()
    ran.clear()
    return tmp_path / "sm_80.json"


def test_heuristic_where_no_table_has_it() -> None:
    assert BLOCKS.config("a", CPU) == {"BLOCK": 32}


def test_the_users_table_counts_more_than_the_packaged_one(own_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "packaged.json"
    packaged.write_text(json.dumps({"blocks": {"a": {"BLOCK": 64}, "b": {"BLOCK": 64}}}))
    monkeypatch.setattr(_tuning, "packaged_table", lambda capability: packaged)
    own_table.write_text(json.dumps({"blocks": {"a": {"BLOCK": 128}}}))
    _tuning.forget()
    assert [BLOCKS.config(key, CPU)["BLOCK"] for key in "abc"] == [128, 64, 32]


def test_a_broken_table_is_named(own_table: Path) -> None:
    own_table.write_text("{")
    _tuning.forget()
    with pytest.raises(ValueError, match=r"sm_80\.json"):
        BLOCKS.config("a", CPU)


def test_overriding_lets_go() -> None:
    with pytest.raises(KeyError), _tuning.overriding("blocks", "a", {"BLOCK": 1}):
        assert BLOCKS.config("a", CPU) == {"BLOCK": 1}
        assert BLOCKS.config("b", CPU) == {"BLOCK": 32}
        raise KeyError
    assert BLOCKS.config("a", CPU) == {"BLOCK": 32}


def test_tuner_keeps_what_is_clearly_faster() -> None:
    seconds = {("a", 32): 1.0, ("a", 64): 0.99, ("a", 128): 0.8, ("b", 32): 1.0, ("b", 64): 0.995, ("b", 128): 1.2}
    said: list[str] = []

    def measure(run: object) -> float:
        ran.clear()
        run()  # type: ignore[operator]
        keys = "ab"[: len(ran)]
        return sum(seconds[key, config["BLOCK"]] for key, config in zip(keys, ran, strict=True))

    found = _tuner.tune({"module": MODULE}, CPU, measure, said.append)  # type: ignore[dict-item]
    assert found == {"blocks": {"a": {"BLOCK": 128}, "b": {"BLOCK": 32}}}
    assert sum("left out" in line and "shared memory" in line for line in said) == 2


def test_what_was_tuned_before_stays() -> None:
    before = {"other": {"k": {"BLOCK": 8}}, "blocks": {"a": {"BLOCK": 1}, "c": {"BLOCK": 2}}}
    after = _tuning.merged(before, {"blocks": {"a": {"BLOCK": 3}}})
    assert after == {"other": {"k": {"BLOCK": 8}}, "blocks": {"a": {"BLOCK": 3}, "c": {"BLOCK": 2}}}
