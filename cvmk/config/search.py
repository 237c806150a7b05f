"""`[search]`: what `cvmk search` reads beside a training configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cvmk.config.schema import TrainConfig
from cvmk.config.section import Section


class RangeConfig(Section):
    """What one key may be: an interval of numbers, or a list of choices."""

    low: int | float | None = Field(None, description="Smallest number.")
    high: int | float | None = Field(None, description="Largest number.")
    log: bool = Field(False, description="Whether numbers are drawn by their logarithm.")
    step: int | float | None = Field(None, gt=0, description="Distance between numbers; without it every number may be drawn.")
    choices: list[Any] | None = Field(None, min_length=1, description="The values, in place of low and high.")

    @model_validator(mode="after")
    def _one_kind(self) -> RangeConfig:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("choices stand alone: leave low, high, log and step out")
            if any(choice in self.choices[:place] for place, choice in enumerate(self.choices)):
                raise ValueError("a choice stands there twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("a range needs low and high, or else choices")
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"low ({self.low}) must be above 0 where log = true")
        if self.log and self.step is not None:
            raise ValueError("log and step do not go together: leave one of them out")
        return self

    def shown(self) -> dict[str, Any]:
        """As the configuration says it."""
        return self.model_dump(exclude_defaults=True)


class SearchConfig(Section):
    folder: str = Field("runs/search", description="Folder of this search: the study, the trials' runs, the best configuration, plots.")
    storage: str | None = Field(
        None,
        description="Where the study is kept, for several machines: a file that all of them see, or the URL of a database, "
        "such as postgresql://user@host/base; without it study.log in the folder.",
    )
    name: str | None = Field(None, min_length=1, description="Name of the study in a storage that has several; without it the name of the folder.")
    space: dict[str, RangeConfig] = Field(
        description="The keys that are searched, each by its dotted name in quotes or as nested tables, with low and high or choices.",
    )
    sampler: Literal["tpe", "random"] = Field("tpe", description="What proposes trials: tree-structured Parzen estimators, or chance.")
    startup_trials: int = Field(10, ge=0, description="Trials that are drawn by chance before TPE proposes.")
    pruner: Literal["median", "hyperband", "none"] = Field(
        "median",
        description="What ends trials early: median ends those that are worse than the median of the others at the same iteration; "
        "hyperband gives each iterations by successive halving.",
    )
    pruner_startup_trials: int = Field(5, ge=0, description="Median: trials that come to their end before any is pruned.")
    pruner_warmup: int = Field(0, ge=0, description="Iterations of a trial before it may be pruned (median), and the least that each is given (hyperband).")
    reduction_factor: int = Field(3, ge=2, description="Hyperband: one in so many trials goes on at each rung.")
    trials: int = Field(0, ge=0, description="Budget: trials of the whole study, on all machines; 0 = no limit.")
    iterations: int = Field(0, ge=0, description="Budget: iterations of all trials together; 0 = no limit.")
    minutes: float = Field(0, ge=0, description="Budget: time that this folder's search runs, pauses not counted; 0 = no limit.")
    seed: int = Field(1, ge=0, lt=2**32, description="Seed of the proposals; trials train with run.seed.")
    keep: Literal["best", "all"] = Field("best", description="Whose weights stay on disk; configuration, events and scores stay for all trials.")

    @field_validator("space", mode="before")
    @classmethod
    def _by_dotted_name(cls, space: Any) -> Any:
        return dict(_flat(space)) if isinstance(space, dict) else space

    @field_validator("space")
    @classmethod
    def _some(cls, space: dict[str, RangeConfig]) -> dict[str, RangeConfig]:
        if not space:
            raise ValueError('at least one key is needed, such as "optimizer.learning_rate" = { low = 1e-4, high = 1e-2, log = true }')
        return space

    @model_validator(mode="after")
    def _limited(self) -> SearchConfig:
        if not (self.trials or self.iterations or self.minutes):
            raise ValueError("a budget is needed: give trials, iterations or minutes")
        return self


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`a.b = {...}` and `"a.b" = {...}` are the same key: TOML makes tables in tables of the first."""
    for name, value in table.items():
        if isinstance(value, dict) and value and not value.keys() & RangeConfig.model_fields.keys() and all(isinstance(one, dict) for one in value.values()):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class SearchDocument(TrainConfig):
    """A training configuration, and the search over some of its keys."""

    COMMAND: ClassVar[str] = "cvmk search"
    FIRST: ClassVar[tuple[str, ...]] = ("search", *TrainConfig.FIRST)
    OTHERS: ClassVar[dict[str, str]] = {}

    search: SearchConfig | None = Field(None, description="The search over keys of the other tables.")
