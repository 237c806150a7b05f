from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cvmk
from cvmk.config.schema import ModelConfig
from cvmk.errors import DataError
from cvmk.formats import Manifest, Scheme, Schemes, load_model_folder, read_model_manifest, save_model_folder
from cvmk.formats import manifest as module
from cvmk.formats.manifest import read_manifest

FLOAT32, BFLOAT16 = Scheme("float32"), Scheme("bfloat16")


def make(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "model": ModelConfig(d_model=16, heads=2), "vocab_size": 30, "pad_id": 0, "parameters": 5, "tokenizer": "f00", "schemes": Schemes(FLOAT32),
    }  # fmt: skip
    return Manifest(**{**values, **changes})


def written(path: Path, **changes: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps({key: value for key, value in {**make().to_dict(), **changes}.items() if value is not None}))
    return file


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    manifest = make(schemes=Schemes(BFLOAT16, {"encoder.norm.weight": FLOAT32}), extra={"languages": {"source": "en", "target": "de"}, "steps": 7})
    (tmp_path / "config.json").write_text(json.dumps(manifest.to_dict()))
    found, info = read_manifest(tmp_path / "config.json")
    assert info == manifest.to_dict() and found.to_dict() == info and info["format"] == 2 and info["cvmk"] == cvmk.__version__
    assert found.extra == manifest.extra and found.model == manifest.model and found.requires == ("scheme:bfloat16",)
    assert found.schemes is not None and found.schemes.of("encoder.norm.weight") == FLOAT32 and found.schemes.of("other") == BFLOAT16


def test_only_what_an_old_reader_would_misread_is_required() -> None:
    assert make().to_dict()["requires"] == []
    assert make(schemes=Schemes(FLOAT32, {"x": BFLOAT16})).to_dict()["requires"] == ["scheme:bfloat16"]
    assert make(requires=("future",)).to_dict()["requires"] == ["future"]
    model = ModelConfig.model_construct(**{**ModelConfig().model_dump(), "decoder_mixers": ["attention", "mamba"]})
    assert make(model=model).to_dict()["requires"] == ["mixer:mamba"]
    assert make(model=ModelConfig(positions="rotary")).to_dict()["requires"] == []
    assert make(model=ModelConfig(encoder_direction="causal", positions="none")).to_dict()["requires"] == ["encoder:causal", "positions:none"]


@pytest.mark.parametrize("requires", [["mixer:retnet9"], ["scheme:int3", "mixer:retnet9"]])
def test_an_unknown_requirement_is_refused_by_name_with_the_remedy(tmp_path: Path, requires: list[str]) -> None:
    """It is told before anything else that a later version may have written differently."""
    file = written(tmp_path, requires=requires, cvmk="7.0", model={"encoder_mixers": ["retnet9"]}, schemes={"default": {"type": "int3"}})
    with pytest.raises(DataError) as caught:
        read_manifest(file)
    names = " and ".join(map(repr, requires))
    assert str(caught.value) == (
        f"{file} requires {names}, which this cvmk ({cvmk.__version__}) does not know: use the cvmk version that wrote it (7.0) or a later one"
    )


def test_every_known_feature_may_be_required(tmp_path: Path) -> None:
    assert read_manifest(written(tmp_path, requires=sorted(module.known_features())))[0].format == 2


@pytest.mark.parametrize("format", [3, 0, -1, "2", True, 2.0, [2]])
def test_another_format_is_one_sentence(tmp_path: Path, format: Any) -> None:
    with pytest.raises(DataError, match=r"has format .* reads formats 1 and 2: use the cvmk version that wrote it \(7\.0\) or a later one$"):
        read_manifest(written(tmp_path, format=format, cvmk="7.0"))


@pytest.mark.parametrize(("key", "value"), [
    ("requires", None), ("requires", "scheme:float32"), ("requires", [3]), ("schemes", None), ("schemes", {}), ("schemes", {"default": {"type": "float32"}}),
    ("schemes", {"default": "float32", "weights": {}}), ("schemes", {"default": {"type": "int3"}, "weights": {}}),
    ("schemes", {"default": {"type": "float32", "group": 3}, "weights": {}}), ("schemes", {"default": {"type": "float32"}, "weights": {"x": {}}}),
    ("vocab_size", True), ("vocab_size", 0), ("vocab_size", 2.0), ("pad_id", -1), ("pad_id", 30), ("tokenizer", 3), ("model", []), ("weights_sha256", 3),
])  # fmt: skip
def test_a_wrong_key_is_named(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"config\.json has no valid key '{key}'.*: restore it or save the model again$"):
        read_manifest(written(tmp_path, **{key: value}))


def test_extra_must_not_hide_a_key() -> None:
    for key in ("format", "requires", "schemes", "vocab_size"):
        with pytest.raises(ValueError, match=key):
            make(extra={key: 1}).to_dict()


def test_the_commonest_scheme_is_the_default() -> None:
    found = Schemes.of_weights({"a": FLOAT32, "b": BFLOAT16, "c": BFLOAT16})
    assert found == Schemes(BFLOAT16, {"a": FLOAT32})
    with pytest.raises(ValueError, match="at least one"):
        Schemes.of_weights({})


def test_weights_of_several_dtypes(tmp_path: Path, make_model, tokenizer) -> None:
    """Each is stored as it is, the manifest says how, and the model holds them all without rounding."""
    model = make_model(tokenizer.vocab_size).bfloat16()
    model.encoder.norm.float()
    with torch.no_grad():
        model.encoder.norm.weight.add_(1e-6)
    save_model_folder(tmp_path, model, tokenizer, "")
    _, manifest, info = read_model_manifest(tmp_path)
    assert info["schemes"] == {"default": {"type": "bfloat16"}, "weights": {f"encoder.norm.{part}": {"type": "float32"} for part in ("weight", "bias")}}
    assert info["requires"] == ["scheme:bfloat16"] and manifest.weights_sha256 == info["weights_sha256"]
    loaded = load_model_folder(tmp_path)[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], tensor.float())


def test_weights_that_are_not_what_the_manifest_says(tmp_path: Path, make_model, tokenizer) -> None:
    save_model_folder(tmp_path, make_model(tokenizer.vocab_size).bfloat16(), tokenizer, "")
    info = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**info, "schemes": {"default": {"type": "float32"}, "weights": {}}}))
    with pytest.raises(DataError, match=r"model\.safetensors has .* in bfloat16 where config\.json says float32: restore both"):
        load_model_folder(tmp_path)


def test_a_model_is_read_without_torch(tmp_path: Path, make_model, tokenizer) -> None:
    """Manifest, tokenizer and weights, bfloat16 among them, in a process that never imports torch."""
    model = make_model(tokenizer.vocab_size).bfloat16()
    save_model_folder(tmp_path, model, tokenizer, "")
    code = f"""
import sys
from cvmk import formats
folder, manifest, info = formats.read_model_manifest({str(tmp_path)!r})
tokenizer = formats.load_model_tokenizer(folder, manifest)
weights = formats.read_model_weights(folder, manifest)
print(len(weights), tokenizer.vocab_size, float(weights["encoder.norm.weight"].float32().sum()), "torch" in sys.modules)
"""
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert seen[:2] == [str(len(model.state_dict())), str(tokenizer.vocab_size)] and seen[3] == "False"
    assert float(seen[2]) == pytest.approx(model.encoder.norm.weight.float().sum().item(), abs=1e-5)
