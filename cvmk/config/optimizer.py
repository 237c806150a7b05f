"""`[optimizer]` and `[schedule]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cvmk.config.section import Section

Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    name: Literal["adamw"] = Field("adamw", description="Optimiser.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    betas: tuple[Share, Share] = Field((0.9, 0.98), description="Decay rates of Adam's moments.")
    eps: float = Field(1e-9, gt=0, description="Epsilon of Adam.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay of the matrices; norms, biases and embeddings have none.")


class ScheduleConfig(Section):
    kind: Literal["cosine", "inverse_sqrt", "constant"] = Field("inverse_sqrt", description="Course of the learning rate after the warm-up.")
    warmup: int = Field(1000, ge=0, description="Iterations of linear warm-up.")
    final_factor: float = Field(0.05, ge=0, le=1, description="Cosine: the last learning rate as a share of the peak.")
