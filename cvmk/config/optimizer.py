"""`[optimizer]` and `[schedule]`."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cvmk.config.choices import Choices
from cvmk.config.section import Section
from cvmk.errors import ConfigError

Share = Annotated[float, Field(ge=0, lt=1)]
Shares = Annotated[tuple[Share, Share], Field(strict=False)]  # behind a validator of the whole table a list of TOML is no tuple
Base = Literal["adamw", "lion", "adafactor", "muon", "schedule_free_adamw"]
SCHEDULE_FREE = "schedule_free_adamw"
_OF_LIBRARY = ("lion", "adafactor", SCHEDULE_FREE)
_ADAMW = {"learning_rate": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.98), "eps": 1e-9}

OPTIMIZERS = Choices(
    key="name",
    kind="optimiser",
    default="adamw",
    options={
        "adamw": _ADAMW,
        "lion": {"learning_rate": 2e-4, "weight_decay": 0.05, "betas": (0.9, 0.99)},
        "adafactor": {
            "learning_rate": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.999), "clip_threshold": 1.0, "scale_parameter": False, "momentum_dtype": "bfloat16",
        },  # fmt: skip
        "muon": {**_ADAMW, "momentum": 0.95, "nesterov": True, "newton_schulz": 5, "adjust": "match_rms_adamw", "adamw_learning_rate": None},
        "schedule_free_adamw": {"learning_rate": 2.5e-3, "weight_decay": 0.01, "betas": (0.9, 0.98), "eps": 1e-8},
        "sam": {"base": "adamw", "rho": 0.05},
        "asam": {"base": "adamw", "rho": 0.5, "eta": 0.01},
    },
    inherits="base",
)
"""Every optimiser, with its keys and their defaults; sam and asam have those of their base, too."""

_DECLINES = {"warmup": 1000, "final_factor": 0.05}
SCHEDULES = Choices(
    key="kind",
    kind="schedule",
    default="inverse_sqrt",
    options={
        "cosine": _DECLINES,
        "inverse_sqrt": {"warmup": 1000},
        "constant": {"warmup": 1000},
        "linear": _DECLINES,
        "one_cycle": {"warmup": 1000, "initial_factor": 0.04, "final_factor": 1e-4},
        "warmup_stable_decay": {**_DECLINES, "decay": 0.2, "decay_shape": "sqrt"},
    },
    shared=frozenset({"final_factor"}),  # inverse_sqrt and constant took it before there were others, and go on doing so
)
"""Every schedule, with its keys and their defaults."""


def _by(choices: Choices, key: str, meaning: str) -> str:
    return f"{meaning} ({choices.defaults(key)})."


class OptimizerConfig(Section):
    name: Literal["adamw", "lion", "adafactor", "muon", "schedule_free_adamw", "sam", "asam"] = Field("adamw", description="Optimiser.")
    base: Base | None = Field(None, description="sam, asam: the optimiser that takes the step, whose keys go here, too (adamw).")
    learning_rate: float = Field(1e-3, gt=0, description=_by(OPTIMIZERS, "learning_rate", "Peak learning rate"))
    betas: Shares | None = Field(
        (0.9, 0.98),
        description=_by(OPTIMIZERS, "betas", "Decay rates: of the momentum and of the squares; adafactor: the second is the limit of one that grows"),
    )
    eps: float | None = Field(1e-9, gt=0, description=_by(OPTIMIZERS, "eps", "Epsilon of Adam"))
    weight_decay: float = Field(
        0.01, ge=0,
        description=_by(OPTIMIZERS, "weight_decay", "Decoupled weight decay of the matrices; norms, biases, embeddings and decays of states have none"),
    )
    clip_threshold: float | None = Field(None, gt=0, description="adafactor: largest root mean square of a matrix's step before the learning rate (1).")
    scale_parameter: bool | None = Field(None, description="adafactor: the learning rate is a share of the matrix's root mean square (false).")
    momentum_dtype: Literal["bfloat16", "float32"] | None = Field(None, description="adafactor: in what the momentum is kept (bfloat16).")
    momentum: Share | None = Field(None, description="muon: decay rate of the matrices' momentum (0.95).")
    nesterov: bool | None = Field(None, description="muon: whether that is Nesterov's (true).")
    newton_schulz: int | None = Field(None, ge=1, lt=100, description="muon: iterations by which a step is made orthogonal (5).")
    adjust: Literal["match_rms_adamw", "original"] | None = Field(
        None, description="muon: what a matrix's step is multiplied by: 0.2 sqrt(max(rows, columns)), as large as AdamW's, or sqrt(max(1, rows / columns))."
    )
    adamw_learning_rate: float | None = Field(None, gt=0, description="muon: peak learning rate of what is no matrix; default: learning_rate.")
    rho: float | None = Field(None, gt=0, description="sam, asam: how far from the weights the gradient is taken (0.05, 0.5).")
    eta: float | None = Field(None, ge=0, description="asam: what is added to a weight's size (0.01).")

    @model_validator(mode="before")
    @classmethod
    def _keys_of_the_name(cls, values: Any) -> Any:
        return OPTIMIZERS.complete(values)

    @model_validator(mode="after")
    def _averages(self) -> OptimizerConfig:
        if self.stepper == SCHEDULE_FREE and self.betas is not None and not self.betas[0]:
            raise ValueError(f"betas = [0, ...]: {SCHEDULE_FREE} divides by the first one, so it must be above 0, such as 0.9")
        return self

    @property
    def stepper(self) -> str:
        """The optimiser that takes the step."""
        return self.base or self.name


def check_optimizer(config: OptimizerConfig, table: str = "optimizer") -> None:
    """Raise ConfigError where the optimiser, named in this table, is of a package that is not installed."""
    if config.stepper in _OF_LIBRARY and importlib.util.find_spec("pytorch_optimizer") is None:
        key = "name" if config.base is None else "base"
        raise ConfigError(f'{table}.{key} = "{config.stepper}" needs the package pytorch-optimizer: pip install \'cvmk[optimizers]\'')


class ScheduleConfig(Section):
    kind: Literal["cosine", "inverse_sqrt", "constant", "linear", "one_cycle", "warmup_stable_decay"] = Field(
        "inverse_sqrt", description="Course of the learning rate; after the warm-up, warmup_stable_decay is constant, then goes down."
    )
    warmup: int = Field(1000, ge=0, description="Iterations of linear warm-up; one_cycle: of the way up, half a cosine.")
    final_factor: float = Field(0.05, ge=0, le=1, description=_by(SCHEDULES, "final_factor", "The last learning rate as a share of the peak"))
    initial_factor: float | None = Field(None, ge=0, le=1, description="one_cycle: the first learning rate as a share of the peak (0.04).")
    decay: float | None = Field(None, gt=0, le=1, description="warmup_stable_decay: share of the iterations, at the end, in which the rate goes down (0.2).")
    decay_shape: Literal["sqrt", "linear"] | None = Field(None, description="warmup_stable_decay: down as 1 - sqrt of the way, or straight (sqrt).")

    @model_validator(mode="before")
    @classmethod
    def _keys_of_the_kind(cls, values: Any) -> Any:
        return SCHEDULES.complete(values)
