"""The learning rate as a function of the iteration."""

from __future__ import annotations

import math

from cvmk.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, iterations: int) -> float:
    """Share of the peak learning rate at iteration `step` (counted from 1) of `iterations`.

    Linear warm-up to 1 at `warmup`; then cosine to `final_factor` at the last iteration (Loshchilov & Hutter 2017), the inverse
    square root of the iteration (Vaswani et al. 2017), or 1.
    """
    if step < config.warmup:
        return step / config.warmup
    if config.kind == "inverse_sqrt":
        return math.sqrt(max(config.warmup, 1) / step)
    if config.kind == "cosine":
        span = max(iterations - config.warmup, 1)
        progress = min((step - config.warmup) / span, 1.0)
        return config.final_factor + (1 - config.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
