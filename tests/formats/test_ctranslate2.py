"""The export to CTranslate2: the same pieces and log-probabilities, 8-bit weights as they are, and a refusal with its reason for what it cannot represent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import save

from cvmk.cli import main
from cvmk.errors import ConfigError, DataError
from cvmk.formats import load_model_folder, read_model_manifest
from cvmk.formats.ctranslate2 import export_ctranslate2, refusals, specification
from cvmk.inference.ctranslate2_runner import CTranslate2Runner
from cvmk.inference.export_check import compare
from cvmk.nn import CVMTransformer
from cvmk.quantization import Recipe
from cvmk.text.tokenizers import Tokenizer

pytest.importorskip("ctranslate2")
Make = Callable[..., CVMTransformer]
TEXTS = ["a man rides a horse", "two horses ride", "a man", "two men ride a horse", "horse a two rides man a"] * 4
MODELS: dict[str, dict[str, Any]] = {
    "tied, relu": {"tie_embeddings": True},
    "gelu": {"activation": "gelu"},
    "rotary, rms norm, gates": {"positions": "rotary", "norm": "rmsnorm", "kv_heads": 2, "activation": "swiglu", "bias": False, "decoder_layers": 1},
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_translations(tmp_path: Path, make_model: Make, tokenizer: Tokenizer, kind: str) -> None:
    folder = save(tmp_path / "m", make_model, tokenizer, **MODELS[kind])
    export_ctranslate2(folder, tmp_path / "out" / "ct2")
    found = compare(folder, CTranslate2Runner(tmp_path / "out" / "ct2", tokenizer.pieces), TEXTS)
    assert found["sentences"] == found["identical"] == 20 and found["differing"] == []
    assert found["largest"] is None or found["largest"] < 1e-4
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["ct2"]
    export_ctranslate2(folder, tmp_path / "out" / "ct2")  # one of its kind is replaced


def test_eight_bits_are_handed_over(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    folder = save(tmp_path / "m", make_model, tokenizer, Recipe("w8a8", "gptq"), tie_embeddings=True)
    model, _, _ = load_model_folder(folder)
    tensors, spec = model.state_dict(), specification(model, tokenizer.pieces)
    layer = spec.decoder.layer[1].attention.linear[1]
    name = "decoder.blocks.1.cross.key_value.weight"
    assert layer.weight.numpy().dtype == "int8" and (torch.from_numpy(layer.weight.numpy()) == tensors[f"{name}.values"]).all()
    assert torch.allclose(1 / torch.from_numpy(layer.weight_scale.numpy()), tensors[f"{name}.scales"])
    export_ctranslate2(folder, tmp_path / "ct2")
    whole = save(tmp_path / "whole", make_model, tokenizer, tie_embeddings=True)
    export_ctranslate2(whole, tmp_path / "float")
    assert (tmp_path / "ct2" / "model.bin").stat().st_size < 0.4 * (tmp_path / "float" / "model.bin").stat().st_size
    assert compare(folder, CTranslate2Runner(tmp_path / "ct2", tokenizer.pieces), TEXTS)["identical"] >= 10


def test_refusals(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    cases: list[tuple[dict[str, Any], Recipe | None, str]] = [
        ({"encoder_direction": "causal"}, None, "its encoder is causal"), ({"positions": "none"}, None, "it has no positions"),
        ({}, Recipe("w4a16"), "4-bit weights, which CTranslate2 does not have"),
        ({}, Recipe("w8a8", static=True), "its inputs are rounded by static scales"),
        ({"kv_cache": "int8"}, None, "keeps keys and values in bytes"),
    ]  # fmt: skip
    for number, (options, recipe, message) in enumerate(cases):
        folder = save(tmp_path / f"m{number}", make_model, tokenizer, recipe, **options)
        assert len(refusals(read_model_manifest(folder)[1])) == 1
        with pytest.raises(ConfigError, match=message):
            export_ctranslate2(folder, tmp_path / "out")
    folder = save(tmp_path / "m", make_model, tokenizer)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(DataError, match="no model of CTranslate2"):
        export_ctranslate2(folder, tmp_path / "other")
    assert (tmp_path / "other" / "file").read_text() == "mine" and not (tmp_path / "out").exists()


def test_command(tmp_path: Path, make_model: Make, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "m", make_model, tokenizer, tie_embeddings=True)
    (tmp_path / "in").write_text("".join(f"{text}\n" for text in TEXTS))
    command = ["export", str(folder), "--to", "ctranslate2", "-o", str(tmp_path / "out")]
    assert main([*command, "--verify", "5", "--source", str(tmp_path / "in")]) == 0
    assert "5 of 5 sentences have the same pieces" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["identical"] == 5
    assert main([*command, "--verify", "5"]) == 2 and "go together" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), *command[2:]]) == 5
