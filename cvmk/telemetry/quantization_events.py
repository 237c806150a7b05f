"""The events of a quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cvmk.telemetry.event import Event


@dataclass(frozen=True)
class QuantizationStarted(Event):
    """The matrices of a model are rounded; the comparison with it begins."""

    KIND = "quantization_start"
    model: str
    scheme: str
    method: str
    matrices: int
    """That are quantised."""
    sentences: int
    """Of the evaluation set."""

    def text(self) -> str:
        return f"quantising {self.model}: {self.scheme} by {self.method}, {self.matrices} matrices"


@dataclass(frozen=True)
class Recovering(Event):
    """A validation during the recovery."""

    KIND = "recovery"
    step: int
    divergence: float
    """From the model before, nats a target piece, on held-out text."""

    def text(self) -> str:
        return f"recovery, step {self.step}: divergence {self.divergence:.4f} nats a piece"


@dataclass(frozen=True)
class QuantizationTrial(Event):
    """The quantised model was compared with the one before it, with so many matrices in a higher precision."""

    KIND = "quantization_trial"
    raised: list[str]
    metric: str
    value: float
    drop: float
    """Points lost; negative where it is better."""
    passed: bool

    def text(self) -> str:
        verdict = "passes" if self.passed else "does not pass"
        return f"{len(self.raised)} matrices raised: {self.metric} {self.value:.2f} ({-self.drop:+.2f}), {verdict} the gate"


@dataclass(frozen=True)
class QuantizationEnded(Event):
    """`report` is what stands in quantization.json, or would."""

    KIND = "quantization_end"
    out: str | None
    """The model's folder; None where nothing was written."""
    passed: bool
    report: dict[str, Any]

    def text(self) -> str:
        return "the gate does not pass: nothing was written" if self.out is None else f"written to {self.out}"
