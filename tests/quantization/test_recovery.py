"""Recovery: what is trained computes with the integers that the folder holds, what is best on held-out text is kept, and nothing half-written is left."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from cvmk.cli import main
from cvmk.errors import ConfigError, DataError
from cvmk.formats import load_model_folder, save_model_folder
from cvmk.formats.quantized_weights import quantized_layers
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer
from cvmk.quantization import Quantized, Recipe, quantize_model
from cvmk.quantization.calibration import Pair
from cvmk.quantization.quantize import GateFailure, quantize
from cvmk.quantization.straight_through import quantized_again, trainable
from cvmk.text.tokenizers import Tokenizer
from cvmk.training.recovery import Recovery
from cvmk.training.step import TrainingStep

Make = Callable[..., CVMTransformer]
SIZES: dict[str, Any] = {"d_model": 64, "ffn": 128, "heads": 4, "seed": 3, "encoder_layers": 1, "decoder_layers": 1}
KINDS: dict[str, tuple[dict[str, Any], Recipe]] = {
    "w8a8, tied": ({"tie_embeddings": True, "dropout": 0.1}, Recipe("w8a8", "rtn")),
    "w8a8, static": ({"activation": "gelu"}, Recipe("w8a8", "gptq", static=True)),
    "w8a8, scales that stay": ({"activation": "gelu"}, Recipe("w8a8", "smoothquant")),
    "w4a16, zeros and order": ({}, Recipe("w4a16", "gptq", 32, static_groups=False)),
    "w4a16, kept parts": ({"activation": "swiglu", "norm": "rmsnorm"}, Recipe("w4a16", "awq", keep=("output", "cross"))),
    "w4a8": ({"tie_embeddings": True}, Recipe("w4a8", "gptq")),
}
WORDS = "a man rides horse two horses ride the on in red big small".split()


def ids(count: int = 24, seed: int = 5) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(4, 100, (2 + (index + side) % 7,), generator=generator).tolist() for side in (0, 1)) for index in range(count)]  # type: ignore[misc]


def quantized_of(make_model: Make, kind: str) -> Quantized:
    options, recipe = KINDS[kind]
    model = make_model(100, **SIZES, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "blocks" in name:
                parameter.mul_(0.4)  # so that errors do not grow from layer to layer
    return quantize_model(model, recipe, ids())


def logits(model: CVMTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        return model(torch.randint(4, 100, (4, 9), generator=generator), torch.randint(4, 100, (4, 7), generator=generator))[0]


def rounded(model: CVMTransformer, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), leaf).detach()
    return found


def wide(model: CVMTransformer) -> CVMTransformer:
    """In float64, where floats that lie between two values of a grid must not round to another one than in float32."""
    found = copy.deepcopy(model)
    for module in list(found.modules()):
        for name, holder in getattr(module, "parametrizations", {}).items():
            holder.original.data.copy_(getattr(module, name).detach())
    return found.double()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_the_folder_holds(make_model: Make, kind: str) -> None:
    """At the start and after some steps every matrix has exactly the numbers of the quantised layer, and the models say the same."""
    quantized = quantized_of(make_model, kind)
    before, student = quantized.build(), trainable(quantized)
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    for _ in range(4):
        again = quantized_again(quantized, student, ids())
        built = again.build()
        layers = quantized_layers(built)
        assert set(layers) == set(quantized.names)
        for name, layer in layers.items():
            assert torch.equal(rounded(student, name), layer.weight.dequantize()), name
        ours, theirs = (logits(wide(model)) for model in (student, built))  # in float32 an input between two steps goes either way
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        target = torch.randn(4, 7, 100, generator=torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        ((student(torch.randint(4, 100, (4, 9)), torch.randint(4, 100, (4, 7)))[0] - target).square().mean()).backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for name, parameter in student.named_parameters())
        optimizer.step()
    for name, layer in quantized_layers(before).items():
        first, last = layer.weight.tensors(), layers[name].weight.tensors()
        assert all(torch.equal(first[part], last[part]) for part in first if part != "values")
        assert not torch.equal(first["values"], last["values"]), name
    start = quantized_again(quantized, trainable(quantized), ids())
    assert torch.equal(logits(start.build()), logits(before))
    ratios = [[layer.snr for layer in one.layers(one.build())] for one in (start, quantized)]
    assert ratios[0] == pytest.approx(ratios[1], abs=1e-3)
    assert student.config.dropout == 0.0 and built.config == quantized.model.config
    raised = again.build({quantized.names[-1]})
    assert torch.equal(logits(raised), logits(again.build({quantized.names[-1]}))) and len(quantized_layers(raised)) >= len(layers) - 1


def test_gradient_goes_straight_through(make_model: Make) -> None:
    """That of the floats is that of the matrix where the rounded one stands, everywhere."""
    quantized = quantized_of(make_model, "w4a16, zeros and order")
    student, plain = trainable(quantized), quantized_of(make_model, "w4a16, zeros and order").model
    with torch.no_grad():
        for name in quantized.names:
            plain.get_parameter(name).copy_(rounded(student, name))
    source, target = torch.randint(4, 100, (3, 5)), torch.randint(4, 100, (3, 4))
    for model in (student, plain):
        model.zero_grad()
        with parametrize.cached():
            model(source, target)[0].square().mean().backward()
    for name in quantized.names:
        path, _, leaf = name.rpartition(".")
        holder: Any = student.get_submodule(path).parametrizations
        ours, theirs = holder[leaf].original.grad, plain.get_parameter(name).grad
        assert theirs is not None and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max())), name


# -- the training ------------------------------------------------------------------------------------------------------------------
def sentences(count: int, seed: int = 1) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (4 + n % 6,), generator=generator)) for n in range(count)]


@pytest.fixture
def folder(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> Path:
    model = make_model(tokenizer.vocab_size, **{**SIZES, "sharpness": 2.0})
    save_model_folder(tmp_path / "model", model, tokenizer, "card", {"languages": {"source": "en", "target": "de"}})
    return tmp_path / "model"


@pytest.fixture
def texts(folder: Path) -> dict[str, list[str]]:
    sources = sentences(40)
    said = [" ".join(one.text.split()) or "nothing" for one in Translator(folder, threads=1).translate(sources)]
    return {"sources": sources, "references": said, "calibration": sentences(60, 2)}


def recovered(folder: Path, recovery: Recovery, calibration: list[str]) -> tuple[Quantized, Quantized, dict[str, Any], list[str]]:
    model, tokenizer, _ = load_model_folder(folder)
    translator, said = Translator.of_weights(model, tokenizer), list[str]()
    pairs = [(tokenizer.encode(text), one.tokens) for text, one in zip(calibration[:16], translator.translate(calibration[:16]), strict=True)]
    quantized = quantize_model(model, Recipe("w4a8", "rtn"), pairs)
    return quantized, *recovery(quantized, translator, calibration, pairs, said.append), said


def values(quantized: Quantized) -> list[Tensor]:
    return [layer.weight.tensors()["values"] for layer in quantized_layers(quantized.build()).values()]


def test_recovery_by_calibration_text(folder: Path) -> None:
    """It comes nearer to the teacher on held-out text, the same way every time, and the best of all validations is what is handed over."""
    calibration = sentences(200, 2)
    before, after, facts, said = recovered(folder, Recovery(40, 15, learning_rate=2e-3, max_tokens=256), calibration)
    assert [one["step"] for one in facts["history"]] == [0, 15, 30, 40] and len(said) == 4
    divergence = {one["step"]: one["divergence"] for one in facts["history"]}
    assert divergence[facts["best"]] == min(divergence.values()) < 0.9 * divergence[0]
    assert facts["pairs"] + facts["held_out"] == 200 and facts["held_out"] == 20 and facts["text"] == "calibration"
    again = recovered(folder, Recovery(40, 15, learning_rate=2e-3, max_tokens=256), calibration)[1]
    other = recovered(folder, Recovery(40, 15, learning_rate=2e-3, max_tokens=256, seed=1), calibration)[1]
    assert all(torch.equal(one, two) for one, two in zip(values(after), values(again), strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(values(after), values(other), strict=True))
    assert torch.equal(before.model.encoder.norm.weight, load_model_folder(folder)[0].encoder.norm.weight)
    assert not torch.equal(after.model.encoder.norm.weight, before.model.encoder.norm.weight)


def test_a_recovery_that_makes_it_worse_is_not_kept(folder: Path) -> None:
    before, after, facts, _ = recovered(folder, Recovery(4, 2, learning_rate=5.0), sentences(30, 2))
    assert facts["best"] == 0 and len(facts["history"]) == 3
    assert all(torch.equal(one, two) for one, two in zip(values(before), values(after), strict=True))
    assert all(torch.equal(one, after.model.state_dict()[name]) for name, one in before.model.state_dict().items())


def test_recovery_ends_where_the_loss_is_not_finite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TrainingStep._losses

    def broken(self: TrainingStep, *given: Any) -> Any:
        losses = whole(self, *given)
        return type(losses)(losses.total * float("nan"), {name: part * float("nan") for name, part in losses.parts.items()})

    monkeypatch.setattr(TrainingStep, "_losses", broken)
    before, after, facts, said = recovered(folder, Recovery(4, 2), sentences(30, 2))
    assert facts["best"] == 0 and "not finite in step 1" in said[-1]
    assert all(torch.equal(one, two) for one, two in zip(values(before), values(after), strict=True))


def test_what_does_not_go(folder: Path) -> None:
    for options, kind, message in (
        ({"steps": 0}, ConfigError, "steps of the recovery is 0"), ({"steps": 1, "learning_rate": 0.0}, ConfigError, "learning_rate of the recovery is 0"),
        ({"steps": 1, "pairs": (["a"], [])}, DataError, "1 sources and 0 translations"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            Recovery(**options)  # type: ignore[arg-type]
    calibration = sentences(30, 2)
    said = [one.text for one in Translator(folder, threads=1).translate(calibration)]
    with pytest.raises(DataError, match="the text to train on looks like the language that the model writes"):
        recovered(folder, Recovery(1, pairs=(said, calibration)), calibration)
    with pytest.raises(DataError, match="needs two pairs at least"):
        recovered(folder, Recovery(1, pairs=(calibration[:1], said[:1])), calibration)


# -- folder to folder, and the command ------------------------------------------------------------------------------------------------
def test_the_gate_judges_what_was_recovered(tmp_path: Path, folder: Path, texts: dict[str, list[str]]) -> None:
    options: dict[str, Any] = {**texts, "bootstrap": 50, "calibration_sentences": 16}
    recovery = Recovery(30, 10, (texts["sources"], texts["references"]), learning_rate=2e-3)
    report = quantize(folder, tmp_path / "out", Recipe("w4a8", "rtn"), **options, max_drop=None, recover=recovery)
    written = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert written == json.loads(json.dumps(report)) and written["recovery"]["text"] == "pairs" and written["recovery"]["best"] in (10, 20, 30)
    assert written["recovery"]["unrecovered"] < written["after"]["scores"][0]["value"] == written["trials"][0]["value"]
    model, tokenizer, _ = load_model_folder(tmp_path / "out")
    said = [one.text for one in Translator.of_weights(model, tokenizer).translate(texts["sources"])]
    assert {one["after"] for one in written["changed"]} <= set(said) and "Then it learned for" in (tmp_path / "out" / "card.md").read_text()
    with pytest.raises(GateFailure) as caught:
        quantize(folder, tmp_path / "no", Recipe("w4a8", "rtn"), **options, max_drop=-100, max_raised=0, recover=Recovery(2, 1))
    assert caught.value.report["recovery"]["steps"] == 2 and not (tmp_path / "no").exists()


def test_command(
    tmp_path: Path, folder: Path, texts: dict[str, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, lines in texts.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    paths = {name: str(tmp_path / name) for name in (*texts, "out", "model")}
    start = ["quantize", paths["model"], "--scheme", "w4a8", "--calibrate", paths["calibration"], "--evaluate", paths["sources"], paths["references"]]
    start += ["-o", paths["out"], "--bootstrap", "50", "--max-drop", "100"]
    assert main([*start, "--train", paths["sources"], paths["references"]]) == 2
    assert main([*start, "--recover", "2", "--train", paths["sources"], paths["calibration"]]) == 5
    assert main([*start, "--recover", "2", "--recover-rate", "0"]) == 2
    err = capsys.readouterr().err
    assert "give --recover STEPS too" in err and "sources has 40 lines but" in err and "learning_rate of the recovery is 0" in err
    whole, steps = TrainingStep.__call__, []

    def stopped(self: TrainingStep, *given: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return whole(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", stopped)
        assert main([*start, "--recover", "5", "--recover-every", "2"]) == 130
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*texts, "model"]), "nothing half-written is left"
    capsys.readouterr()
    assert main([*start, "--recover", "4", "--recover-every", "2", "--train", paths["sources"], paths["references"], "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert "divergence on held-out text" in out and "recovering: 4 steps on 36 pairs, validated on 4" in err
    written = json.loads((tmp_path / "out" / "quantization.json").read_text())["recovery"]
    assert written["seed"] == 3 and [one["step"] for one in written["history"]] == [0, 2, 4]
