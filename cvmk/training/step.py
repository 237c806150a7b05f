"""One optimiser step: batches to losses to gradients to weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvmk import nvtx
from cvmk.distill import DistillationObjective, Losses
from cvmk.nn import CVMTransformer
from cvmk.text.batching import Batch
from cvmk.training.optimizers import NotFiniteError, Optimizer
from cvmk.training.world import World


class StepResult(NamedTuple):
    """What a step found, of all processes together."""

    loss: float
    norm: float
    """Of the gradients, before clipping."""
    tokens: int
    """Target tokens of all batches."""
    parts: dict[str, Tensor]
    """Scalars, still on the device: "loss" and what it is made of."""
    passes: int = 1
    """How often the gradients of the batches were computed."""

    def values(self) -> dict[str, float]:
        """The parts as numbers, in one read."""
        return dict(zip(self.parts, torch.stack([value.float() for value in self.parts.values()]).tolist(), strict=True))


class TrainingStep:
    """Changes the weights of `model` (and of the objective's projections) by the gradients of one step's batches.

    The batches' losses are sums divided by the target tokens of all batches of all processes, so that the step is that of one large batch.
    """

    def __init__(
        self,
        model: CVMTransformer,
        teacher: CVMTransformer | None,
        objective: DistillationObjective,
        optimizer: Optimizer,
        *,
        precision: str,
        clip_norm: float,
        world: World,
    ) -> None:
        self._model, self._objective, self._optimizer, self._world = model, objective, optimizer, world
        self._teacher = teacher if objective.needs_teacher else None
        self._clip_norm = clip_norm
        self._lower = torch.bfloat16 if precision == "bfloat16" else None
        self._wants: Any = {"return_hidden": objective.needs_hidden, "return_attention": objective.needs_attention}

    def __call__(self, batches: Sequence[Batch], factor: float) -> StepResult:
        """One step, at `factor` times the optimiser's learning rates. A loss or a gradient that is not finite changes no weight."""
        self._model.train()
        self._optimizer.train()
        self._optimizer.set_factor(factor)
        tokens = self._world.total(sum(batch.tokens for batch in batches))
        parts = self._gradients(batches, tokens)

        loss = norm = math.nan
        passes, span = 1, ExitStack()

        def again() -> Tensor:
            nonlocal passes, loss, norm
            span.close()  # what is computed now has spans of its own
            passes += 1
            self._optimizer.zero_grad()
            with torch.enable_grad():
                found = self._gradients(batches, tokens)
            span.enter_context(nvtx.span("optimiser"))
            seen = self._clipped(found)
            if not all(map(math.isfinite, seen)):
                loss, norm = seen
                raise NotFiniteError
            return found["loss"]

        with span:
            span.enter_context(nvtx.span("optimiser"))
            loss, norm = self._clipped(parts)
            if math.isfinite(loss) and math.isfinite(norm):
                with suppress(NotFiniteError):
                    self._optimizer.step(again)
            self._optimizer.zero_grad()
        return StepResult(loss, norm, tokens, parts, passes)

    def _clipped(self, parts: dict[str, Tensor]) -> tuple[float, float]:
        """Clip the gradients; loss and norm, in the only read of a step, which waits for the device."""
        norm = self._optimizer.clip(self._clip_norm)
        loss, found = torch.stack([parts["loss"].float(), norm.float()]).tolist()
        return loss, found

    def _gradients(self, batches: Sequence[Batch], tokens: int) -> dict[str, Tensor]:
        """Add the gradients of the batches, of all processes, to the parameters'; the losses."""
        sums: dict[str, Tensor] = {}
        for batch in batches:
            losses = self._losses(batch, tokens)
            with nvtx.span("backward"):
                losses.total.backward()
            for name, value in losses.parts.items():
                sums[name] = sums[name] + value if name in sums else value
        if self._world.size > 1:
            self._world.add_up([*sums.values(), *map(_gradient, self._optimizer.parameters)])
        return sums

    def _losses(self, batch: Batch, tokens: int) -> Losses:
        """The batch's share of the losses of a step over so many target tokens."""
        device = batch.src.device.type
        with nullcontext() if self._lower is None else torch.autocast(device, self._lower):
            taught: Any = None
            if self._teacher is not None:
                with nvtx.span("teacher"), torch.no_grad():
                    taught = self._teacher.forward_unprojected(batch.src, batch.tgt_in, **self._wants)
            with nvtx.span("forward"):
                imitated = self._objective.imitated(taught)
                found = self._model.forward_unprojected(batch.src, batch.tgt_in, imitated=imitated, **self._wants)
            with nvtx.span("loss"):
                losses: Losses = self._objective(found, taught, batch, normalizer=tokens)
            return losses


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient, which is 0 where the batches of this process do not reach the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
