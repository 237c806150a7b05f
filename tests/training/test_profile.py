"""`cvmk train --profile`: what it counts and writes, and that it is not there without being asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cvmk import nvtx, ops
from cvmk.config import ModelConfig
from cvmk.nn import CVMTransformer
from cvmk.telemetry.schema import Profiled
from cvmk.text.batching import Batch
from cvmk.training.profile import PHASES, StepProfiler
from cvmk.training.work import output_products, phase_products, products

SMALL = ModelConfig(d_model=16, ffn=24, heads=4, encoder_layers=2, decoder_layers=3, max_length=32, dropout=0.0)
VOCABULARY = 40


def full_batch(rows: int = 3, source: int = 5, target: int = 7) -> Batch:
    ids = [torch.randint(4, VOCABULARY, (rows, length)) for length in (source, target, target)]
    return Batch(*ids, torch.full((rows,), source), torch.full((rows,), target), torch.arange(rows), rows * target)


@pytest.mark.parametrize("options", [{}, {"activation": "swiglu"}, {"kv_heads": 2}], ids=str)
def test_operations_are_those_that_pytorch_counts(options: dict[str, Any]) -> None:
    config, batch = SMALL.model_copy(update=options), full_batch()
    model = CVMTransformer(config, VOCABULARY)
    with ops.use("reference"), FlopCounterMode(display=False) as counted, torch.no_grad():
        _, _, maps = model.forward_features(batch.src, batch.tgt_in, return_attention=True)
    assert maps is not None
    attention = sum(4 * found.q.numel() * found.k.shape[2] for found in (*maps.encoder, *maps.decoder, *maps.cross))  # one op, which PyTorch does not look into
    assert counted.get_total_flops() + attention == products(config, batch)
    found = phase_products(config, config, VOCABULARY, [batch, batch])
    output = output_products(config, VOCABULARY, batch)
    assert output == 2 * 21 * 16 * VOCABULARY and found["teacher"] == found["forward"] == found["backward"] / 2 == 2 * products(config, batch)
    assert found["loss"] == 2 * 4 * output


def profiler(folder: Path, said: list[str], **options: Any) -> StepProfiler:
    return StepProfiler(folder, SMALL, None, VOCABULARY, 1000, torch.float32, torch.device("cpu"), said.append, **options)


def run(watched: StepProfiler, iterations: int) -> None:
    for step in range(1, iterations + 1):
        with watched.iteration():
            with nvtx.span("forward"):
                torch.randn(40, 40) @ torch.randn(40, 40)
            with nvtx.span("optimiser"):
                torch.zeros(10).add_(1)
            watched.took([full_batch()], 21, step)
    watched.finish()


@pytest.mark.parametrize("iterations", [0, 3, 12, 40])
def test_a_table_and_a_trace(tmp_path: Path, iterations: int) -> None:
    """Whether the training ends before, while or after it is watched."""
    said: list[str] = []
    told: list[Profiled] = []
    run(profiler(tmp_path, said, told=told.append, skipped=3, watched=10), iterations)
    assert nvtx.span("x") is nvtx.span("y")
    if iterations <= 3:
        assert not said and not (tmp_path / "profile").exists()
        return
    table = (tmp_path / "profile" / "profile.txt").read_text()
    assert len(said) == 1 and table.strip() in said[0] and "trace.json" in said[0]
    assert table.startswith(f"Iterations 4 to {min(13, iterations)} of this process: ")
    rows = {line[:44].strip(): line[44:].split() for line in table.splitlines()}
    assert {"forward", "optimiser", "the loop around them", "aten::mm"} <= rows.keys() and "data" not in rows
    assert float(rows["forward"][0]) > 0 and rows["forward"][2].endswith("%") and rows["aten::mm"][2] == "1.0"
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert sum(event.get("name") == "forward" for event in trace["traceEvents"]) == min(10, iterations - 3)
    assert told == [Profiled(4, min(10, iterations - 3), ["profile/profile.txt", "profile/trace.json"])]


def test_a_trace_is_not_larger_than_it_may_be(tmp_path: Path) -> None:
    said: list[str] = []
    run(profiler(tmp_path / "whole", said, skipped=0, watched=20), 20)
    whole = (tmp_path / "whole" / "profile" / "trace.json").stat().st_size
    run(profiler(tmp_path / "part", said, skipped=0, watched=20, trace_bytes=whole // 2), 20)
    path = tmp_path / "part" / "profile" / "trace.json"
    assert whole // 4 < path.stat().st_size <= whole // 2 and sorted(entry.name for entry in path.parent.iterdir()) == ["profile.txt", "trace.json"]
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert 2 < names.count("forward") < 20 and "process_name" in names
    assert "has every call" in said[0] and "% of the calls (telemetry.profile_bytes)" in said[1]


def test_phases_are_those_of_a_step() -> None:
    assert set(phase_products(SMALL, None, VOCABULARY, [])) < set(PHASES)


def test_spans_are_those_of_the_innermost_listener() -> None:
    names: list[str] = []

    def record(name: str) -> Any:
        names.append(name)
        return nvtx._NOTHING

    with nvtx.told(record), nvtx.span("a"):
        with pytest.raises(ZeroDivisionError), nvtx.told(lambda name: nvtx._NOTHING), nvtx.span("b"):
            raise ZeroDivisionError
        with nvtx.span("c"):
            pass
    with nvtx.span("d"):
        pass
    assert names == ["a", "c"]
