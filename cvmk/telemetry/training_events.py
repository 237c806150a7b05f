"""The events of a model's training, and of scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cvmk.telemetry.event import Event


@dataclass(frozen=True)
class Start(Event):
    """A model's training begins or goes on."""

    KIND = "start"
    title: str
    parameters: int
    pairs: int
    step: int
    """Iterations that were done before."""
    iterations: int | None = None
    device: str | None = None

    def text(self) -> str:
        device = f" on {self.device}" if self.device else ""
        resumed = f", resumed at iteration {self.step}" if self.step else ""
        iterations = f", {self.iterations} iterations" if self.iterations is not None else ""
        return f"{self.parameters / 1e6:.2f} M parameters{device}, {self.pairs} pairs{iterations}{resumed}"


@dataclass(frozen=True)
class Resumed(Event):
    """The state of a checkpoint was taken; `renewed` where the run had used up its rollbacks and is given as many again."""

    KIND = "resumed"
    step: int
    renewed: bool = False
    learning_rate_scale: float = 1.0

    def text(self) -> str | None:
        if not self.renewed:
            return None
        return f"the rollbacks of this run were used up: it goes on from iteration {self.step} with as many again, learning rate x {self.learning_rate_scale:g}"


@dataclass(frozen=True)
class Taught(Event):
    """Which weights teach: those in the folder `weights`, which change as the teacher's run goes on if it is not finished."""

    KIND = "teacher"
    path: str
    weights: str
    fingerprint: str
    finished: bool

    def text(self) -> str | None:
        if self.finished:
            return None
        return f"the teacher's run {self.path} is not finished: its best checkpoint ({self.weights.rpartition('/')[2]}) teaches"


@dataclass(frozen=True)
class Step(Event):
    """One iteration that is logged. "loss" is what was minimised; its parts are unweighted, 0 where not used."""

    KIND = "step"
    step: int
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens_per_second: float
    loss: float
    cross_entropy: float = 0.0
    logits: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0

    def summary(self) -> str:
        """The losses that are used, and the speed."""
        parts = {name: getattr(self, name) for name in ("loss", "cross_entropy", "logits", "hidden", "attention")}
        return "  ".join(f"{name} {value:.4f}" for name, value in parts.items() if value) + f"  {self.tokens_per_second:.0f} tok/s"

    def text(self) -> str:
        return f"step {self.step}  {self.summary()}  lr {self.learning_rate:.3g}  norm {self.gradient_norm:.3g}"


@dataclass(frozen=True)
class Iterations(Event):
    """Consecutive iterations, each number of each of them: column by column, to be short. `Step` is what is told of one to a person."""

    KIND = "iterations"
    step: int
    """The first of them."""
    loss: list[float]
    """What was minimised."""
    learning_rate: list[float]
    gradient_norm: list[float]
    """Before clipping."""
    tokens: list[int]
    """Target tokens."""
    seconds: list[float]
    """From before the batch was asked for until the weights were changed."""
    data_wait: list[float]
    """Seconds of these until the batch was there."""


@dataclass(frozen=True)
class Resources(Event):
    """What the process and the machine use. None: it cannot be told here."""

    KIND = "resources"
    step: int | None
    """The iteration at which it was looked at; None outside of a training."""
    process_cpu: float | None
    """Cores that the process kept busy since the last time: 1.0 is one."""
    machine_cpu: float | None
    """The share of all cores that were busy, of whatever process: 0 to 1."""
    memory: int | None
    """Resident bytes of the process."""
    machine_memory: int | None
    """Bytes in use of the machine, without what is only cached."""
    machine_memory_total: int | None
    gpus: list[dict[str, Any]] = field(default_factory=list)
    """Each: index, name, use (0 to 1), memory and memory_total (bytes), watts and celsius (or null)."""


@dataclass(frozen=True)
class Anomaly(Event):
    """An iteration that is not like those before it. Of each epoch and quantity the first hundred are written; `Epoch` counts all."""

    KIND = "anomaly"
    step: int
    quantity: str
    """"loss", "gradient_norm", "throughput" (tokens a second fell by half) or "data_wait" (seconds until the batch was there)."""
    value: float
    """Null where it is not finite."""
    usual: float
    """The running median."""
    deviations: float | None = None
    """How many robust standard deviations lie between them; None where the rule does not count them."""

    def text(self) -> str:
        if self.quantity == "throughput":
            return f"anomaly at {self.step}: {self.value:.0f} tok/s, usually {self.usual:.0f}"
        if self.quantity == "data_wait":
            return f"anomaly at {self.step}: waited {self.value:.3f} s for the batch, an iteration usually takes {self.usual:.3f} s"
        away = "" if self.deviations is None else f", {self.deviations:.1f} deviations away"
        return f"anomaly at {self.step}: {self.quantity.replace('_', ' ')} {self.value:.4g}, usually {self.usual:.4g}{away}"


