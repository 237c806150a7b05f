"""Deprecated: `cvmk.training.optimizers`."""

from cvmk.deprecation import moved

__getattr__ = moved(__name__, "cvmk.training.optimizers")
