"""Every model on disk: our folder, its manifest, its weights. Reading a manifest or raw weights does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cvmk.formats.folder import BEST, load_model_tokenizer, read_model_manifest, read_model_weights, resolve_model_folder, write_model_folder
from cvmk.formats.manifest import Manifest, Scheme, Schemes
from cvmk.formats.tensors import RawTensor

if TYPE_CHECKING:
    from cvmk.formats.awq import awq_weight, read_awq
    from cvmk.formats.gptq import gptq_weight, read_gptq
    from cvmk.formats.torch_weights import describe_model, load_model_folder, read_weights, save_model_folder

__all__ = [
    "BEST",
    "Manifest",
    "RawTensor",
    "Scheme",
    "Schemes",
    "awq_weight",
    "describe_model",
    "gptq_weight",
    "load_model_folder",
    "load_model_tokenizer",
    "read_awq",
    "read_gptq",
    "read_model_manifest",
    "read_model_weights",
    "read_weights",
    "resolve_model_folder",
    "save_model_folder",
    "write_model_folder",
]

_WITH_TORCH = {
    **dict.fromkeys(("describe_model", "load_model_folder", "read_weights", "save_model_folder"), "torch_weights"),
    **dict.fromkeys(("gptq_weight", "read_gptq"), "gptq"),
    **dict.fromkeys(("awq_weight", "read_awq"), "awq"),
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(f"cvmk.formats.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
