"""The loss of a student: references, and a teacher's logits, hidden states and attention maps, each with its weight."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cvmk import ops
from cvmk.config.schema import DistillationConfig, ModelConfig
from cvmk.distill.layer_map import attention_pairs, hidden_pairs
from cvmk.distill.representations import Projection, attention_distance, hidden_distance, real_positions
from cvmk.errors import ConfigError
from cvmk.nn import AttentionMap, Unprojected

Output = tuple[Tensor | Unprojected, Any, Any]
"""What a model returns: logits [B, T, V] or what they are made of, hidden states or None, attention maps or None."""


class Targets(Protocol):
    """What the objective reads of a `cvmk.text.batching.Batch`."""

    tgt_out: Tensor
    src_lengths: Tensor
    tgt_lengths: Tensor
    tokens: int


@dataclass(frozen=True)
class Losses:
    """One step's loss: `total` is to be differentiated; `parts` are detached scalars, unweighted but for "loss", which is the total.

    parts: "loss", "cross_entropy" (with label smoothing), "logits" (T^2 * divergence), "hidden", "attention"; 0 where not used.
    """

    total: Tensor
    parts: dict[str, Tensor]


class DistillationObjective(nn.Module):
    """loss = alpha T^2 D(teacher, student) + (1 - alpha) CE + beta * hidden + gamma * attention.

    The first two are `ops.kd_loss`, means over the target tokens; from logits that are not made yet `ops.linear_kd_loss`, which never makes
    them. "hidden" is the mean of `hidden_distance` over the pairs of layers
    that distillation.layer_map and .hidden name; each pair of different widths has a learned projection, a parameter of this module
    (train it with the student; it is not part of the student). "attention" is the mean of `attention_distance` over the pairs and
    kinds. Without a teacher what is left is cross-entropy. A part of weight 0 is not computed.

    Raises ConfigError where the configuration does not fit the two models.
    """

    def __init__(
        self,
        config: DistillationConfig,
        *,
        label_smoothing: float,
        student: ModelConfig,
        teacher: ModelConfig | None,
        vocab_size: int,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.label_smoothing, self.vocab_size, self.pad_id = label_smoothing, vocab_size, pad_id
        self.temperature, self.divergence, self.mixture = config.temperature, config.divergence, config.mixture
        if config.mixture is not None and config.divergence in ("forward_kl", "reverse_kl"):
            raise ConfigError(f"distillation.mixture is {config.mixture}, but the divergence {config.divergence} takes none: leave it out")
        self.alpha, self.beta, self.gamma = (config.alpha, config.beta, config.gamma) if teacher is not None else (0.0, 0.0, 0.0)
        self.hidden_pairs = hidden_pairs(config, student, teacher) if teacher is not None and self.beta else []
        self.attention_pairs = attention_pairs(config, student, teacher) if teacher is not None and self.gamma else []
        uses = Counter((kind, s) for kind, s, _ in self.attention_pairs)
        self._imitations = {(kind, s): t for kind, s, t in self.attention_pairs if uses[kind, s] == 1}
        self.projections = nn.ModuleDict()
        if teacher is not None and student.d_model != teacher.d_model:
            for stack, s, t in self.hidden_pairs:
                self.projections[f"{stack}_{s}_{t}"] = Projection(student.d_model, teacher.d_model)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to run at all."""
        return self.alpha > 0 or self.needs_hidden or self.needs_attention

    @property
    def needs_hidden(self) -> bool:
        """Whether both models have to return hidden states."""
        return bool(self.hidden_pairs)

    @property
    def needs_attention(self) -> bool:
        """Whether both models have to return attention maps."""
        return bool(self.attention_pairs)

    def imitated(self, teacher_output: Output | None) -> dict[tuple[str, int], AttentionMap]:
        """The teacher's maps that a student's attention can be compared with while it attends: those of its maps that imitate one map only.

        They are for `CVMTransformer.forward_unprojected`; what it does not compare, `forward` does.
        """
        if teacher_output is None or teacher_output[2] is None:
            return {}
        return {(kind, s): getattr(teacher_output[2], kind)[t] for (kind, s), t in self._imitations.items()}

    def forward(self, student_output: Output, teacher_output: Output | None, batch: Targets, *, normalizer: float | Tensor | None = None) -> Losses:
        """The losses of one batch.

        student_output, teacher_output   what the models return; the teacher's is a constant and may be None where `needs_teacher` is
                     false. Both need hidden states and attention maps only as `needs_hidden` and `needs_attention` say.
        normalizer   number of target tokens that sums are divided by, by default those of this batch. For gradient accumulation give the
                     tokens of all batches of the step: losses and parts of the batches then add up to those of one large batch (hidden
                     states and attentions weighted by the batches' target tokens).

        Raises ValueError where something needed is missing.
        """
        self._check(student_output, teacher_output)
        taught = teacher_output[0] if teacher_output is not None and self.alpha else None
        total, kd, ce = self._logits(student_output[0], taught, batch.tgt_out, normalizer)
        parts = {"cross_entropy": ce, "logits": kd, "hidden": torch.zeros_like(ce), "attention": torch.zeros_like(ce)}
        share = 1.0 if normalizer is None else batch.tokens / normalizer
        if self.needs_hidden and teacher_output is not None:
            parts["hidden"] = self._hidden(student_output[1], teacher_output[1], batch) * share
            total = total + self.beta * parts["hidden"]
        if self.needs_attention and teacher_output is not None:
            parts["attention"] = self._attention(student_output[2], teacher_output[2], batch) * share
            total = total + self.gamma * parts["attention"]
        return Losses(total, {"loss": total.detach(), **{name: part.detach() for name, part in parts.items()}})

    def _logits(
        self, student: Tensor | Unprojected, teacher: Tensor | Unprojected | None, target: Tensor, normalizer: float | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the logits, and its two parts."""
        options: Any = {
            "temperature": self.temperature,
            "alpha": self.alpha,
            "divergence": self.divergence,
            "mixture": self.mixture,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.pad_id,
            "normalizer": normalizer,
            "return_parts": True,
        }
        found: tuple[Tensor, Tensor, Tensor]
        if isinstance(student, Unprojected) and not isinstance(teacher, Tensor):
            hidden, matrix = (None, None) if teacher is None else teacher
            found = ops.linear_kd_loss(student.features, student.matrix, hidden, matrix, target, **options)
        else:
            ours, theirs = (x.logits() if isinstance(x, Unprojected) else x for x in (student, teacher))
            assert ours is not None
            found = ops.kd_loss(ours, theirs, target, **options)
        return found

    def _check(self, student_output: Output, teacher_output: Output | None) -> None:
        logits = student_output[0]
        entries = logits.matrix.shape[0] if isinstance(logits, Unprojected) else logits.shape[-1]
        if entries != self.vocab_size:
            raise ValueError(f"the student's logits have {entries} entries, but the vocabulary has {self.vocab_size}")
        if teacher_output is None and self.needs_teacher:
            raise ValueError("the objective needs the teacher's output: run the teacher where needs_teacher is true")
        for who, output in (("student", student_output), ("teacher", teacher_output)):
            if output is not None and self.needs_hidden and output[1] is None:
                raise ValueError(f"the objective needs the {who}'s hidden states: call the model with return_hidden=True")
            if output is not None and self.needs_attention and output[2] is None:
                raise ValueError(f"the objective needs the {who}'s attention maps: call the model with return_attention=True")

    def _hidden(self, student: Any, teacher: Any, batch: Targets) -> Tensor:
        found = []
        for stack, s, t in self.hidden_pairs:
            ours, theirs = getattr(student, stack)[s], getattr(teacher, stack)[t]
            real = real_positions(batch.src_lengths if stack == "encoder" else batch.tgt_lengths, ours.shape[1])
            name = f"{stack}_{s}_{t}"
            projection = self.projections[name] if name in self.projections else nn.Identity()
            found.append(hidden_distance(ours, theirs, real, projection))
        return torch.stack(found).mean()

    def _attention(self, student: Any, teacher: Any, batch: Targets) -> Tensor:
        found = []
        for kind, s, t in self.attention_pairs:
            ours, theirs = getattr(student, kind)[s], getattr(teacher, kind)[t]
            real = real_positions(batch.src_lengths if kind == "encoder" else batch.tgt_lengths, ours.q.shape[2])
            found.append(attention_distance(ours, theirs, real))
        return torch.stack(found).mean()
