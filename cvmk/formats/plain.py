"""Our models as plain floats, whatever they were quantised to: a model's folder, which any reader of safetensors and JSON can use.

`folder` has the names of the tensors.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cvmk.errors import ConfigError, DataError
from cvmk.formats.folder import CARD, WEIGHTS, read_model_manifest
from cvmk.formats.manifest import FLOATS
from cvmk.formats.quantized_weights import dequantized
from cvmk.formats.torch_weights import load_model_folder, save_model_folder
from cvmk.nn import CVMTransformer

DTYPES = ("float32", "bfloat16", "float16")
assert set(DTYPES) <= set(FLOATS)


def export_plain(path: str | os.PathLike[str], out: str | os.PathLike[str], dtype: str = "float32") -> None:
    """Write the model of a folder into the folder `out` with all weights in `dtype`, whole or not at all; a model that stands there is replaced.

    Quantised weights become the floats that they stand for, rounded to `dtype` once. Raises ConfigError for a dtype that is none of DTYPES and an `out` that is
    the model, DataError where the folder is not sound or `out` cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, and must be one of {', '.join(DTYPES)}")
    folder, manifest, _ = read_model_manifest(path)
    out = Path(out)
    if os.path.realpath(out) == os.path.realpath(folder):
        raise ConfigError(f"{out} is the model itself, which is not changed: name another folder")
    if out.exists() and not (out.is_dir() and ((out / WEIGHTS).exists() or not any(out.iterdir()))):
        raise DataError(f"cannot write {out}: there is something that is no model; name another folder")
    model, tokenizer, _ = load_model_folder(folder)
    with torch.device("meta"):
        plain = CVMTransformer(manifest.model, manifest.vocab_size, manifest.pad_id)
    plain = plain.to_empty(device="cpu").to(getattr(torch, dtype))
    plain.load_state_dict(dequantized(model, torch.float64))
    lost = next((name for name, tensor in plain.state_dict().items() if not tensor.isfinite().all()), None)
    if lost is not None:
        raise ConfigError(f"{path} has values in {lost} that are beyond {dtype}: take float32 or bfloat16")
    card = folder / CARD
    save_model_folder(out, plain, tokenizer, card.read_text(encoding="utf-8") if card.exists() else "", dict(manifest.extra))