@dataclass(frozen=True)
class Epoch(Event):
    """The corpus was read once more, or training ended within it. A run that was resumed counts what it has seen since."""

    KIND = "epoch"
    epoch: int
    """From 1."""
    step: int
    """The last iteration of it."""
    iterations: int
    tokens: int
    seconds: float
    data_wait: float
    """Seconds of these that were spent waiting for batches."""
    loss: float
    """The mean of the iterations'."""
    anomalies: dict[str, int] = field(default_factory=dict)
    """How many, by quantity."""
    whole: bool = True
    """False where it was not seen from its beginning to its end."""

    def text(self) -> str:
        found = ", ".join(f"{count} of {quantity.replace('_', ' ')}" for quantity, count in self.anomalies.items())
        part = "" if self.whole else " (in part)"
        return f"epoch {self.epoch}{part}: loss {self.loss:.4f}, {self.iterations} iterations, {self.seconds:.1f} s; anomalies: {found or 'none'}"


@dataclass(frozen=True)
class Profiled(Event):
    """torch.profiler has watched these iterations; the files are in the run's folder."""

    KIND = "profile"
    step: int
    """The first of them."""
    iterations: int
    files: list[str]

    def text(self) -> str:
        return f"profile of iterations {self.step} to {self.step + self.iterations - 1}: {', '.join(self.files)}"


@dataclass(frozen=True)
class Scored(Event):
    """Scores as `cvmk.validation.Score.to_dict` gives them, against the references and (`agreement`) the teacher."""

    step: int
    metric: str
    value: float
    low: float
    high: float
    confidence: float
    scores: list[dict[str, Any]]
    agreement: list[dict[str, Any]]
    sentences: int
    seconds: float
    tokens: int | None
    sentences_per_second: float | None = None
    tokens_per_second: float | None = None
    samples: list[dict[str, str]] = field(default_factory=list)

    def summary(self) -> str:
        return "  ".join(f"{score['metric']} {score['value']:.2f}" for score in self.scores)


@dataclass(frozen=True)
class Validation(Scored):
    """One validation during training."""

    KIND = "validation"
    best: bool = False
    """Whether no validation before was better."""

    def text(self) -> str:
        return f"validation at {self.step}: {self.summary()}{'  (best so far)' if self.best else ''}"


@dataclass(frozen=True)
class Evaluation(Scored):
    """`cvmk validate` has scored a model; `step` is 0."""

    KIND = "evaluation"
    model: str = ""

    def text(self) -> str:
        return f"{self.model}: {self.summary()} on {self.sentences} sentences"


@dataclass(frozen=True)
class Average(Scored):
    """The validation of the averaged weights of these iterations."""

    KIND = "average"
    iterations: list[int] = field(default_factory=list)

    def text(self) -> str:
        return f"average of the weights at iterations {', '.join(map(str, self.iterations))}: {self.summary()}"


@dataclass(frozen=True)
class Rollback(Event):
    """Training went wrong at `step` and went back to `to`. `final` where it ended there, because no rollback was left."""

    KIND = "rollback"
    step: int
    to: int
    problem: str
    rollbacks: int
    learning_rate_scale: float | None = None
    final: bool = False

    def text(self) -> str:
        rate = "" if self.learning_rate_scale is None else f"learning rate x {self.learning_rate_scale:g}, "
        after = " for good: no rollback is left" if self.final else f", {rate}new data order (rollback {self.rollbacks})"
        return f"iteration {self.step}: {self.problem}; back to iteration {self.to}{after}"


@dataclass(frozen=True)
class EarlyStop(Event):
    """Training ends before its last iteration."""

    KIND = "early_stop"
    step: int
    reason: str = ""

    def text(self) -> str:
        return f"{self.reason}, stopping early at iteration {self.step}"


@dataclass(frozen=True)
class Interruption(Event):
    """Ctrl-C or SIGTERM was answered with a checkpoint."""

    KIND = "interrupted"
    step: int

    def text(self) -> str:
        return f"interrupted at iteration {self.step}"


@dataclass(frozen=True)
class Note(Event):
    """A plain sentence that a person should read."""

    KIND = "note"
    message: str

    def text(self) -> str:
        return self.message


@dataclass(frozen=True)
class End(Event):
    """A model is finished; `report` is its training_report.json."""

    KIND = "end"
    report: dict[str, Any]


@dataclass(frozen=True)
class Tick(Event):
    """An iteration was done; for whoever looks on."""

    KIND = "tick"
    RECORDED = False
    step: int
    loss: float
    tokens_per_second: float

    def text(self) -> str:
        return f"loss {self.loss:.4f}  {self.tokens_per_second:.0f} tok/s"


@dataclass(frozen=True)
class Notice(Note):
    """A sentence for whoever looks on now."""

    KIND = "notice"
    RECORDED = False
