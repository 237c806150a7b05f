"""The training loop: steps, validations, checkpoints, rollbacks. `Trainer.train` and `Trainer._step` are the whole story."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from cvmk import nvtx
from cvmk.config.schema import Recipe
from cvmk.distill import DistillationObjective
from cvmk.errors import DataError, DivergedError
from cvmk.formats import describe_model
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer
from cvmk.telemetry import Reporter, RunLog
from cvmk.text.batching import Batch, TokenBatchSampler, collate
from cvmk.text.cache import TokenizedCorpus
from cvmk.text.tokenizers import Tokenizer
from cvmk.training.averaging import WeightHistory
from cvmk.training.checkpoint import Checkpoint, CheckpointStore
from cvmk.training.guard import DivergenceGuard
from cvmk.training.optimizer import build_optimizer
from cvmk.training.schedule import learning_rate_factor
from cvmk.validation import DistillationValidator


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (or SIGTERM) was answered with a checkpoint."""


@dataclass
class Progress:
    """What a run has done so far; part of every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    learning_rate_scale: float = 1.0
    stale: int = 0
    finished: bool = False
    first_loss: float | None = None
    losses: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains `model` by `objective` on `corpus`, in the folder of one run.

    Raises DivergedError after the last rollback, Interrupted after Ctrl-C (a checkpoint is written first), and DataError where
    something cannot be written (the last good checkpoint stays as it is).
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        folder: Path,
        seed: int,
        model: CVMTransformer,
        teacher: CVMTransformer | None,
        objective: DistillationObjective,
        corpus: TokenizedCorpus,
        tokenizer: Tokenizer,
        validator: DistillationValidator,
        log: RunLog,
        reporter: Reporter,
        title: str,
        languages: dict[str, str | None] | None,
    ) -> None:
        self.recipe, self.config = recipe, recipe.training
        self.model, self.teacher, self.objective = model, teacher, objective
        self.corpus, self.tokenizer, self.validator = corpus, tokenizer, validator
        self.log, self.reporter, self.title = log, reporter, title
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(recipe.optimizer, (model, objective))
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.sampler = TokenBatchSampler(corpus.lengths, self.config.max_tokens, seed)
        self.guard = DivergenceGuard(recipe.guard)
        self.languages = languages
        self.store = CheckpointStore(
            folder / "checkpoints", self.config.keep, lambda into: describe_model(into, self.model, self.tokenizer, {"languages": self.languages})
        )
        self.averages = WeightHistory(folder / "checkpoints" / "average", self.config.average)
        self.progress = Progress()
        self._signal: int | None = None

    # -- the loop ----------------------------------------------------------------------------------------------------------
    def train(self) -> None:
        """Run from the present state to the last iteration or an early stop."""
        iterations, config = self.config.iterations, self.config
        if self.progress.step == 0 and self.store.newest() is None:
            self.save()  # what a divergence before the first validation returns to
        with self._signals(), self.reporter.progress(self.title, iterations, self.progress.step) as bar:
            while self.progress.step < iterations and not self.progress.finished:
                started = time.monotonic()
                losses, norm = self._step()
                self.progress.seconds += time.monotonic() - started
                step, interrupted = self.progress.step, self._signal is not None
                validates = step % self.recipe.validation.validate_every == 0 or step == iterations
                saves = interrupted or step % config.save_every == 0
                problem = self.guard.check(losses["loss"], norm)
                if problem is None and (validates or saves) and not self._sound():
                    problem = "a weight is not finite"
                if problem is not None:
                    self._roll_back(problem)
                    continue
                self._record(bar, losses, norm)
                if validates:
                    self._validate()
                elif saves:
                    self.save()
                if interrupted:
                    self.log.event("interrupted", step=step)
                    raise Interrupted(f"interrupted at iteration {step}; a checkpoint was written")
            if self.validator.best is None:  # resumed with fewer iterations than it has behind it
                self._validate()

    def _sound(self) -> bool:
        """Whether every weight is finite: what is saved or validated must not be what the next loss would tell to be lost."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters)

    def _step(self) -> tuple[dict[str, float], float]:
        """One optimiser step. Returns the losses and the gradient norm before clipping; a non-finite one changes no weight."""
        self.model.train()
        step = self.progress.step + 1
        with nvtx.span("data"):
            batches = [collate(self.corpus, next(self.sampler)).to(self.device) for _ in range(self.config.accumulate)]
        total = sum(batch.tokens for batch in batches)
        losses: dict[str, torch.Tensor] = {}
        for batch in batches:
            share = batch.tokens / total
            with nvtx.span("forward"):
                found = self._losses(batch)
            with nvtx.span("backward"):
                (found.total * share).backward()
            for name, value in found.parts.items():
                losses[name] = losses.get(name, 0.0) + value * share
        with nvtx.span("optimiser"):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm or float("inf"))
            values = {name: float(value) for name, value in losses.items()}
            if torch.isfinite(norm) and values["loss"] == values["loss"]:
                rate = self.learning_rate(step)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.progress.step, self.progress.tokens = step, self.progress.tokens + total
        return values, float(norm)

    def _losses(self, batch: Batch) -> Any:
        wants = {"return_hidden": self.objective.needs_hidden, "return_attention": self.objective.needs_attention}
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.config.precision == "bfloat16" else nullcontext()
        with autocast:
            taught = None
            if self.teacher is not None and self.objective.needs_teacher:
                with torch.no_grad():
                    taught = self.teacher(batch.src, batch.tgt_in, **wants)
            return self.objective(self.model(batch.src, batch.tgt_in, **wants), taught, batch)

    def learning_rate(self, step: int) -> float:
        factor = learning_rate_factor(self.recipe.schedule, step, self.config.iterations)
        return self.recipe.optimizer.learning_rate * factor * self.progress.learning_rate_scale

    def _record(self, bar: Any, losses: dict[str, float], norm: float) -> None:
        progress = self.progress
        progress.losses = losses
        if progress.first_loss is None:
            progress.first_loss = losses["loss"]
        log = progress.step % self.config.log_every == 0 or progress.step == self.config.iterations
        parts = "  ".join(f"{name} {value:.4f}" for name, value in losses.items() if value)
        text = f"{parts}  {self.tokens_per_second:.0f} tok/s"
        if (best := self.validator.best) is not None:
            text += f"  best {best.metric} {best.value:.2f}"
        bar.update(progress.step, text, log=log)
        if log:
            rate = self.learning_rate(progress.step)
            self.log.event("step", step=progress.step, learning_rate=rate, gradient_norm=norm, tokens_per_second=round(self.tokens_per_second, 1), **losses)
            self.log.line(f"step {progress.step}  {text}  lr {rate:.3g}  norm {norm:.3g}")

    @property
    def tokens_per_second(self) -> float:
        """Target tokens (padding not counted) a second of training, validation and input/output left out."""
        return self.progress.tokens / self.progress.seconds if self.progress.seconds else 0.0

    # -- validation and rollback -------------------------------------------------------------------------------------------------
    def translator(self) -> Translator:
        return Translator.from_model(self.model.eval(), self.tokenizer)

    def _validate(self) -> None:
        step, guard, best = self.progress.step, self.recipe.guard, self.validator.best
        with nvtx.span("validation"):
            result = self.validator.run(self.translator(), step, on_long="truncate")
        scores = {score.metric: score.value for score in result.scores}
        self.log.event("validation", **result.to_dict())
        better = self.validator.better(result, best)
        self.reporter.say(f"{self.title} {step}: validation {_words(scores)}{'  (best so far)' if better else ''}")
        self.log.line(f"validation at {step}: {_words(scores)}")
        if better:
            self.progress.stale = 0
        else:
            assert best is not None
            if guard.rollback_on_regression and self.validator.regressed(result, best):
                self._roll_back(f"{result.metric} went from {best.value:.2f} to {result.value:.2f}, outside the bootstrap interval")
                return
            self.progress.stale += 1
        self.averages.add(step, self.model)
        patience = self.recipe.validation.patience
        if patience and self.progress.stale >= patience:
            self.progress.finished = True
            self.reporter.say(f"{self.title}: no better {result.metric} in {patience} validations, stopping early at iteration {step}")
            self.log.event("early_stop", step=step)
        self.save(best=better)

    def _roll_back(self, problem: str) -> None:
        """Return to the best checkpoint (before the first validation: the oldest that is kept) with a smaller rate and another data order."""
        guard, step = self.recipe.guard, self.progress.step
        count = self.progress.rollbacks + 1
        target = self.store.target("best")
        if target is None:
            target = min(self.store.steps(), default=0)
        self.log.event("rollback", step=step, to=target, problem=problem, rollbacks=count)
        if count > guard.max_rollbacks:
            raise DivergedError(
                f"training diverged at iteration {step} ({problem}) after {guard.max_rollbacks} rollbacks; "
                f"the best checkpoint is {self.store.folder / f'step-{target}'}: try a smaller optimizer.learning_rate or a longer schedule.warmup"
            )
        spent = (self.progress.seconds, self.progress.tokens)
        scale = self.progress.learning_rate_scale * guard.learning_rate_factor
        self._restore(target)
        self.progress.seconds, self.progress.tokens = spent
        self.progress.rollbacks, self.progress.learning_rate_scale = count, scale
        self.sampler.reseed(count)
        self.guard.reset()
        self.store.drop_after(target)
        self.averages.drop_after(target)
        self.save(best=self.validator.best is not None)
        change = f"learning rate x {scale:g}, new data order ({count} of {guard.max_rollbacks} rollbacks)"
        text = f"iteration {step}: {problem}; back to iteration {target}, {change}"
        self.reporter.say(f"{self.title} {text}")
        self.log.line(text)

    # -- state ------------------------------------------------------------------------------------------------------------------
    def save(self, *, best: bool = False) -> None:
        values = {
            "progress": asdict(self.progress),
            "sampler": self.sampler.state_dict(),
            "guard": self.guard.state_dict(),
            "validator": self.validator.state_dict(),
        }
        tensors = {"optimizer": self.optimizer.state_dict(), "objective": self.objective.state_dict(), "random": _random_state()}
        self.store.save(self.progress.step, Checkpoint(self.model.state_dict(), tensors, values), best=best)

    def _restore(self, step: int) -> Checkpoint:
        """Take the state of the checkpoint `step-N`, random generators included, but for the validator's memory."""
        checkpoint = self.store.load(step)
        try:
            self.model.load_state_dict(checkpoint.weights)
            self.optimizer.load_state_dict(checkpoint.tensors["optimizer"])
            self.objective.load_state_dict(checkpoint.tensors["objective"])
            _set_random_state(checkpoint.tensors["random"])
            self.progress = Progress(**checkpoint.values["progress"])
            self.sampler.load_state_dict(checkpoint.values["sampler"])
            self.guard.load_state_dict(checkpoint.values["guard"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._foreign(step, error) from error
        return checkpoint

    def resume(self) -> int | None:
        """Go back to the last checkpoint; its step, or None where there is none.

        A crash may have fallen between the writing of a checkpoint and that of the pointers and averages: they are made to fit it.
        """
        step = self.store.newest()
        if step is not None:
            checkpoint = self._restore(step)
            try:
                self.validator.load_state_dict(checkpoint.values["validator"])
            except (KeyError, TypeError) as error:
                raise self._foreign(step, error) from error
            best, patience = self.validator.best, self.recipe.validation.patience
            if best is not None and self.store.target("best") != best.step:
                self.store.point("best", best.step)
            self.store.drop_after(step)
            self.averages.drop_after(step)
            self.progress.finished = 0 < patience <= self.progress.stale
            self.log.event("resumed", step=step)
        return step

    def _foreign(self, step: int, error: Exception) -> DataError:
        reason = str(error).splitlines()[0]
        return DataError(
            f"{self.store.folder / f'step-{step}'} is corrupt or of another cvmk ({type(error).__name__}: {reason}): "
            "remove this folder to resume from the checkpoint before it, or --restart"
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM lets the iteration end and writes a checkpoint; the second stops at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number
            self.reporter.say(f"{self.title}: stopping after this iteration; once more to stop at once")

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns it handles signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _words(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in scores.items())


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
