"""What telemetry costs a training: `python benchmarks/telemetry_cost.py MULTI30K [--seconds 120]`.

The student of examples/multi30k/student.toml, without its teacher, whose forward pass would only make an iteration longer. One training, in which blocks of
iterations with everything that `[telemetry]` offers (every iteration written down, anomalies, gauges, TensorBoard) alternate with blocks with nothing of it but
the log line every 50 iterations. Ratios of neighbouring blocks, by the clock and by the processor time of the process with all its threads, which other
load on the machine lengthens less; the median over all pairs and its interval (bootstrap, 95%). "alone" is what the recorder and its subscribers take
of an iteration without a model. Plots are drawn by a process of their own, which gets the processor when nobody else wants it: what the
iterations beside a drawing take longer than those around it is set against the 60 seconds from one drawing to the next.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import statistics
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cvmk.config.schema import TrainConfig
from cvmk.hardware import keep_freed_memory
from cvmk.telemetry import AnomalyWatch, EventStream, Iteration, Recorder, Reporter, ResourceWatch, RunLog, TelemetryDashboard
from cvmk.telemetry.plots import PlotProcess
from cvmk.training import pipeline
from cvmk.training.signals import StopSignal
from cvmk.training.trainer import Trainer
from cvmk.training.world import World

STUDENT = Path(__file__).parent.parent / "examples" / "multi30k" / "student.toml"
ALONE = 20_000
PLOTS_EVERY = 60.0


class Seconds(NamedTuple):
    clock: float
    processor: float


def measured(work: Callable[[], object]) -> Seconds:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - clock, time.process_time() - processor)


def configuration(data: str, folder: Path) -> TrainConfig:
    values = tomllib.loads(STUDENT.read_text())
    del values["teacher"], values["distillation"]
    values["data"]["folder"] = data
    values["run"] = {"folder": str(folder)}
    values["tokenizer"] = {"vocabulary": 8000}
    values["training"]["iterations"] = 1_000_000
    return TrainConfig.model_validate(values)


def trainer_of(config: TrainConfig, kept: Path, folder: Path) -> Trainer:
    corpora = pipeline.load_corpora(config.data)
    job = pipeline.Job(config, kept, torch.device("cpu"), corpora, Reporter(), World(), lambda *model: (), StopSignal())
    tokenizer = pipeline.prepare_tokenizer(config.tokenizer, corpora.train, kept / "tokenizer", 1, Reporter())
    events = EventStream(RunLog(folder / "off"))
    return pipeline._trainer(job, config, folder, tokenizer, None, events, Recorder(events, iterations=False))[0]


def block(trainer: Trainer, iterations: int, events: EventStream, recorder: Recorder) -> Seconds:
    """Some iterations, as `Trainer.train` does them."""
    trainer.events, trainer.recorder = events, recorder

    def iterate() -> None:
        for _ in range(iterations):
            trainer._record(trainer._step(), False)

    return measured(iterate)


@contextlib.contextmanager
def everything(folder: Path) -> Iterator[tuple[EventStream, Recorder]]:
    """All of [telemetry] but the plots."""
    events = EventStream(RunLog(folder), [TelemetryDashboard(folder)])
    recorder = Recorder(events, watch=AnomalyWatch())
    with ResourceWatch(events, 10.0, lambda: recorder.step):
        yield events, recorder
    recorder.finish()
    events.close()


def alone(folder: Path) -> float:
    """Seconds of processor time that an iteration costs."""
    draw = random.Random(1)
    rows = [
        Iteration(step, step // 500, step % 500 == 0, step % 500 == 499, 3 + draw.gauss(0, 0.2), 1e-3, draw.lognormvariate(0, 0.3), 900, 0.1, 1e-4)
        for step in range(ALONE)
    ]

    def record() -> None:
        with everything(folder) as (_, recorder):
            for row in rows:
                recorder.iteration(row)

    return measured(record).processor / ALONE


def alternate(seconds: float, off: Callable[[], Seconds], on: Callable[[], Seconds]) -> list[Seconds]:
    """Ratios of neighbours, either of which comes first as often."""
    ratios: list[Seconds] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(ratios) % 2:
            without, having = off(), on()
        else:
            having, without = on(), off()
        ratios.append(Seconds(having.clock / without.clock, having.processor / without.processor))
    return ratios


def interval(values: Sequence[float]) -> str:
    """The median and its interval."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(1000))
    return f"{statistics.median(values):.4f} [{medians[25]:.4f}, {medians[974]:.4f}]"


def show(name: str, ratios: Sequence[Seconds]) -> None:
    clock, processor = ([getattr(ratio, kind) for ratio in ratios] for kind in Seconds._fields)
    print(f"{name:<12} clock {interval(clock)}  processor {interval(processor)}  ({len(ratios)} pairs)", flush=True)


def drawings(seconds: float, run: Path, off: Callable[[], Seconds]) -> tuple[float, float, list[float]]:
    """How long a drawing lasts beside the training, its processor time, and by how many seconds each delays the training."""
    plots, lasted, delays = PlotProcess(run, ["png", "svg"]), [], []
    end, before = time.monotonic() + seconds, resource.getrusage(resource.RUSAGE_CHILDREN)
    while time.monotonic() < end or not delays:
        usual = [off().clock for _ in range(4)]
        start, beside = time.perf_counter(), []
        plots.start()
        while plots.busy:
            beside.append(off().clock)
        lasted.append(time.perf_counter() - start)
        usual += [off().clock for _ in range(4)]
        delays.append(sum(beside) - len(beside) * statistics.median(usual))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return statistics.median(lasted), processor / len(delays), delays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of Multi30k")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each comparison (default 120)")
    parser.add_argument("--folder", type=Path, help="keep the tokenizer and the tokenised text here for another time")
    parser.add_argument("--block", type=int, default=8, help="iterations of a block (default 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the training (default: PyTorch's choice)")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trainer = trainer_of(configuration(arguments.data, arguments.folder or folder), arguments.folder or folder, folder)
        quiet = trainer.events, trainer.recorder
        usual = [block(trainer, arguments.block, *quiet) for _ in range(6)][-3:]
        iteration = statistics.median(one.processor for one in usual) / arguments.block
        print(f"an iteration: {iteration * 1e3:.1f} ms of processor time, {arguments.threads} threads; blocks of {arguments.block}", flush=True)
        with everything(folder / "on") as loud:
            show("on / off", alternate(arguments.seconds, lambda: block(trainer, arguments.block, *quiet), lambda: block(trainer, arguments.block, *loud)))
        show("off / off", alternate(arguments.seconds, lambda: block(trainer, arguments.block, *quiet), lambda: block(trainer, arguments.block, *quiet)))
        cost = alone(folder / "alone")
        print(f"alone        {cost * 1e6:.0f} us of processor time an iteration: {cost / iteration:.2%}", flush=True)
        lasted, processor, delays = drawings(arguments.seconds, folder / "alone", lambda: block(trainer, arguments.block, *quiet))
        delay = statistics.median(delays)
        print(
            f"a drawing    lasts {lasted:.1f} s, takes {processor:.1f} s of processor time and delays the training by {delay:.2f} s "
            f"({min(delays):.2f} to {max(delays):.2f}, {len(delays)} drawings): {delay / PLOTS_EVERY:.2%} at one a minute"
        )
        trainer.events.close()


if __name__ == "__main__":
    main()
