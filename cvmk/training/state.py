"""The state of a run: everything that it needs to go on as if it had never stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cvmk.distill import DistillationObjective
from cvmk.nn import CVMTransformer
from cvmk.training.batches import Batches
from cvmk.training.checkpoint import Checkpoint
from cvmk.training.guard import DivergenceGuard
from cvmk.training.optimizers import Optimizer
from cvmk.validation import DistillationValidator


@dataclass
class Progress:
    """What a run has done so far; part of every checkpoint. A field that an older cvmk did not write takes its default."""

    step: int = 0
    tokens: int = 0
    """Target tokens, padding not counted."""
    seconds: float = 0.0
    """Of training alone: validation, input and output left out."""
    rollbacks: int = 0
    forgiven: int = 0
    """Rollbacks that count no longer, because the run was resumed after it had used them up."""
    ended: str = ""
    """Why the run gave up after its last rollback: "divergence" or "regression"."""
    learning_rate_scale: float = 1.0
    stale: int = 0
    """Validations since the last improvement."""
    reference: float | None = None
    """The score that was the last improvement; None: that of the best validation."""
    best_loss: float | None = None
    """The guard's average loss at the best validation."""
    finished: bool = False
    first_loss: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    """Of the last iteration that was logged or saved."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class TrainingState:
    """The parts of a run that change as it goes on. All but the progress are changed in place."""

    model: CVMTransformer
    objective: DistillationObjective
    optimizer: Optimizer
    batches: Batches
    guard: DivergenceGuard
    validator: DistillationValidator
    progress: Progress = field(default_factory=Progress)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def checkpoint(self) -> Checkpoint:
        """The whole state, the random generators' included. The model holds the weights to be used then, as after `Optimizer.eval`."""
        self.optimizer.eval()
        values = {
            "progress": asdict(self.progress),
            "sampler": self.batches.state_dict(),
            "guard": self.guard.state_dict(),
            "validator": self.validator.state_dict(),
        }
        tensors = {"optimizer": self.optimizer.state_dict(), "objective": self.objective.state_dict(), "random": _random_state()}
        return Checkpoint(self.model.state_dict(), tensors, values)

    def restore(self, checkpoint: Checkpoint, *, validations: bool) -> None:
        """Take the state of a checkpoint, that of the validator only with `validations`: a rollback does not forget what was validated.

        Raises KeyError, TypeError, ValueError or RuntimeError where it does not fit, ConfigError where the data is another.
        """
        self.model.load_state_dict(checkpoint.weights)
        self.optimizer.load_state_dict(checkpoint.tensors["optimizer"])
        self.objective.load_state_dict(checkpoint.tensors["objective"])
        _set_random_state(checkpoint.tensors["random"])
        self.progress = Progress(**checkpoint.values["progress"])
        self.batches.load_state_dict(checkpoint.values["sampler"])
        self.guard.load_state_dict(checkpoint.values["guard"])
        if validations:
            self.validator.load_state_dict(checkpoint.values["validator"])


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
