"""Moved to `cvmk.formats`."""

from cvmk.deprecation import moved

__getattr__ = moved("cvmk.inference.model_folder", "cvmk.formats")
