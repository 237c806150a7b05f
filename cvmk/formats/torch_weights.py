"""The weights of a model's folder as torch tensors, and the model that they make."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from cvmk.errors import DataError
from cvmk.files import read_bytes
from cvmk.formats.folder import CONFIG, WEIGHTS, load_model_tokenizer, read_model_config
from cvmk.nn import CVMTransformer
from cvmk.text.tokenizers import Tokenizer


def load_model_folder(path: str | os.PathLike[str]) -> tuple[CVMTransformer, Tokenizer, dict[str, Any]]:
    """The model (on the CPU, in evaluation mode, float32 unless saved otherwise), its tokenizer, and config.json.

    `path` is a model's folder or a run's. Raises DataError in one sentence for anything missing, truncated, corrupt or
    not fitting together.
    """
    folder, config, info = read_model_config(path)
    tokenizer = load_model_tokenizer(folder, info)
    weights = read_weights(folder / WEIGHTS, info.get("weights_sha256"))
    with torch.device("meta"):  # nothing is allocated before the sizes are known to be those of the weights
        shapes = CVMTransformer(config, info["vocab_size"], info["pad_id"]).state_dict()
    _check_weights(shapes, weights, folder / WEIGHTS)
    model = CVMTransformer(config, info["vocab_size"], info["pad_id"]).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    return model.eval(), tokenizer, info


def read_weights(file: Path, checksum: str | None = None, remedy: str = "restore it or save the model again") -> dict[str, Any]:
    """The tensors of a safetensors file by name. Raises DataError, with the remedy, where it is missing, corrupt or not of that sha256."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not file.is_file():
        raise DataError(f"{file} is missing: {remedy}")
    data = read_bytes(file)
    try:
        weights = load(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise DataError(f"{file} is truncated or corrupt ({error}): {remedy}") from error
    if checksum is not None and hashlib.sha256(data).hexdigest() != checksum:
        raise DataError(f"{file} is corrupt (its checksum differs from {CONFIG}): {remedy}")
    return weights


def _check_weights(expected: dict[str, Any], weights: dict[str, Any], file: Path) -> None:
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        what = f"lacks the tensor {missing[0]}" if missing else f"has the unknown tensor {unknown[0]}"
        raise DataError(f"{file} {what}: it does not belong to {CONFIG}; restore both")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise DataError(f"{file} has {name} of shape {list(tensor.shape)} where {CONFIG} asks for {list(expected[name].shape)}: restore both")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise DataError(f"{file} has values in {name} that are no finite numbers: the training diverged or the file is damaged; use another checkpoint")
