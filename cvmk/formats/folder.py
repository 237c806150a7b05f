"""A model on disk: `config.json`, `model.safetensors`, `tokenizer.*`, `card.md`. Written whole or not at all, read with every check.

config.json
    format            1
    cvmk              version that wrote it
    model             the keys of ModelConfig
    vocab_size, pad_id, parameters
    tokenizer         fingerprint of the tokenizer
    languages         {"source": code, "target": code}, or null
    weights_sha256    checksum of model.safetensors; a checkpoint has null
    and whatever else the writer adds.

model.safetensors holds the state dict of CVMTransformer (shared matrices once; see Embeddings for the names):
    embeddings.source [V, d]; if untied also embeddings.target and embeddings.output
    encoder.blocks.<i>.{mixer_norm, ffn_norm}, decoder.blocks.<i>.{mixer_norm, cross_norm, ffn_norm}, encoder.norm, decoder.norm:
        weight [d] and, for LayerNorm, bias [d]
    ....mixer.qkv (rows [q; k; v]), ....mixer.out, ....cross.query, ....cross.key_value (rows [k; v]), ....cross.out,
    ....ffn.inner (for SwiGLU rows [gate; up]), ....ffn.outer: weight [out, in] and, with model.bias, bias [out]
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

import cvmk
from cvmk.config.schema import ModelConfig
from cvmk.errors import DataError
from cvmk.files import explained, read_json, sync_folder, write_bytes, write_json, write_text
from cvmk.text.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from cvmk.nn import CVMTransformer

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "card.md"
BEST = "checkpoints/best"  # in the folder of a run
_PLACES = ("", "model", BEST)
"""Where a model's files are looked for inside a folder that is given as a model."""


# -- writing --------------------------------------------------------------------------------------------------------------------
def save_model_folder(path: str | os.PathLike[str], model: CVMTransformer, tokenizer: Tokenizer, card: str, extra: dict[str, Any] | None = None) -> None:
    """Write a model's folder. `extra` goes into config.json as it is: `languages`, how it was trained.

    The files are written beside `path` and moved into place together. A model that stood there is replaced; other files
    in its folder stay. Raises DataError where it cannot be written (what stood there is then untouched), and ValueError
    where `extra` would overwrite a key or the tokenizer is not the model's.
    """
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} pieces and the model {model.vocab_size}: save the model with its own tokenizer")
    from safetensors.torch import save

    path = Path(path).absolute()
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    config = _description(model, tokenizer, hashlib.sha256(weights).hexdigest(), extra or {})
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
            write_json(temporary / CONFIG, config)
            _move_into_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def describe_model(folder: Path, model: CVMTransformer, tokenizer: Tokenizer, extra: dict[str, Any] | None = None) -> None:
    """Write what a model's folder has besides weights and card, so that a folder with `model.safetensors` becomes one."""
    tokenizer.save(folder)
    write_json(folder / CONFIG, _description(model, tokenizer, None, extra or {}))


def _description(model: CVMTransformer, tokenizer: Tokenizer, checksum: str | None, extra: dict[str, Any]) -> dict[str, Any]:
    from cvmk.nn import count_parameters

    config = {
        "format": FORMAT,
        "cvmk": cvmk.__version__,
        "model": model.config.model_dump(),
        "vocab_size": model.vocab_size,
        "pad_id": model.pad_id,
        "parameters": count_parameters(model),
        "tokenizer": tokenizer.fingerprint,
        "weights_sha256": checksum,
    }
    taken = sorted(config.keys() & extra.keys())
    if taken:
        raise ValueError(f"extra has the key {taken[0]!r}, which config.json already has: choose another name")
    return {**config, "languages": None, **extra}


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
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: name the folder of a model or of a run")
    if not path.is_dir():
        raise DataError(f"{path} is a file: name the folder of a model or of a run")
    for place in _PLACES:
        if (path / place / CONFIG).is_file():
            return path / place
    if (path / WEIGHTS).exists():
        raise DataError(f"{path / CONFIG} is missing: restore it or save the model again")
    raise DataError(f"{path} holds no model (no {CONFIG} in it, in model/ or in checkpoints/best/): name the folder of a model or of a finished run")


def read_model_config(path: str | os.PathLike[str]) -> tuple[Path, ModelConfig, dict[str, Any]]:
    """The model's folder, its ModelConfig, and the whole of config.json. Raises DataError for what is missing, corrupt or of another format."""
    folder = resolve_model_folder(path)
    file = folder / CONFIG
    info = read_json(file)
    if not isinstance(info, dict) or "format" not in info:
        raise DataError(f"{file} describes no model: restore it or save the model again")
    if info["format"] != FORMAT:
        raise DataError(f"{file} has format {info['format']!r} and this cvmk reads format {FORMAT}: use the cvmk version that wrote it ({info.get('cvmk')})")
    for key, kind in (("vocab_size", int), ("pad_id", int), ("tokenizer", str), ("model", dict)):
        if not isinstance(info.get(key), kind):
            raise DataError(f"{file} has no valid key {key!r}: restore it or save the model again")
    try:
        config = ModelConfig.model_validate(info["model"])
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{file} has a wrong model.{'.'.join(map(str, first['loc']))} ({first['msg']}): restore it or save the model again") from error
    return folder, config, info


def load_model_tokenizer(folder: Path, info: dict[str, Any]) -> Tokenizer:
    """The tokenizer in a model's folder, checked against config.json. Raises DataError where it is missing, corrupt or another one."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != info["tokenizer"]:
        raise DataError(f"the tokenizer in {folder} is not the one that the model was trained with (its fingerprint differs from {CONFIG}): restore it")
    if tokenizer.vocab_size != info["vocab_size"]:
        raise DataError(f"the tokenizer in {folder} has {tokenizer.vocab_size} pieces and {CONFIG} says vocab_size = {info['vocab_size']}: restore {CONFIG}")
    return tokenizer
