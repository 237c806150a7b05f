"""Folders of format 1 are read as they were, and a newer or demanding folder is refused by what it asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import version1

from cvmk.errors import DataError
from cvmk.formats import load_model_folder, read_model_manifest, read_model_weights, save_model_folder
from cvmk.inference import Translator

TEXTS = ["a man", "Two horses ride."]
FOUND = [[24, 16, 16, 16, 16, 16, 16, 16, 16], [24, 16, 16, 16, 24, 24, 16, 16, 16, 16, 24, 24, 16, 16]]
SCORES = [-9.7515, -6.0604]
"""Translations of TEXTS by the cvmk that wrote format 1."""


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_folder_of_format_1_translates_as_it_did(tmp_path: Path, beam_size: int) -> None:
    version1.write(tmp_path)
    found = Translator(tmp_path).translate(TEXTS, beam_size=beam_size, max_length_a=0.5, max_length_b=6)
    assert [translation.tokens for translation in found] == FOUND
    assert [translation.score for translation in found] == pytest.approx(SCORES, abs=2e-4)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_weights_and_manifest_of_format_1(tmp_path: Path, checkpoint: bool) -> None:
    version1.write(tmp_path, checkpoint=checkpoint)
    folder, manifest, info = read_model_manifest(tmp_path)
    assert (manifest.format, manifest.requires, manifest.schemes, manifest.vocab_size) == (1, (), None, version1.VOCABULARY)
    assert info["languages"] == {"source": "en", "target": "de"} and (manifest.weights_sha256 is None) == checkpoint
    raw, (model, tokenizer, _) = read_model_weights(folder, manifest), load_model_folder(tmp_path)
    state = model.state_dict()
    for name, array in version1.weights().items():
        assert (raw[name].data == array).all() and torch.equal(state.pop(name), torch.from_numpy(array))
    assert not state and tokenizer.decode(tokenizer.encode("=>?")) == "=>?"


def test_a_folder_of_format_1_is_saved_in_the_present_format(tmp_path: Path) -> None:
    version1.write(tmp_path / "old")
    model, tokenizer, info = load_model_folder(tmp_path / "old")
    save_model_folder(tmp_path / "new", model, tokenizer, "", {"languages": info["languages"]})
    _, manifest, _ = read_model_manifest(tmp_path / "new")
    assert manifest.format == 2 and manifest.schemes is not None and manifest.schemes.default.type == "float32" and not manifest.schemes.weights
    assert [t.tokens for t in Translator(tmp_path / "new").translate(TEXTS, max_length_a=0.5, max_length_b=6)] == FOUND


def test_a_damaged_folder_of_format_1(tmp_path: Path) -> None:
    version1.write(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="checksum"):
        load_model_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": {**config["model"], "encoder_mixers": ["mamba9"]}}))
    with pytest.raises(DataError, match=r"config\.json has a wrong model\.encoder_mixers\.0"):
        load_model_folder(tmp_path)
