"""Divergence: when a loss or a gradient says that training has gone wrong."""

from __future__ import annotations

import math
from typing import Any

from cvmk.config import GuardConfig

_DECAY = 0.98
_SETTLING = 20


class DivergenceGuard:
    """Watches loss and gradient norm. A non-finite value is divergence at once; one above its factor times the moving average for
    `window` iterations in a row is divergence too. The averages are trusted after 20 values, and an exploding value does not enter them.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._series = {"loss": _Series(config.loss_factor), "gradient norm": _Series(config.gradient_factor)}

    def check(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong after this iteration, in words, or None."""
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
            series = self._series[name]
            series.add(value)
            if series.exploding >= self._config.window:
                return f"the {name} was over {series.factor:g} times its average of {series.mean:.4g} for {self._config.window} iterations (now {value:.4g})"
        return None

    @property
    def average_loss(self) -> float | None:
        """The moving average of the loss; None before the first value."""
        series = self._series["loss"]
        return series.mean if series.count else None

    def reset(self) -> None:
        """Forget everything: after a rollback the past is another."""
        for series in self._series.values():
            series.restore({"mean": 0.0, "count": 0, "exploding": 0})

    def state_dict(self) -> dict[str, Any]:
        return {name: series.state() for name, series in self._series.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, series in self._series.items():
            series.restore(state[name])


class _Series:
    """A moving average that knows how long its input has been too large."""

    def __init__(self, factor: float) -> None:
        self.factor, self.mean, self.count, self.exploding = factor, 0.0, 0, 0

    def add(self, value: float) -> None:
        if self.count >= _SETTLING and value > self.factor * self.mean:
            self.exploding += 1
            return
        self.exploding = 0
        self.count += 1
        decay = min(_DECAY, 1 - 1 / self.count)  # a plain mean at first
        self.mean = decay * self.mean + (1 - decay) * value

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count, "exploding": self.exploding}

    def restore(self, state: dict[str, Any]) -> None:
        self.mean, self.count, self.exploding = state["mean"], state["count"], state["exploding"]
