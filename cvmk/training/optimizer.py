"""Moved to `cvmk.training.optimizers`."""

from cvmk.deprecation import moved

__getattr__ = moved("cvmk.training.optimizer", "cvmk.training.optimizers.build")
