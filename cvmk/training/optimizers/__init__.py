"""Optimisers: what the training step asks of one, and how a configuration builds it."""

from cvmk.training.optimizers.base import Closure, Optimizer
from cvmk.training.optimizers.build import build_optimizer

__all__ = ["Closure", "Optimizer", "build_optimizer"]
