"""`[telemetry]`: what a run writes down of itself, and how much of it."""

from __future__ import annotations

import importlib.util
from typing import Literal

from pydantic import Field, field_validator

from cvmk.config.section import Section
from cvmk.errors import ConfigError


class TelemetryConfig(Section):
    log_bytes: int = Field(20_000_000, ge=10_000, description="Size at which events.jsonl and log.txt are set aside, and new ones begun.")
    log_files: int = Field(20, ge=1, le=10_000, description="Files of each that are kept besides the newest.")
    iterations: bool = Field(True, description="Write down the loss, rate, gradient norm and times of every iteration, not only of those that are logged.")
    anomalies: bool = Field(True, description="Flag iterations that are not like those before, and sum them up by epoch.")
    deviations: float = Field(
        5.0, gt=0,
        description="Standard deviations (robust, of the last 256 iterations) beyond which a loss or a gradient norm is an anomaly.",
    )
    resources_every: float = Field(10.0, ge=0, description="Seconds between two looks at the use of processor, memory and GPU; 0 = none.")
    tensorboard: bool = Field(False, description="Write the scalars for TensorBoard too, to tensorboard/ in the run's folder.")
    plots: list[Literal["png", "svg"]] = Field(
        [],
        description="Draw the curves during the run, to plots/curves.* in the run's folder, in these formats; needs cvmk[plots].",
    )
    plots_every: float = Field(
        60.0, ge=1,
        description="Seconds between two drawings, at least. A process of its own draws, when nothing else wants the processor.",
    )
    profile: int = Field(
        0, ge=0, le=100,
        description="Iterations that torch.profiler watches, to profile/ in the run's folder; 0 = none, but 20 with --profile.",
    )
    profile_after: int = Field(10, ge=0, description="Iterations of a process that pass before, for the first ones are slower.")
    profile_bytes: int = Field(100_000_000, ge=1_000_000, description="Size of the trace at most; one that would be larger ends sooner.")

    @field_validator("plots")
    @classmethod
    def _each_once(cls, formats: list[str]) -> list[str]:
        return list(dict.fromkeys(formats))


def check_plots(config: TelemetryConfig) -> None:
    """Raise ConfigError where plots are wanted and matplotlib is not installed."""
    if config.plots and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("telemetry.plots needs matplotlib: pip install 'cvmk[plots]', or leave the key out")
