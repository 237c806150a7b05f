"""`cvmk export`: what each format writes and says, and options that do not go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import make_model, tokenizer

from cvmk.cli import main
from cvmk.formats import save_model_folder
from cvmk.nn import CVMTransformer
from cvmk.text.tokenizers import Tokenizer

__all__ = ["make_model", "tokenizer"]
TEXTS = ["a man rides a horse", "two horses ride", "", "a man", "two men ride a horse"]


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., CVMTransformer], tokenizer: Tokenizer) -> Path:
    save_model_folder(tmp_path / "m", make_model(tokenizer.vocab_size, seed=3), tokenizer, "card")
    (tmp_path / "in").write_text("".join(f"{text}\n" for text in TEXTS))
    return tmp_path / "m"


@pytest.mark.parametrize(("kind", "said"), [("onnx", "a model in ONNX"), ("safetensors", "a model in plain floats")])
def test_verified(folder: Path, capsys: pytest.CaptureFixture[str], kind: str, said: str) -> None:
    out, text = folder.parent / "out", str(folder.parent / "in")
    command = ["export", str(folder), "--to", kind, "-o", str(out), "--verify", "3"]
    assert main([*command, "--source", text]) == 0
    assert f"{out}: {said}; 3 of 3 sentences have the same pieces" in capsys.readouterr().out
    found = json.loads((out / "verify.json").read_text())
    assert found["identical"] == found["sentences"] == 3 and found["differing"] == []
    assert main([*command, "--text", text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] == 3
    assert main(command[:-2]) == 0 and not (out / "verify.json").exists()  # it was of the model before


def test_eight_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = folder.parent / "out", str(folder.parent / "in")
    command = ["export", str(folder), "--to", "onnx", "-o", str(out), "--quantize"]
    assert main([*command, "static", "--calibrate", text, "--calibration-sentences", "3", "--verify", "5", "--source", text]) == 0
    assert "of 4 sentences have the same pieces" in capsys.readouterr().out and json.loads((out / "config.json").read_text())["quantization"] == "static"
    assert main([*command, "dynamic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(out)}


def test_wrong_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = folder.parent / "out", str(folder.parent / "in")
    cases = [
        (["onnx", "--verify", "3"], "--verify N and --source FILE go together"),
        (["onnx", "--quantize", "static"], "--quantize static and --calibrate FILE go together"),
        (["onnx", "--quantize", "dynamic", "--calibrate", text], "--quantize static and --calibrate FILE go together"),
        (["onnx", "--quantize", "dynamic", "--calibration-sentences", "3"], "--calibration-sentences goes with --calibrate"),
        (["onnx", "--dtype", "float16"], "--dtype goes with --to safetensors"),
        (["safetensors", "--quantize", "dynamic"], "--quantize goes with --to onnx"),
    ]
    for arguments, message in cases:
        assert main(["export", str(folder), "-o", str(out), "--to", *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["export", str(folder), "-o", str(out), "--to", "tensorflow"])
    assert caught.value.code == 2
    for kind in ("onnx", "safetensors"):
        assert main(["export", str(folder.parent / "nowhere"), "-o", str(out), "--to", kind]) == 5
        assert "does not exist" in capsys.readouterr().err
    assert not out.exists()
