"""Between a model's folder and a CVMTransformer."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cvmk.errors import DataError
from cvmk.files import write_json
from cvmk.formats.folder import WEIGHTS, load_model_tokenizer, read_model_manifest, read_model_weights, write_model_folder
from cvmk.formats.manifest import CONFIG, Manifest, Schemes
from cvmk.formats.quantized_weights import install, original_size, weight_schemes
from cvmk.formats.stored import split_weights
from cvmk.formats.tensors import REMEDY, RawTensor, read_tensors
from cvmk.nn import CVMTransformer, count_parameters
from cvmk.text.tokenizers import Tokenizer


# -- writing --------------------------------------------------------------------------------------------------------------------
def save_model_folder(
    path: str | os.PathLike[str],
    model: CVMTransformer,
    tokenizer: Tokenizer,
    card: str,
    extra: dict[str, Any] | None = None,
    others: Mapping[str, str] | None = None,
) -> None:
    """Write a model's folder, whole or not at all, as `folder.write_model_folder` says. `extra` goes into config.json as it is: `languages`, how
    it was trained. `others` are more files, by name. Raises
    DataError where it cannot be written, and ValueError where `extra` would overwrite a key or the tokenizer is not the model's.
    """
    weights = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    write_model_folder(path, manifest_of(model, tokenizer.fingerprint, hashlib.sha256(weights).hexdigest(), extra), weights, tokenizer, card, others)


def describe_model(folder: Path, model: CVMTransformer, tokenizer: Tokenizer, extra: dict[str, Any] | None = None) -> None:
    """Write what a model's folder has besides weights and card, so that a folder with `model.safetensors` becomes one."""
    tokenizer.save(folder)
    write_json(folder / CONFIG, manifest_of(model, tokenizer.fingerprint, None, extra).to_dict())


def manifest_of(model: CVMTransformer, tokenizer: str = "", checksum: str | None = None, extra: dict[str, Any] | None = None) -> Manifest:
    """The manifest of a model in memory; `tokenizer` is its tokenizer's fingerprint."""
    return Manifest(
        model=model.config,
        vocab_size=model.vocab_size,
        pad_id=model.pad_id,
        parameters=count_parameters(model) + original_size(model),
        tokenizer=tokenizer,
        schemes=Schemes.of_weights(weight_schemes(model)),
        weights_sha256=checksum,
        extra=extra or {},
    )


def raw_tensors(model: CVMTransformer) -> dict[str, RawTensor]:
    """The present weights of a model on the CPU by name, without a copy where they are contiguous."""
    found = {}
    for name, tensor in model.state_dict().items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        whole = tensor.detach().contiguous()
        found[name] = RawTensor(dtype, (whole.view(torch.uint16) if dtype == "bfloat16" else whole).numpy())
    return found


# -- reading --------------------------------------------------------------------------------------------------------------------
def load_model_folder(path: str | os.PathLike[str]) -> tuple[CVMTransformer, Tokenizer, dict[str, Any]]:
    """The model (on the CPU, in evaluation mode, float32 unless saved otherwise), its tokenizer, and config.json.

    `path` is a model's folder or a run's. Raises DataError in one sentence for anything missing, truncated, corrupt, newer
    or not fitting together.
    """
    folder, manifest, info = read_model_manifest(path)
    tokenizer = load_model_tokenizer(folder, manifest)
    return load_model(folder, manifest), tokenizer, info


def load_model(folder: Path, manifest: Manifest) -> CVMTransformer:
    """The model of a folder whose manifest was read. Where its floating weights have several dtypes, it gets the narrowest that holds them all."""
    floats, stored = split_weights(read_model_weights(folder, manifest), manifest.schemes, folder / WEIGHTS)
    weights = _tensors(floats)
    arguments = manifest.model, manifest.vocab_size, manifest.pad_id
    with torch.device("meta"):  # nothing is allocated before the sizes are known to be those of the weights
        shapes = CVMTransformer(*arguments).state_dict()
    for name, weight in stored.items():
        if shapes.pop(name, torch.empty(0)).shape != weight.shape:
            raise DataError(f"{folder / WEIGHTS} has the quantised weight {name} {list(weight.shape)}, which {CONFIG} does not ask for: restore both")
    _check_weights(shapes, weights, folder / WEIGHTS)
    model = CVMTransformer(*arguments)
    install(model, {name: (weight.scheme, _tensors(weight.parts), weight.smooth, weight.range) for name, weight in stored.items()})
    model.to(functools.reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()}, next(iter(weights.values())).dtype))
    model.load_state_dict(weights, strict=False)
    return model.eval()


def read_weights(file: Path, checksum: str | None = None, remedy: str = REMEDY) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises DataError, with the remedy, where it is missing, corrupt or not of that sha256."""
    return _tensors(read_tensors(file, checksum, remedy))


def _tensors(weights: Mapping[str, RawTensor]) -> dict[str, Tensor]:
    """Copies in memory of our own, which stay what they are when the file goes."""
    return {name: torch.from_numpy(raw.data.copy()).view(getattr(torch, raw.dtype)) for name, raw in weights.items()}


def _check_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: Path) -> None:
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        what = f"lacks the tensor {missing[0]}" if missing else f"has the unknown tensor {unknown[0]}"
        raise DataError(f"{file} {what}: it does not belong to {CONFIG}; restore both")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise DataError(f"{file} has {name} of shape {list(tensor.shape)} where {CONFIG} asks for {list(expected[name].shape)}: restore both")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise DataError(f"{file} has values in {name} that are no finite numbers: the training diverged or the file is damaged; use another checkpoint")
