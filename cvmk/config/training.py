"""`[training]`, `[validation]` and `[guard]`: the loop, its scores, and what it does when they go wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cvmk.config.section import MAY_CHANGE, Section

Metric = Literal["bleu", "chrf", "ter", "rouge", "bertscore"]
MAX_RESAMPLES = 1_000_000
BleuTokenizer = Literal["auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200", "char", "none"]


class TrainingConfig(Section):
    iterations: Annotated[int, MAY_CHANGE] = Field(10000, ge=1, description="Optimiser steps.")
    max_tokens: int = Field(4096, ge=16, description="Tokens of a batch, padding included, the larger side counted.")
    accumulate: int = Field(1, ge=1, description="Batches whose gradients are added up for one step.")
    clip_norm: float = Field(1.0, ge=0, description="Largest gradient norm; 0 = no clipping.")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="Label smoothing of the cross-entropy with the references.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16 = autocast.")
    save_every: Annotated[int, MAY_CHANGE] = Field(500, ge=1, description="Iterations between checkpoints.")
    keep: Annotated[int, MAY_CHANGE] = Field(2, ge=1, description="Step checkpoints kept besides best and last.")
    average: int = Field(
        5, ge=1,
        description="Checkpoint averaging: the final model is the mean of the weights at the last so many validations, if that scores better; 1 = off.",
    )
    log_every: Annotated[int, MAY_CHANGE] = Field(50, ge=1, description="Iterations between log lines.")


class ValidationConfig(Section):
    validate_every: Annotated[int, MAY_CHANGE] = Field(1000, ge=1, description="Iterations between validations; the last iteration is always validated.")
    metric: Metric = Field("bleu", description="Metric that chooses the best checkpoint.")
    metrics: Annotated[list[Metric], MAY_CHANGE] = Field(["bleu", "chrf", "ter"], min_length=1, description="Metrics that are reported.")
    bleu_tokenize: Annotated[BleuTokenizer, MAY_CHANGE] = Field(
        "auto",
        description="How BLEU finds words, by sacrebleu's name; auto goes by data.target_language: zh for Chinese, ja-mecab and ko-mecab where "
        "installed, flores200 or char for others without spaces, else 13a.",
    )
    beam_size: int = Field(1, ge=1, le=16, description="Beam of the validation translations.")
    max_sentences: int = Field(1000, ge=1, description="Validate on the first so many pairs.")
    patience: Annotated[int, MAY_CHANGE] = Field(10, ge=0, description="Stop after so many validations without a better metric; 0 = never.")
    min_delta: Annotated[float, MAY_CHANGE] = Field(0.0, ge=0, description="Improvement of the metric that counts as better.")
    bootstrap: Annotated[int, MAY_CHANGE] = Field(500, ge=50, le=MAX_RESAMPLES, description="Resamples of the paired bootstrap.")
    confidence: Annotated[float, MAY_CHANGE] = Field(
        0.95, gt=0.5, lt=1,
        description="Confidence of the bootstrap intervals and of the paired test that finds regressions.",
    )


class GuardConfig(Section):
    max_rollbacks: int = Field(
        3, ge=0,
        description="Returns to the best checkpoint before the run ends with it: with exit code 4 after divergence, early after a regression.",
    )
    learning_rate_factor: float = Field(0.5, gt=0, le=1, description="Learning rate factor after each rollback.")
    loss_factor: float = Field(4.0, gt=1, description="A loss above this multiple of its moving average, `window` times in a row, is divergence.")
    gradient_factor: float = Field(
        1000.0, gt=1,
        description="A gradient norm above this multiple of its moving average, `window` times in a row, is divergence.",
    )
    window: int = Field(10, ge=1, description="Iterations in a row that make an exploding loss or gradient a divergence; a non-finite one counts at once.")
    rollback_on_regression: bool = Field(
        True,
        description="Return to the best checkpoint also when, after the warm-up, the validation metric is worse than the best one by the paired bootstrap "
        "and the average loss has risen, or the metric has fallen to less than half.",
    )
    min_sentences: int = Field(20, ge=2, description="With fewer validation pairs no drop of the metric is a regression.")
