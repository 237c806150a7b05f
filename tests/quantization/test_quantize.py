"""Folder to folder: the report, the gate, what is written and when, and every wrong input in one sentence."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cvmk.cli import main
from cvmk.errors import ConfigError, DataError
from cvmk.formats import load_model_folder, save_model_folder
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer
from cvmk.quantization import Recipe
from cvmk.quantization.gate import Gate
from cvmk.quantization.quantize import GateFailure, quantize
from cvmk.telemetry import read_events
from cvmk.telemetry.schema import QuantizationEnded, QuantizationStarted, QuantizationTrial
from cvmk.text.tokenizers import Tokenizer
from cvmk.validation.tokenization import Tokenization

Make = Callable[..., CVMTransformer]
WORDS = "a man rides horse two horses ride the on in red big small".split()


def sentences(count: int, seed: int = 1) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (4 + n % 6,), generator=generator)) for n in range(count)]


@pytest.fixture
def folder(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> Path:
    model = make_model(tokenizer.vocab_size, d_model=64, ffn=128, heads=4, seed=3, sharpness=2.0, encoder_layers=1, decoder_layers=1)
    save_model_folder(tmp_path / "model", model, tokenizer, "card", {"languages": {"source": "en", "target": "de"}})
    return tmp_path / "model"


@pytest.fixture
def texts(folder: Path) -> dict[str, list[str]]:
    """The references are what the model itself says, so that its BLEU is 100 and whatever changes costs something."""
    sources = sentences(40)
    said = [" ".join(one.text.split()) or "nothing" for one in Translator(folder, engine="native", threads=1).translate(sources)]
    return {"sources": sources, "references": said, "calibration": sentences(30, 2)}


def content(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_report_and_folder(tmp_path: Path, folder: Path, texts: dict[str, list[str]]) -> None:
    before, said = content(folder), []
    options: dict[str, Any] = {**texts, "calibration_sentences": 16, "max_drop": None, "bootstrap": 50, "say": said.append}
    report = quantize(folder, tmp_path / "deep" / "out", Recipe("w8a8", "smoothquant"), **options)
    assert content(folder) == before and said
    written = json.loads((tmp_path / "deep" / "out" / "quantization.json").read_text())
    assert written == json.loads(json.dumps(report)) and written["calibration"]["sentences"] == 16 and written["recipe"]["method"] == "smoothquant"
    assert [score["metric"] for score in written["before"]["scores"]] == ["bleu", "chrf"] and written["before"]["scores"][0]["value"] > 95
    for score in (*written["before"]["scores"], *written["after"]["scores"]):
        assert score["low"] - 1e-9 <= score["value"] <= score["high"] + 1e-9 and score["signature"]
    assert written["gate"] == {"metric": "bleu", "max_drop": None, "drop": pytest.approx(-written["paired"][0]["difference"]), "passed": True}
    assert written["before"]["tokens_per_second"] > 0 and written["after"]["tokens_per_second"] > 0
    model, _, info = load_model_folder(tmp_path / "deep" / "out")
    assert info["languages"] == {"source": "en", "target": "de"} and "w8a8 by smoothquant" in (tmp_path / "deep" / "out" / "card.md").read_text()
    tensors = load_file(tmp_path / "deep" / "out" / "model.safetensors")
    assert written["sizes"]["after"] == sum(tensor.nbytes for tensor in tensors.values()) and written["sizes"]["ratio"] < 0.32
    layers = {layer["name"]: layer for layer in written["layers"]}
    assert len(layers) == 3 + 4 + 7 and all(layer["stored"] == "int8" and layer["snr"] > 25 for layer in layers.values())
    assert layers["embeddings.source"]["bytes"] == sum(tensors[f"embeddings.source.{part}"].nbytes for part in ("values", "scales"))
    after = [one.text for one in Translator.of_weights(model, load_model_folder(folder)[1]).translate(texts["sources"])]
    changed = [one for one, other in zip(after, texts["references"], strict=True) if one != other]
    assert {one["after"] for one in written["changed"]} <= set(changed) and len(written["changed"]) == min(20, len(changed))
    assert [one["likeness"] for one in written["changed"]] == sorted(one["likeness"] for one in written["changed"])


def test_a_folder_translates_without_the_original(tmp_path: Path, folder: Path, texts: dict[str, list[str]]) -> None:
    quantize(folder, tmp_path / "out", Recipe("w4a16", "awq", 32), **texts, max_drop=None, bootstrap=50)
    for file in folder.iterdir():
        file.unlink()
    for engine in ("native", "torch"):
        assert [one.text for one in Translator(tmp_path / "out", engine=engine).translate(texts["sources"][:3])]


def test_the_most_sensitive_matrices_are_raised_until_the_gate_passes(tmp_path: Path, folder: Path, texts: dict[str, list[str]]) -> None:
    options: dict[str, Any] = {**texts, "bootstrap": 50, "max_raised": 99}
    report = quantize(folder, tmp_path / "out", Recipe("w8a8", "rtn"), **options, max_drop=0.0)
    assert report["gate"]["passed"] and report["gate"]["drop"] <= 0 and 0 < len(report["raised"]) <= 14
    assert [trial["raised"] for trial in report["trials"]] == list(range(len(report["raised"]) + 1))
    costs = {layer["name"]: layer["cost"] for layer in report["layers"]}
    assert [costs[name] for name in report["raised"]] == sorted(costs.values(), reverse=True)[: len(report["raised"])]
    stored = {layer["name"]: layer["stored"] for layer in report["layers"]}
    assert all((stored[name] == "float") == (name in report["raised"]) for name in stored)
    assert Translator(tmp_path / "out").translate(texts["sources"][:1])[0].text is not None


def test_a_bad_model_is_not_handed_over(tmp_path: Path, folder: Path, texts: dict[str, list[str]]) -> None:
    (tmp_path / "out").mkdir()
    message = r"BLEU falls by [\d.]+ with 2 of 14 matrices in a higher precision, more than 0.1 allowed, and .*out is not written"
    with pytest.raises(GateFailure, match=message) as caught:
        quantize(folder, tmp_path / "out", Recipe("w4a8", "rtn"), **texts, bootstrap=50, max_drop=0.1, max_raised=2)
    assert caught.value.exit_code == 3 and len(caught.value.report["trials"]) == 3 and not caught.value.report["gate"]["passed"]
    assert not list((tmp_path / "out").iterdir()) and sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "out"]
    kinds = {layer["stored"] for layer in caught.value.report["layers"] if layer["name"] in caught.value.report["raised"]}
    assert kinds == {"int8"}


def test_wrong_inputs(tmp_path: Path, folder: Path, texts: dict[str, list[str]]) -> None:
    def fails(kind: type[Exception], message: str, recipe: Recipe | None = None, out: Path = tmp_path / "out", model: Path = folder, **changes: Any) -> None:
        with pytest.raises(kind, match=message):
            quantize(model, out, recipe or Recipe(), **{**texts, "bootstrap": 50, "max_drop": None, **changes})

    before = content(folder)
    fails(DataError, "the calibration text is empty", calibration=["", " "])
    fails(DataError, "does not look like the language|looks like the language", calibration=["человек едет на лошади"] * 3)
    fails(DataError, "40 sources and 39 references", references=texts["references"][:-1])
    fails(DataError, "evaluation set is empty", sources=[], references=[])
    fails(ConfigError, "is the model itself", out=folder)
    fails(ConfigError, "groups of 128 do not divide", recipe=Recipe("w4a16", group_size=128))
    (tmp_path / "file").write_text("")
    fails(DataError, "it is a file", out=tmp_path / "file")
    quantize(folder, tmp_path / "q", Recipe(), **texts, bootstrap=50, max_drop=None)
    fails(ConfigError, "q is quantised already: quantise the model that it was made of", model=tmp_path / "q")
    assert content(folder) == before and not (tmp_path / "out").exists()
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.norm.weight"][0] = math.nan
    few = {"one": torch.ones(1)}
    for changed, message in ((tensors, "no finite numbers"), ({**tensors, "more": torch.ones(1)}, "unknown tensor more"), (few, "lacks the tensor")):
        save_file(changed, folder / "model.safetensors")
        config = json.loads(before["config.json"])
        (folder / "config.json").write_text(json.dumps({**config, "weights_sha256": None, "schemes": {"default": {"type": "float32"}, "weights": {}}}))
        fails(DataError, message)
    (folder / "model.safetensors").write_bytes(before["model.safetensors"][:-4])
    fails(DataError, "truncated or corrupt")


def test_gate_compares_pairs() -> None:
    class Fixed:
        def __init__(self, texts: list[str]) -> None:
            self.texts = texts

        def translate(self, sources: list[str], **options: Any) -> list[str]:
            return self.texts[: len(sources)]

    references = [f"one two three four five {index}" for index in range(30)]
    gate = Gate(references, references, Tokenization(), max_drop=1.0, samples=100)
    before = gate.evaluate(Fixed(references))  # type: ignore[arg-type]
    worse = gate.evaluate(Fixed([*references[:-2], "one two three four", "nothing of it"]))  # type: ignore[arg-type]
    found = gate.compare(before, worse)
    assert not found["gate"]["passed"] and found["gate"]["drop"] == pytest.approx(before.value - worse.value) and found["paired"][0]["differing"] == 2
    assert [one["line"] for one in found["changed"]] == [30, 29] and found["changed"][0]["before"] == references[29]
    assert gate.passes(before, before) and gate.compare(before, before)["changed"] == []


# -- the command ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def command(tmp_path: Path, folder: Path, texts: dict[str, list[str]]) -> Callable[..., list[str]]:
    for name, lines in texts.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    with gzip.open(tmp_path / "calibration.gz", "wt") as file:
        file.write("".join(f"{line}\n" for line in texts["calibration"]))

    def make(*more: str, **changes: str) -> list[str]:
        at = {"calibration": "calibration.gz", "sources": "sources", "references": "references", "out": "out", "model": "model", **changes}
        paths = {name: str(tmp_path / path) for name, path in at.items()}
        files = ["--calibrate", paths["calibration"], "--evaluate", paths["sources"], paths["references"], "-o", paths["out"], "--bootstrap", "50"]
        return ["quantize", paths["model"], *files, *more]

    return make


def test_command(tmp_path: Path, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--max-drop", "100", "--scheme", "w4a16", "--group-size", "32", "--keep", "cross")) == 0
    out, err = capsys.readouterr()
    assert "bleu" in out and "encoder.blocks.0.ffn.inner.weight" in out and "w4a16 by gptq" in out and "calibrating" in err
    written = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert written["recipe"]["keep"] == ["cross"] and not any("cross" in layer["name"] for layer in written["layers"])
    more = "--in-order", "--kv-cache", "int8", "--log", str(tmp_path / "log")
    assert main(command("--max-drop", "100", "--json", "--method", "gptq", *more, out="other")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"]["scheme"] == "w8a8" and report["recipe"]["act_order"] is False and report["recipe"]["kv_cache"] == "int8"
    ended = read_events(tmp_path / "log" / "events.jsonl")[0][-1].event
    assert isinstance(ended, QuantizationEnded) and ended.passed and ended.out == str(tmp_path / "other") and ended.report == report
    info = json.loads((tmp_path / "other" / "config.json").read_text())
    assert info["model"]["kv_cache"] == "int8" and "kv_cache:int8" in info["requires"]


def test_command_exit_codes(tmp_path: Path, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--scheme", "w4a8", "--method", "rtn", "--max-drop", "0.1", "--max-raised", "1", "--json", "--log", str(tmp_path / "log"))) == 3
    events = [record.event for record in read_events(tmp_path / "log" / "events.jsonl")[0]]
    begun, first, second, ended = events
    assert isinstance(begun, QuantizationStarted) and begun.scheme == "w4a8" and begun.sentences == 40
    assert isinstance(first, QuantizationTrial) and first.raised == [] and not first.passed and first.drop > 0.1
    assert isinstance(second, QuantizationTrial) and len(second.raised) == 1
    assert isinstance(ended, QuantizationEnded) and ended.out is None and not ended.passed and ended.report["raised"] == second.raised
    out, err = capsys.readouterr()
    assert json.loads(out)["gate"]["passed"] is False and "more than 0.1 allowed" in err and not (tmp_path / "out").exists()
    assert main(command("--scheme", "w8a8", "--method", "awq")) == 2
    assert main(command(calibration="nowhere")) == 5
    (tmp_path / "short").write_text("one\n")
    assert main(command(references="short")) == 5
    (tmp_path / "empty").write_text("\n\n")
    assert main(command(calibration="empty")) == 5
    err = capsys.readouterr().err
    assert "awq chooses" in err and "nowhere" in err and "has 1: the two files must be aligned" in err and "empty is empty: give sentences" in err
    assert not (tmp_path / "out").exists()
