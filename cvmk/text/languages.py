"""Deprecated: `cvmk.config.languages`."""

from cvmk.deprecation import moved

__getattr__ = moved(__name__, "cvmk.config.languages")
