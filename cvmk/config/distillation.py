"""`[distillation]`: what a student learns from its teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cvmk.config.section import Section

Divergence = Literal["forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl"]
LayerMap = Literal["uniform", "last"] | list[tuple[int, int]]


class SequenceLevelConfig(Section):
    enabled: bool = Field(
        False,
        description="Train on the teacher's beam-search translations of the training sources (Kim & Rush 2016); they are written once and reused.",
    )
    beam_size: Annotated[int, Field(ge=1, le=16)] = Field(4, description="Beam of the teacher.")
    mix: Literal["replace", "append"] = Field("append", description="Replace the references by the teacher's translations, or train on both.")


class DistillationConfig(Section):
    alpha: float = Field(0.5, ge=0, le=1, description="Logits: alpha * T^2 * divergence + (1 - alpha) * cross-entropy with the references.")
    beta: float = Field(0.0, ge=0, description="Weight of the hidden-state loss: mean squared error after a learned projection.")
    gamma: float = Field(0.0, ge=0, description="Weight of the attention-map loss: KL(teacher || student) a row.")
    temperature: float = Field(1.0, gt=0, le=2**20, description="Temperature T of both distributions.")
    divergence: Divergence = Field("forward_kl", description="Divergence between the teacher's and the student's distributions.")
    mixture: float | None = Field(None, gt=0, lt=1, description="Mixing weight of js (default 0.5) and of the skew divergences (default 0.1).")
    layer_map: LayerMap = Field(
        "uniform",
        description='Which teacher layer a student layer imitates: "uniform", "last", or pairs [student, teacher], counted from 0.',
    )
    hidden: list[Literal["encoder", "decoder"]] = Field(["encoder", "decoder"], description="Stacks whose hidden states are compared.")
    attention: list[Literal["encoder", "decoder", "cross"]] = Field(
        ["encoder", "decoder", "cross"],
        description="Attention maps that are compared: encoder self, decoder self, cross.",
    )
    sequence_level: SequenceLevelConfig = Field(SequenceLevelConfig(), description="Sequence-level distillation.")
