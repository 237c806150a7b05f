"""A model's folder as cvmk 0.1.0 wrote it before there was format 2, byte for byte; written without cvmk."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save

MODEL = {
    "d_model": 16, "ffn": 32, "heads": 2, "kv_heads": None, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_mixers": ["attention"], "decoder_mixers": ["attention"], "norm": "layernorm", "norm_eps": 1e-05, "positions": "sinusoidal",
    "rotary_base": 10000.0, "activation": "relu", "bias": True, "tie_embeddings": False, "dropout": 0.1, "attention_dropout": 0.0, "max_length": 40,
}  # fmt: skip
VOCABULARY = 262
MERGES = [[65, 66], [66, 67]]
"""Merges of the fallback tokenizer, whose first 260 pieces are the special ones and the bytes."""


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of MODEL."""
    d, ffn = MODEL["d_model"], MODEL["ffn"]
    assert isinstance(d, int) and isinstance(ffn, int)
    found: dict[str, tuple[int, ...]] = {f"embeddings.{side}": (VOCABULARY, d) for side in ("source", "target", "output")}

    def linear(name: str, rows: int, columns: int) -> None:
        found.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    def norm(name: str) -> None:
        found.update({f"{name}.weight": (d,), f"{name}.bias": (d,)})

    for side, blocks in (("encoder", MODEL["encoder_layers"]), ("decoder", MODEL["decoder_layers"])):
        assert isinstance(blocks, int)
        for index in range(blocks):
            block = f"{side}.blocks.{index}"
            norm(f"{block}.mixer_norm")
            linear(f"{block}.mixer.qkv", 3 * d, d)
            linear(f"{block}.mixer.out", d, d)
            if side == "decoder":
                norm(f"{block}.cross_norm")
                linear(f"{block}.cross.query", d, d)
                linear(f"{block}.cross.key_value", 2 * d, d)
                linear(f"{block}.cross.out", d, d)
            norm(f"{block}.ffn_norm")
            linear(f"{block}.ffn.inner", ffn, d)
            linear(f"{block}.ffn.outer", d, ffn)
        norm(f"{side}.norm")
    return found


def weights() -> dict[str, np.ndarray]:
    """Weights that are the same on every machine."""
    found = {}
    for name, shape in shapes().items():
        phase = sum(name.encode()) % 97
        count = math.prod(shape)
        values = np.array([((index * 7919 + phase * 104729) % 2003) / 1001 - 1 for index in range(count)], dtype=np.float32)
        found[name] = (1 + 0.1 * values if "norm.weight" in name else (20.0 if "output" in name else 0.5) * values).astype(np.float32).reshape(shape)
    return found


def write(folder: Path, *, checkpoint: bool = False) -> None:
    """The folder of a model or, with fewer files and no checksum, what makes a checkpoint's folder a model's."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save(weights())
    (folder / "model.safetensors").write_bytes(data)
    _write_json(folder / "tokenizer.json", {"format": 1, "kind": "fallback", "vocabulary": VOCABULARY, "merges": [f"{a} {b}" for a, b in MERGES]})
    if not checkpoint:
        (folder / "card.md").write_text("# A model\n", encoding="utf-8")
    _write_json(folder / "config.json", {
        "format": 1,
        "cvmk": "0.1.0",
        "model": MODEL,
        "vocab_size": VOCABULARY,
        "pad_id": 0,
        "parameters": sum(math.prod(shape) for shape in shapes().values()),
        "tokenizer": _fingerprint(),
        "weights_sha256": None if checkpoint else hashlib.sha256(data).hexdigest(),
        "languages": {"source": "en", "target": "de"},
    })  # fmt: skip


def _fingerprint() -> str:
    digest = hashlib.sha256(b"fallback")
    for left, right in MERGES:
        data = f"{left} {right}".encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
