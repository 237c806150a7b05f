"""The export to plain floats: read without cvmk, the same model, and nothing lost on the way but what the dtype rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cvmk.errors import ConfigError, DataError
from cvmk.formats import load_model_folder, save_model_folder
from cvmk.formats.plain import export_plain
from cvmk.formats.quantized_weights import replace_layer
from cvmk.nn import CVMTransformer
from cvmk.ops import quantize_int8
from cvmk.quantization import Recipe, quantize_model
from cvmk.text.tokenizers import Tokenizer

Make = Callable[..., CVMTransformer]
SOURCE, TARGET = torch.tensor([[5, 6, 7, 3], [8, 3, 0, 0]]), torch.tensor([[2, 5, 9], [2, 7, 0]])


def test_a_quantised_model_in_floats(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    whole = make_model(tokenizer.vocab_size, d_model=64, ffn=128, heads=4, tie_embeddings=True)
    model = quantize_model(whole, Recipe("w4a16", "gptq", 32), [([4, 5, 6], [7, 8]), ([9, 10], [11])]).build()
    save_model_folder(tmp_path / "m", model, tokenizer, "our card", {"languages": {"source": "en", "target": "de"}})
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    export_plain(tmp_path / "m", tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    info = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32} and tensors.keys() == whole.state_dict().keys()
    assert info["languages"] == {"source": "en", "target": "de"} and info["schemes"] == {"default": {"type": "float32"}, "weights": {}}
    assert "scheme:int4" not in info["requires"] and (tmp_path / "out" / "card.md").read_text() == "our card"
    weight = model.get_submodule("encoder.blocks.0.ffn.inner").weight
    assert torch.equal(tensors["encoder.blocks.0.ffn.inner.weight"], weight.dequantize())
    plain, read, _ = load_model_folder(tmp_path / "out")
    assert read.fingerprint == tokenizer.fingerprint
    with torch.no_grad():
        assert torch.allclose(plain(SOURCE, TARGET)[0], model(SOURCE, TARGET)[0], atol=1e-4)
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before


def test_smoothing_scales_go_into_the_weights(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    model, name, scale = make_model(tokenizer.vocab_size), "decoder.blocks.1.ffn.outer.weight", torch.linspace(0.5, 2, 32)
    before = model.get_submodule(name.removesuffix(".weight")).weight.detach().clone()
    replace_layer(model, name, quantize_int8(before * scale), smooth_scale=scale)
    save_model_folder(tmp_path / "m", model, tokenizer, "")
    for dtype, eps in (("float32", 2.0**-24), ("bfloat16", 2.0**-8), ("float16", 2.0**-11)):
        export_plain(tmp_path / "m", tmp_path / "out", dtype)
        tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
        law = quantize_int8(before * scale).dequantize(torch.float64) / scale.double()
        assert str(tensors[name].dtype) == f"torch.{dtype}" and ((tensors[name].double() - law).abs() <= eps * law.abs() + 1e-7).all()
        load_model_folder(tmp_path / "out")


def test_refusals(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model(tokenizer.vocab_size)
    with torch.no_grad():
        model.encoder.norm.bias[0] = 1e6
    save_model_folder(tmp_path / "m", model, tokenizer, "")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is the model itself"):
        export_plain(tmp_path / "m", tmp_path / "m")
    with pytest.raises(DataError, match="no model; name another folder"):
        export_plain(tmp_path / "m", tmp_path / "other")
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        export_plain(tmp_path / "m", tmp_path / "out", "int8")
    with pytest.raises(ConfigError, match=r"values in encoder.norm.bias that are beyond float16"):
        export_plain(tmp_path / "m", tmp_path / "out", "float16")
    with pytest.raises(DataError, match="does not exist"):
        export_plain(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists() and [entry.name for entry in (tmp_path / "other").iterdir()] == ["file"]
