"""A run's events as scalars for TensorBoard and as plots."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cvmk.errors import ConfigError, DataError
from cvmk.telemetry import EventStream, Record, RunLog, TelemetryDashboard, dashboard, plots, read_events
from cvmk.telemetry.plots import draw
from cvmk.telemetry.schema import Anomaly, Event, Iterations, Note, Resources, Resumed, Rollback, Serving, Start, Step, Validation
from cvmk.telemetry.tensorboard import ScalarWriter


def iterations(first: int, *losses: float) -> Iterations:
    count = len(losses)
    return Iterations(first, list(losses), [0.1] * count, [1.0] * count, [100] * count, [0.5] * count, [0.1] * count)


def validation(step: int, value: float) -> Validation:
    return Validation(step, "bleu", value, value - 1, value + 1, 0.95, [{"metric": "bleu", "value": value}], [], 20, 0.1, None)


RUN: list[Event] = [
    Start("student", 1000, 400, 0, 400, "cpu"),
    *(iterations(first, *(9 * math.exp(-step / 100) + 0.3 * (step % 7) for step in range(first, first + 100))) for first in (1, 101, 201)),
    Anomaly(150, "loss", 9.0, 3.0, 7.0),
    Resources(250, 1.5, 0.5, 1 << 30, 1 << 32, 1 << 34, [{"index": 0, "use": 0.9, "memory": 1 << 33}]),
    validation(200, 12.0),
    validation(300, 13.5),
]


# -- an independent reader ----------------------------------------------------------------------------------------------------------
def crc32c(data: bytes) -> int:
    """Bit by bit, by the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % (1 << 32)


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Of a message of protocol buffers."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            yield key >> 3, data[at : at + size]
            at += size


def scalars(folder: Path) -> list[tuple[int, dict[str, float] | None]]:
    """(step, values) of each record in the order of files; None where it says that what follows begins anew."""
    found: list[tuple[int, dict[str, float] | None]] = []
    for path in sorted(folder.iterdir(), key=lambda path: int(path.name.rpartition(".")[2])):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = data[12 : 12 + length]
            assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
            assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(event)
            data = data[16 + length :]
            content = dict(fields(event))
            if 7 in content:
                found.append((content[2], None))
            elif 5 in content:
                values = [dict(fields(value)) for _, value in fields(content[5])]
                found.append((content[2], {value[1].decode(): struct.unpack("<f", value[2])[0] for value in values}))
            else:
                assert content[3] == b"brain.Event:2"
    return found


# -- TensorBoard --------------------------------------------------------------------------------------------------------------------
def test_the_checksum_is_that_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4 has more
    from cvmk.telemetry.tensorboard import _checksum

    for data in (b"", b"123456789", bytes(32), bytes(range(256))):
        assert struct.unpack("<I", _checksum(data))[0] == masked(data)


def listened(folder: Path, events: list[Event], **options: Any) -> None:
    stream = EventStream(RunLog(folder), [TelemetryDashboard(folder, **options)])
    for event in events:
        stream.emit(event)
    stream.close()


def test_scalars_of_a_service(tmp_path: Path) -> None:
    """Its reports are numbered; what it uses stands at the last one."""
    report = Serving(2.0, 3, {"OK": 10}, models={"m": {"translations": 9, "queue_seconds": None, "decode_seconds": 0.02}})
    listened(tmp_path, [report, Resources(None, 0.5, None, 7, None, None), report])
    found = {step: values for step, values in scalars(tmp_path / "tensorboard") if values is not None and "service/requests" in values}
    rates = {"service/requests": 5.0, "service/failures": 0.0, "service/rejections": 0.0, "service/sessions": 3.0, "service/translations/m": 4.5}
    assert found == {step: pytest.approx(rates | {"service/decode_seconds/m": 0.02}) for step in (1, 2)}
    assert (1, {"process/cpu": 0.5, "process/memory": 7.0}) in scalars(tmp_path / "tensorboard")


def test_scalars_of_a_run(tmp_path: Path) -> None:
    listened(tmp_path, [*RUN, Step(301, 0.1, 1.0, 7.0, 2.0, 1.5, 0.5), Note("x")])
    assert [record.event for record in read_events(tmp_path / "events.jsonl")[0]][-1] == Note("x")  # and no complaint
    found = scalars(tmp_path / "tensorboard")
    assert found[0] == (1, None)
    by_step = {step: values for step, values in found[1:] if values is not None and "train/loss" in values}
    assert 30 <= len(by_step) <= 40 and {100, 200, 300, 301} <= set(by_step), "of many iterations some, the last ones among them"
    assert set(by_step[300]) == {"train/loss", "train/learning_rate", "train/gradient_norm", "train/tokens_per_second", "train/seconds", "train/data_wait"}
    assert by_step[300]["train/tokens_per_second"] == 200.0 and by_step[301]["loss/logits"] == 0.5
    rest = [values for _, values in found if values is not None and "train/loss" not in values]
    assert {"validation/bleu": 13.5} in rest
    machine = next(values for values in rest if "process/cpu" in values)
    assert machine["process/cpu"] == 1.5 and machine["gpu0/use"] == pytest.approx(0.9) and machine["process/memory"] == 1 << 30


def test_what_is_no_number_or_too_large(tmp_path: Path) -> None:
    writer = ScalarWriter(tmp_path)
    writer.add(3_000_000_000, {"a": math.nan, "b": 1e300, "c": -1e300, "d": 0.0}, 1.0)
    writer.close()
    [(step, values)] = scalars(tmp_path)
    assert step == 3_000_000_000 and values is not None
    assert math.isnan(values["a"]) and values["b"] == math.inf and values["c"] == -math.inf and values["d"] == 0


