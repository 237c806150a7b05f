"""A model's folder: `config.json` (see `manifest`), `model.safetensors`, `tokenizer.*`, `card.md`. Written whole or not at all, read with every check.

model.safetensors holds the state dict of CVMTransformer (shared matrices once; see Embeddings for the names):
    embeddings.source [V, d]; if untied also embeddings.target and embeddings.output
    encoder.blocks.<i>.{mixer_norm, ffn_norm}, decoder.blocks.<i>.{mixer_norm, cross_norm, ffn_norm}, encoder.norm, decoder.norm:
        weight [d] and, for LayerNorm, bias [d]
    ....mixer.qkv (rows [q; k; v]), ....mixer.out, ....cross.query, ....cross.key_value (rows [k; v]), ....cross.out,
    ....ffn.inner (for SwiGLU rows [gate; up]), ....ffn.outer: weight [out, in] and, with model.bias, bias [out]
A matrix that is quantised has the tensors of `stored` in the place of its own.

Nothing here imports torch: `torch_weights` makes a model of a folder, and a folder of a model.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvmk.errors import DataError
from cvmk.files import explained, followed, sync_folder, write_bytes, write_json, write_text
from cvmk.formats.manifest import CONFIG, QUANTIZED, Manifest, Schemes, read_manifest
from cvmk.formats.stored import PARTS, VECTORS, weight_of
from cvmk.formats.tensors import RawTensor, read_tensors
from cvmk.text.tokenizers import Tokenizer, load_tokenizer

WEIGHTS, CARD = "model.safetensors", "card.md"
BEST = "checkpoints/best"
"""In the folder of a run: a pointer (`cvmk.files`) to the best checkpoint; a link, or a copy of the checkpoint, in runs of an older cvmk."""
_PLACES = ("", "model", BEST)
"""Where a model's files are looked for inside a folder that is given as a model."""


# -- writing --------------------------------------------------------------------------------------------------------------------
def write_model_folder(
    path: str | os.PathLike[str], manifest: Manifest, weights: bytes, tokenizer: Tokenizer, card: str, others: Mapping[str, str] | None = None
) -> None:
    """Write a model's folder; `weights` is the content of model.safetensors, `others` more files by name.

    The files are written beside `path` and moved into place together. A model that stood there is replaced; other files in its
    folder stay, and so does a link that `path` is: what it points at is written. Raises DataError where it cannot be written (what
    stood there is then untouched), and ValueError where the tokenizer is not the model's.
    """
    config = manifest.to_dict()
    if tokenizer.vocab_size != manifest.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} pieces and the model {manifest.vocab_size}: save the model with its own tokenizer")
    path = Path(os.path.realpath(path))
    with explained(path, "write"):
        if path.exists() and not path.is_dir():
            raise DataError(f"cannot write {path}: it is a file, and a model is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            write_bytes(temporary / WEIGHTS, weights)
            tokenizer.save(temporary)
            write_text(temporary / CARD, card)
            for name, text in (others or {}).items():
                write_text(temporary / name, text)
            write_json(temporary / CONFIG, config)
            _move_into_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, path: Path) -> None:
    """Rename the new folder to `path`; a folder that holds a model only is exchanged, any other gets the files one by one."""
    names = {entry.name for entry in temporary.iterdir()}
    if not path.exists():
        os.rename(temporary, path)
    elif all(entry.name in names for entry in path.iterdir()):
        old = temporary.with_name(temporary.name + ".old")
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        for name in sorted(names, key=lambda name: name == CONFIG):
            os.replace(temporary / name, path / name)
        with contextlib.suppress(OSError):
            sync_folder(path)
    sync_folder(path.parent)


# -- reading --------------------------------------------------------------------------------------------------------------------
def resolve_model_folder(path: str | os.PathLike[str]) -> Path:
    """The model's folder: `path` itself, or inside a run's folder its `model`, else its best checkpoint. Raises DataError where there is none."""
    if not os.fspath(path):
        raise DataError("the name of the model is empty: name the folder of a model or of a run")
    with explained(path, "read"):
        path = followed(path)
        there = path.exists()
    if not there:
        raise DataError(f"{path} does not exist: name the folder of a model or of a run")
    if not path.is_dir():
        raise DataError(f"{path} is a file: name the folder of a model or of a run")
    for place in _PLACES:
        folder = followed(path / place)
        if (folder / CONFIG).is_file():
            return folder
    if (path / WEIGHTS).exists():
        raise DataError(f"{path / CONFIG} is missing: restore it or save the model again")
    raise DataError(f"{path} holds no model (no {CONFIG} in it, in model/ or in checkpoints/best/): name the folder of a model or of a finished run")


def read_model_manifest(path: str | os.PathLike[str]) -> tuple[Path, Manifest, dict[str, Any]]:
    """The model's folder, its manifest, and the whole of config.json. Raises DataError for what is missing, corrupt, newer or not known here."""
    folder = resolve_model_folder(path)
    return folder, *read_manifest(folder / CONFIG)


def load_model_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer in a model's folder, checked against its manifest. Raises DataError where it is missing, corrupt or another one."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != manifest.tokenizer:
        raise DataError(f"the tokenizer in {folder} is not the one that the model was trained with (its fingerprint differs from {CONFIG}): restore it")
    if tokenizer.vocab_size != manifest.vocab_size:
        raise DataError(f"the tokenizer in {folder} has {tokenizer.vocab_size} pieces and {CONFIG} says vocab_size = {manifest.vocab_size}: restore {CONFIG}")
    return tokenizer


def read_model_weights(folder: Path, manifest: Manifest) -> dict[str, RawTensor]:
    """The tensors of a model by name, mapped into memory, checked against its manifest: the checksum, and that each is stored as its scheme says
    (of quantised weights `stored.split_weights` says that).

    Raises DataError where the file is missing, corrupt or another one.
    """
    file = folder / WEIGHTS
    weights = read_tensors(file, manifest.weights_sha256)
    for name, tensor in weights.items():
        if manifest.schemes is None or _is_part(name, manifest.schemes):
            continue
        if tensor.dtype != (scheme := manifest.schemes.of(name)).type:
            raise DataError(f"{file} has {name} in {tensor.dtype} where {CONFIG} says {scheme.type}: restore both")
    return weights


def _is_part(tensor: str, schemes: Schemes) -> bool:
    """Whether a tensor is a part of a quantised weight, which no scheme of its own belongs to."""
    owner, _, part = tensor.rpartition(".")
    if part not in (*PARTS, *VECTORS) or tensor in schemes.weights:
        return False
    return schemes.of(weight_of(owner) if part in VECTORS else owner).type in QUANTIZED
