"""Deprecated: `cvmk.text.tokenizers`."""

from cvmk.deprecation import moved

__getattr__ = moved(__name__, "cvmk.text.tokenizers")