def test_what_was_undone_begins_anew(tmp_path: Path) -> None:
    listened(tmp_path, [iterations(1, 5.0, 4.0, 9.0), Rollback(3, 2, "x", 1), iterations(3, 3.0)])
    listened(tmp_path, [Resumed(1), iterations(2, 2.5)])
    found = [(step, None if values is None else values["train/loss"]) for step, values in scalars(tmp_path / "tensorboard")]
    assert found == [(1, 5.0), (2, 4.0), (3, 9.0), (3, None), (3, 3.0), (2, None), (2, 2.5)]


def test_tensorboard_itself_reads_them(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    listened(tmp_path, [*RUN, Rollback(300, 200, "x", 1), iterations(201, 1.5)])
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert {"train/loss", "validation/bleu", "process/cpu"} <= set(read.Tags()["scalars"])
    assert [event.step for event in read.Scalars("validation/bleu")] == [200]
    assert [(event.step, event.value) for event in read.Scalars("train/loss")][-1] == (201, 1.5)


# -- plots --------------------------------------------------------------------------------------------------------------------------
def test_plots_of_a_run(tmp_path: Path) -> None:
    listened(tmp_path, RUN, tensorboard=False)
    assert [path.name for path in draw(tmp_path)] == ["curves.png", "curves.svg"]
    png, svg = ((tmp_path / "plots" / name).read_bytes() for name in ("curves.png", "curves.svg"))
    assert png.startswith(b"\x89PNG\r\n") and png.endswith(b"IEND\xaeB`\x82")
    assert ET.fromstring(svg).tag.endswith("svg")
    for title in (b"loss", b"scores, validation", b"gradient norm", b"target tokens/s", b"ms an iteration", b"memory, MiB", b"GPU: share busy"):
        assert title in svg  # as a comment beside the glyphs
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["curves.png", "curves.svg"]


def test_plots_of_whatever_there_is(tmp_path: Path) -> None:
    listened(tmp_path, [], tensorboard=False)
    draw(tmp_path, ["svg"])
    listened(tmp_path, [iterations(1, math.nan), Rollback(1, 0, "the loss is nan", 1)], tensorboard=False)
    draw(tmp_path, ["svg"])
    listened(tmp_path, [iterations(1, *[2.0] * 50, math.inf, *[math.nan] * 50, *[1e-9] * 5000)], tensorboard=False)
    draw(tmp_path, ["svg"])


def test_spikes_are_not_thinned_away() -> None:
    values = [1.0] * 100_000
    values[54_321], values[77_777] = 9.0, math.nan
    steps, kept = plots._thinned(range(100_000), values)
    assert len(steps) <= 2000 and 9.0 in kept and steps == sorted(steps) and all(map(math.isfinite, kept))
    assert 0.99 < plots._smoothed(values)[40_000] < 1.01 and math.isfinite(plots._smoothed(values)[77_777])


class Drawer:
    """Stands for the process that draws."""

    def __init__(self, folder: Path, formats: list[str]) -> None:
        self.started: list[bool] = []
        self.busy = False

    def start(self, *, idle: bool = True) -> None:
        self.started.append(idle)

    def wait(self, seconds: float) -> bool:
        return not self.busy


def test_plots_are_drawn_when_they_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "PlotProcess", Drawer)
    one = TelemetryDashboard(tmp_path, tensorboard=False, plots=["png"], plots_every=3600.0)
    drawer: Any = one._plots
    one.receive(Record.now(RUN[0]))
    assert drawer.started == []
    one._drawn -= 3600.0
    one.receive(Record.now(RUN[1]))
    one.receive(Record.now(RUN[2]))
    assert drawer.started == [True]
    one._drawn -= 3600.0
    drawer.busy = True
    one.receive(Record.now(RUN[3]))
    assert drawer.started == [True], "one at a time"
    drawer.busy = False
    one.close()
    assert drawer.started == [True, False], "and the end, whoever wants the processor"


def test_the_end_is_drawn_by_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "_LAST_SECONDS", 60.0)
    one = TelemetryDashboard(tmp_path, tensorboard=False, plots=["png"])
    listened(tmp_path, RUN, tensorboard=False)
    one.close()
    assert (tmp_path / "plots" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_whoever_draws_lets_others_go_first() -> None:
    code = "import os; from cvmk.telemetry.__main__ import _yield_processor as f; f(); print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["19", str(os.SCHED_IDLE)]


def test_plots_that_fail_end_the_subscription_alone(tmp_path: Path) -> None:
    one = TelemetryDashboard(tmp_path / "run", tensorboard=False, plots=["png"])
    with pytest.raises(DataError, match=r"the plots were not drawn: cannot read .*events\.jsonl"):
        one.close()


def test_what_is_missing_or_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'gif': its format is one of png, svg"):
        draw(tmp_path, ["gif"])
    failed = subprocess.run([sys.executable, "-m", "cvmk.telemetry", tmp_path / "nothing"], capture_output=True, text=True)
    assert failed.returncode == 5 and "events.jsonl" in failed.stderr and "Traceback" not in failed.stderr
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError):
        TelemetryDashboard(tmp_path / "file")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cvmk\[plots\]'"):
        TelemetryDashboard(tmp_path, plots=["png"])
