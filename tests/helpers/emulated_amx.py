"""Imported first (`pytest -p emulated_amx`): this process takes the native library of the build folder in CVMK_EMULATED_BUILD, which emulates AMX."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import cvmk

_folder = Path(os.environ["CVMK_EMULATED_BUILD"])
cvmk.__path__.insert(0, str(_folder))  # the build record
_spec = importlib.util.spec_from_file_location("cvmk._native", next(_folder.glob("_native*.so")))
assert _spec is not None and _spec.loader is not None
sys.modules["cvmk._native"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["cvmk._native"])
assert sys.modules["cvmk._native"].emulates_amx()
