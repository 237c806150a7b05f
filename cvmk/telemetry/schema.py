"""What a run says of itself: every kind of event is a class with a version, and one JSON object on a line of `events.jsonl`.

    {"time": seconds since the epoch, "event": KIND, "version": VERSION, ...the fields}

A field that is added with a default leaves the version as it is: older readers pass it over. A field that is removed, or means
something else, raises it. Lines of before there were versions are of version 1. Numbers that are not finite are null in the file.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self


@dataclass(frozen=True)
class Event:
    """Something that happened in a run. The fields are JSON values."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1
    RECORDED: ClassVar[bool] = True
    """Whether it is written to the run's logs, or only shown to whoever looks on."""

    def values(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}

    def text(self) -> str | None:
        """A line for a person; None where there is nothing to tell."""
        return None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The event with these values; what is no field of it is passed over. Raises ValueError where a field without a default is missing."""
        given: dict[str, Any] = {}
        for one in dataclasses.fields(cls):
            if one.name in values:
                value = values[one.name]
                given[one.name] = math.nan if value is None and one.type == "float" else value
            elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                raise ValueError(f"event {cls.KIND!r} lacks {one.name!r}")
        return cls(**given)


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


EVENTS: tuple[type[Event], ...] = (Start, Resumed, Taught, Step, Validation, Average, Rollback, EarlyStop, Interruption, Note, End)
"""Every kind that is written to a file."""

KINDS = {event.KIND: event for event in EVENTS}


class Record(NamedTuple):
    """An event and when it happened, in seconds since the epoch."""

    time: float
    event: Event

    def to_json(self) -> dict[str, Any]:
        return {"time": self.time, "event": self.event.KIND, "version": self.event.VERSION, **_finite(self.event.values())}

    @classmethod
    def from_json(cls, line: Any) -> Record:
        """Raises Unknown for an event that this cvmk does not know, ValueError for one that is broken."""
        if not isinstance(line, Mapping) or not isinstance(line.get("event"), str):
            raise ValueError("it is no event")
        kind, version = line["event"], line.get("version", 1)
        known = KINDS.get(kind)
        if known is None or not isinstance(version, int) or version > known.VERSION:
            raise Unknown(kind, version)
        return cls(float(line.get("time", math.nan)), known.of(line))

    @classmethod
    def now(cls, event: Event) -> Record:
        return cls(round(time.time(), 3), event)


class Unknown(Exception):
    """An event of a kind or a version that this cvmk does not know."""

    def __init__(self, kind: str, version: Any) -> None:
        super().__init__(f"event {kind!r}, version {version}")
        self.kind, self.version = kind, version


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
