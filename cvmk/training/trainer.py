"""The training loop: steps, validations, checkpoints, rollbacks. `Trainer.train` is the whole story."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch

from cvmk import nvtx
from cvmk.config.schema import Recipe
from cvmk.errors import DataError, DivergedError
from cvmk.inference import Translator
from cvmk.telemetry import EventStream, Iteration, Recorder
from cvmk.telemetry.schema import EarlyStop, Interruption, Resumed, Rollback, Step, Validation
from cvmk.text.tokenizers import Tokenizer
from cvmk.training.averaging import WeightHistory
from cvmk.training.checkpoint import Checkpoint, Checkpoints
from cvmk.training.judge import Judge, blindness
from cvmk.training.profile import StepProfiler
from cvmk.training.schedule import learning_rate_factor
from cvmk.training.signals import Interrupted, StopSignal
from cvmk.training.state import Progress, TrainingState
from cvmk.training.step import StepResult, TrainingStep
from cvmk.validation import DistillationValidator

__all__ = ["Interrupted", "Progress", "Trainer"]


class Trainer:
    """Takes `state` from where it is to the last iteration, or to an early stop.

    Raises DivergedError after the last rollback, Interrupted after Ctrl-C or whatever else gave the signal to stop (a checkpoint is
    written first), and DataError where something cannot be written (the last good checkpoint stays as it is).
    """

    def __init__(
        self,
        recipe: Recipe,
        state: TrainingState,
        step: TrainingStep,
        store: Checkpoints,
        averages: WeightHistory,
        tokenizer: Tokenizer,
        events: EventStream,
        recorder: Recorder,
        stop: StopSignal,
        profiler: StepProfiler | None = None,
    ) -> None:
        self.recipe, self.state, self.step = recipe, state, step
        self.store, self.averages, self.tokenizer, self.events = store, averages, tokenizer, events
        self.recorder = recorder
        self.judge = Judge(state.validator, recipe.guard, recipe.schedule.warmup)
        self._stop, self._profiler = stop, profiler

    @property
    def progress(self) -> Progress:
        return self.state.progress

    @property
    def model(self) -> torch.nn.Module:
        return self.state.model

    @property
    def validator(self) -> DistillationValidator:
        return self.state.validator

    # -- the loop ----------------------------------------------------------------------------------------------------------
    def train(self) -> None:
        """Run from the present state to the last iteration or an early stop."""
        try:
            self._train()
        finally:
            self.recorder.finish()
        self.store.finish()
        if self._profiler is not None:
            self._profiler.finish()
        if blind := blindness(self.validator.history):
            self.events.note(blind)

    def _train(self) -> None:
        iterations = self.recipe.training.iterations
        with self._stop.listening(self.events.notice):
            if self.progress.step == 0 and self.store.newest() is None:
                self.save()  # what a divergence before the first validation returns to
            while self.progress.step < iterations and not self.progress.finished:
                with nullcontext() if self._profiler is None else self._profiler.iteration():
                    result = self._step()
                step, interrupted = self.progress.step, self._stop.received
                validates = step % self.recipe.validation.validate_every == 0 or step == iterations
                saves = interrupted or step % self.recipe.training.save_every == 0
                problem = self.state.guard.check(result.loss, result.norm)
                if problem is None and (validates or saves) and not self._sound():
                    problem = "a weight is not finite"
                if problem is not None:
                    self._diverged(problem)
                    continue
                self._record(result, validates or saves)
                if validates:
                    self._validate()
                elif saves:
                    self.save()
                if interrupted:
                    self.store.finish()
                    self.recorder.finish()
                    self.events.emit(Interruption(step))
                    raise Interrupted(f"interrupted at iteration {step}; a checkpoint was written")
            if self.validator.best is None:  # resumed with fewer iterations than it has behind it
                self._validate()

    def _step(self) -> StepResult:
        """One optimiser step; a loss or gradient that is not finite changes no weight."""
        started, progress = time.monotonic(), self.progress
        with nvtx.span("data"):
            batches = next(self.state.batches)
        waited = time.monotonic() - started
        factor = self._factor(progress.step + 1)
        result = self.step(batches, factor)
        if self._profiler is not None:
            self._profiler.took(list(batches) * result.passes, result.tokens, progress.step + 1)
        seconds = time.monotonic() - started
        progress.step += 1
        progress.tokens += result.tokens
        progress.seconds += seconds
        rate = self.recipe.optimizer.learning_rate * factor
        self.recorder.iteration(Iteration(progress.step, *self.state.batches.place, result.loss, rate, result.norm, result.tokens, seconds, waited))
        return result

    def _factor(self, step: int) -> float:
        """The learning rate at `step` as a share of its peak."""
        return learning_rate_factor(self.recipe.schedule, step, self.recipe.training.iterations) * self.progress.learning_rate_scale

    def _sound(self) -> bool:
        """A checkpoint must not hold a non-finite weight, even if the loss has not shown it yet."""
        return bool(torch.stack([torch.isfinite(parameter).all() for parameter in self.state.optimizer.parameters]).all())

    def _record(self, result: StepResult, wanted: bool) -> None:
        progress, training = self.progress, self.recipe.training
        if progress.first_loss is None:
            progress.first_loss = result.loss
        logs = progress.step % training.log_every == 0 or progress.step == training.iterations
        if logs or wanted:
            progress.losses = result.values()
        if logs:
            rate = self.recipe.optimizer.learning_rate * self._factor(progress.step)
            self.recorder.flush()
            self.events.emit(Step(progress.step, rate, result.norm, round(progress.tokens_per_second, 1), **progress.losses))
        else:
            self.events.tick(progress.step, result.loss, progress.tokens_per_second)

    # -- validation ----------------------------------------------------------------------------------------------------------------
    def translator(self) -> Translator:
        """Translates with the present weights."""
        self.state.optimizer.eval()
        return Translator.of_weights(self.state.model.eval(), self.tokenizer)

    def _validate(self) -> None:
        progress, before = self.progress, self.validator.best
        self.recorder.flush()
        with nvtx.span("validation"):
            result = self.validator.run(self.translator(), progress.step, on_long="truncate", scores=False)
        loss = self.state.guard.average_loss
        verdict = self.judge(result, before, progress, loss)
        self.events.emit(Validation.of(result.to_dict() | {"best": verdict.best}))
        if verdict.regression is not None:
            self._regressed(verdict.regression)
            return
        if verdict.best:
            progress.best_loss = loss
        if verdict.improved:
            progress.stale, progress.reference = 0, result.value
        else:
            progress.stale += 1
        self.averages.add(progress.step, self.state.model)
        patience = self.recipe.validation.patience
        if patience and progress.stale >= patience:
            self._stop_early(f"no better {result.metric} in {patience} validations")
        self.save(best=verdict.best)

    def _stop_early(self, reason: str) -> None:
        self.progress.finished = True
        self.events.emit(EarlyStop(self.progress.step, reason))

    # -- rollback ------------------------------------------------------------------------------------------------------------------
    def _diverged(self, problem: str) -> None:
        """Go back. Raises DivergedError where no rollback is left."""
        step = self.progress.step
        if not self._roll_back(problem, "divergence"):
            raise DivergedError(f"training diverged at iteration {step} ({problem}) after {self.recipe.guard.max_rollbacks} rollbacks")

    def _regressed(self, problem: str) -> None:
        """Go back; where no rollback is left, the best checkpoint is the run's result."""
        if not self._roll_back(problem, "regression"):
            self._stop_early("no rollback is left after a regression")

    def _roll_back(self, problem: str, kind: str) -> bool:
        """Return to the best checkpoint (before the first validation: the oldest that is kept) with a smaller rate and another data order.

        False where the run has used up its rollbacks: the state is then that of the checkpoint, and says so to whoever resumes it.
        """
        guard, progress = self.recipe.guard, self.progress
        self.recorder.finish()
        left = progress.rollbacks - progress.forgiven < guard.max_rollbacks
        target = self.store.target("best")
        if target is None:
            target = min(self.store.steps(), default=0)
        self._restore(target)
        now = self.progress
        now.seconds, now.tokens, now.forgiven = progress.seconds, progress.tokens, progress.forgiven
        now.rollbacks, now.learning_rate_scale = progress.rollbacks, progress.learning_rate_scale
        if left:
            self._start_anew()
        else:
            now.ended = kind
        self.store.drop_after(target)
        self.averages.drop_after(target)
        self.save(best=self.validator.best is not None)
        self.events.emit(Rollback(progress.step, target, problem, progress.rollbacks + 1, now.learning_rate_scale, final=not left))
        return left

    def _start_anew(self) -> None:
        """What a rollback changes: the learning rate and the order of the data."""
        progress = self.progress
        progress.rollbacks += 1
        progress.learning_rate_scale *= self.recipe.guard.learning_rate_factor
        self.state.batches.reorder(progress.rollbacks)
        self.state.guard.reset()

    # -- checkpoints ---------------------------------------------------------------------------------------------------------------
    def save(self, *, best: bool = False) -> None:
        self.store.save(self.progress.step, self.state.checkpoint(), best=best)

    def resume(self) -> int | None:
        """Go back to the last checkpoint; its step, or None where there is none.

        A crash may have fallen between the writing of a checkpoint and that of the pointers and averages: they are made to fit it. A run
        that had used up its rollbacks is given as many again.
        """
        step = self.store.newest()
        if step is None:
            return None
        saved = self._restore(step, validations=True).values["progress"]
        best, patience, progress = self.validator.best, self.recipe.validation.patience, self.progress
        if best is not None and self.store.target("best") != best.step:
            self.store.point("best", best.step)
        self.store.drop_after(step)
        self.averages.drop_after(step)
        progress.finished = 0 < patience <= progress.stale
        used_up = "ended" not in saved and 0 < self.recipe.guard.max_rollbacks <= progress.rollbacks  # an older cvmk did not say that it gave up
        if progress.ended:
            self._start_anew()
        if progress.ended or used_up:
            progress.forgiven, progress.ended = progress.rollbacks, ""
            self.events.emit(Resumed(step, renewed=True, learning_rate_scale=progress.learning_rate_scale))
        else:
            self.events.emit(Resumed(step))
        return step

    def _restore(self, step: int, *, validations: bool = False) -> Checkpoint:
        checkpoint = self.store.load(step)
        try:
            self.state.restore(checkpoint, validations=validations)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise DataError(
                f"{self.store.where(step)} is corrupt or of another cvmk ({type(error).__name__}: {reason}): "
                "remove this folder to resume from the checkpoint before it, or --restart"
            ) from error
        return checkpoint
