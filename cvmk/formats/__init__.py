"""Every model on disk: our folder, its manifest, its weights. Reading a manifest or raw weights does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cvmk.formats.folder import BEST, load_model_tokenizer, read_model_manifest, read_model_weights, resolve_model_folder, write_model_folder
from cvmk.formats.manifest import Manifest, Scheme, Schemes
from cvmk.formats.tensors import RawTensor

if TYPE_CHECKING:
    from cvmk.formats.torch_weights import describe_model, load_model_folder, read_weights, save_model_folder

__all__ = [
    "BEST",
    "Manifest",
    "RawTensor",
    "Scheme",
    "Schemes",
    "describe_model",
    "load_model_folder",
    "load_model_tokenizer",
    "read_model_manifest",
    "read_model_weights",
    "read_weights",
    "resolve_model_folder",
    "save_model_folder",
    "write_model_folder",
]

_WITH_TORCH = ("describe_model", "load_model_folder", "read_weights", "save_model_folder")


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(importlib.import_module("cvmk.formats.torch_weights"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
