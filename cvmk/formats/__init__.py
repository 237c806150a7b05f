"""Every model on disk: our folder, its manifest, its weights. Reading a manifest or raw weights does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cvmk.formats.folder import save_model_folder

if TYPE_CHECKING:
    from cvmk.formats.torch_weights import load_model_folder

__all__ = ["load_model_folder", "save_model_folder"]


def __getattr__(name: str) -> Any:
    if name == "load_model_folder":  # imports torch
        from cvmk.formats.torch_weights import load_model_folder

        return load_model_folder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
