"""Optimisers: what the training step asks of one, and how a configuration builds it."""

from cvmk.training.optimizers.base import Closure, NotFiniteError, Optimizer
from cvmk.training.optimizers.build import build_optimizer

__all__ = ["Closure", "NotFiniteError", "Optimizer", "build_optimizer"]
