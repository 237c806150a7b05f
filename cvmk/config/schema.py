"""The whole of a training configuration, and every name of the schema.

`cvmk train --explain-config` prints the descriptions that stand at the keys; there is no other list of keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cvmk.config.data import CorpusConfig, DataConfig, TokenizerConfig
from cvmk.config.distillation import DistillationConfig, Divergence, LayerMap, SequenceLevelConfig
from cvmk.config.model import Mixer, ModelConfig
from cvmk.config.optimizer import SCHEDULE_FREE, OptimizerConfig, ScheduleConfig, Share, check_optimizer
from cvmk.config.section import BY_CONTENT, MAX_THREADS, MAY_CHANGE, TABLES_MUST_MATCH, Document, Section
from cvmk.config.telemetry import TelemetryConfig, check_plots
from cvmk.config.training import GuardConfig, Metric, TrainingConfig, ValidationConfig

__all__ = [
    "CorpusConfig",
    "DataConfig",
    "DistillationConfig",
    "Divergence",
    "GuardConfig",
    "LayerMap",
    "Metric",
    "Mixer",
    "ModelConfig",
    "OptimizerConfig",
    "Recipe",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SequenceLevelConfig",
    "Share",
    "TeacherConfig",
    "TelemetryConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainingConfig",
    "ValidationConfig",
]


class RunConfig(Section):
    folder: Annotated[str, MAY_CHANGE] = Field(
        "runs/run",
        description="Folder of this run: configuration, logs, checkpoints, reports. Relative to the working directory.",
    )
    seed: int = Field(1, ge=0, lt=2**32, description="Seed of everything random: initial weights, data order, dropout.")
    device: Annotated[Literal["auto", "cpu", "cuda"], MAY_CHANGE] = Field("auto", description="Where to train; auto takes a GPU where there is one.")
    report: Annotated[bool, MAY_CHANGE] = Field(True, description="Write report.html, report.md and report.json at the end, as `cvmk report` does.")
    threads: Annotated[int, MAY_CHANGE] = Field(0, ge=0, le=MAX_THREADS, description="CPU threads; 0 leaves the choice to PyTorch.")


class Recipe(Section):
    """What it takes to train one model."""

    model: ModelConfig = Field(ModelConfig(), description="The model to train.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimiser.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), validate_default=True, description="The learning rate.")
    training: TrainingConfig = Field(TrainingConfig(), description="The loop.")
    validation: ValidationConfig = Field(ValidationConfig(), description="Scores during training.")
    guard: Annotated[GuardConfig, MAY_CHANGE] = Field(GuardConfig(), description="Rollback on divergence and regression.")

    @field_validator("schedule", mode="before")
    @classmethod
    def _default_schedule(cls, value: Any, info: ValidationInfo) -> Any:
        """Where nothing else is said, what needs no schedule has none."""
        optimizer = info.data.get("optimizer")
        if optimizer is None or optimizer.stepper != SCHEDULE_FREE:
            return value
        if isinstance(value, ScheduleConfig):
            return value if "kind" in value.model_fields_set else ScheduleConfig(kind="constant")
        return {"kind": "constant", **value} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _schedule_fits(self) -> Recipe:
        if self.optimizer.stepper == SCHEDULE_FREE and self.schedule.kind != "constant":
            raise ValueError(
                f'schedule.kind = "{self.schedule.kind}": {SCHEDULE_FREE} averages its weights in place of a falling learning rate, '
                'and takes "constant" with a warm-up: leave schedule.kind out'
            )
        return self


class TeacherConfig(Recipe):
    """The teacher: a finished model's folder, or a recipe that is run first on the same data and tokenizer."""

    path: Annotated[str | None, BY_CONTENT] = Field(
        None,
        description="Folder of a finished run or model; without it the teacher is trained first, by the tables below, into `teacher` in the run's folder.",
    )


class TrainConfig(Recipe, Document):
    """The whole of a training configuration."""

    COMMAND = "cvmk train"
    FIRST: ClassVar[tuple[str, ...]] = ("run", "data", "tokenizer")
    OTHERS: ClassVar[dict[str, str]] = {"search": "cvmk search"}

    run: RunConfig = Field(RunConfig(), description="Where and how to run.")
    data: DataConfig = Field(description="The parallel text.")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="Words to pieces.")
    teacher: Annotated[TeacherConfig | None, TABLES_MUST_MATCH] = Field(
        None,
        description="The model to distil; without it the model is trained on the references alone.",
    )
    distillation: DistillationConfig = Field(DistillationConfig(), description="What the student learns from the teacher.")
    telemetry: Annotated[TelemetryConfig, MAY_CHANGE] = Field(TelemetryConfig(), description="What the run writes down of itself.")

    @model_validator(mode="after")
    def _sentences_fit(self) -> TrainConfig:
        longest = self.data.max_tokens_per_sentence + 1  # BOS or EOS
        models = [("model", self.model)] + ([("teacher.model", self.teacher.model)] if self.teacher is not None and self.teacher.path is None else [])
        for name, model in models:
            if longest > model.max_length:
                raise ValueError(
                    f"data.max_tokens_per_sentence ({longest - 1}) must be below {name}.max_length ({model.max_length})"
                )
        return self


def check_packages(config: TrainConfig) -> None:
    """Raise ConfigError where a run would need a package that is not installed, before it reads anything. That of a metric is the validator's to know."""
    check_optimizer(config.optimizer, "optimizer")
    if config.teacher is not None and config.teacher.path is None:
        check_optimizer(config.teacher.optimizer, "teacher.optimizer")
    check_plots(config.telemetry)
