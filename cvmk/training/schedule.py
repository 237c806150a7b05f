"""The learning rate as a function of the iteration."""

from __future__ import annotations

import math

from cvmk.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, iterations: int) -> float:
    """Share of the peak learning rate at iteration `step` (counted from 1) of `iterations`.

    Linear warm-up to 1 at `warmup`; then cosine to `final_factor` at the last iteration (Loshchilov & Hutter 2017), linear to it, the inverse
    square root of the iteration (Vaswani et al. 2017), or 1. `one_cycle` goes from `initial_factor` up to 1 at `warmup` and down to `final_factor`,
    both ways as half a cosine (Smith & Topin 2018, as fastai has it; momentum stays as it is). `warmup_stable_decay` is 1 until the last `decay` of
    the iterations, and goes down to `final_factor` in them (Hu et al. 2024; as 1 - sqrt: Hägele et al. 2024).
    """
    end = config.final_factor
    if step < config.warmup:
        if config.kind != "one_cycle":
            return step / config.warmup
        assert config.initial_factor is not None
        return _cosine(config.initial_factor, 1.0, step / config.warmup)
    way = min((step - config.warmup) / max(iterations - config.warmup, 1), 1.0)
    match config.kind:
        case "inverse_sqrt":
            return math.sqrt(max(config.warmup, 1) / step)
        case "cosine":
            return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * way))
        case "linear":
            return 1 - (1 - end) * way
        case "one_cycle":
            return _cosine(1.0, end, way)
        case "warmup_stable_decay":
            return _cooled(config, step, iterations)
    return 1.0


def _cosine(begin: float, end: float, way: float) -> float:
    return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * way))


def _cooled(config: ScheduleConfig, step: int, iterations: int) -> float:
    """The stable phase is 1, and none where the warm-up takes its place."""
    assert config.decay is not None
    begin = max(iterations - round(config.decay * iterations), config.warmup)
    way = min(max(step - begin, 0) / max(iterations - begin, 1), 1.0)
    return 1 - (1 - config.final_factor) * (math.sqrt(way) if config.decay_shape == "sqrt" else way)
