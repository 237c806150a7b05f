"""Static activation scales: how their range is found, what goes beyond it saturates, and a folder of such a model in both engines and from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cvmk import ops
from cvmk.cli import main
from cvmk.errors import ConfigError
from cvmk.formats import load_model_folder, save_model_folder
from cvmk.formats.quantized_weights import quantized_layers
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer
from cvmk.quantization import Grid, InputStatistics, Recipe, collect, quantize_model, smoothquant
from cvmk.quantization.calibration import Half
from cvmk.quantization.model import signal_to_noise
from cvmk.quantization.sites import matrix, sites
from cvmk.quantization.static_range import SHARES, input_range
from cvmk.text.tokenizers import Tokenizer

Make = Callable[..., CVMTransformer]
SIZES: dict[str, Any] = {"d_model": 64, "ffn": 128, "heads": 4, "seed": 3, "sharpness": 2.0, "encoder_layers": 1, "decoder_layers": 1}
K = 48


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(x: Tensor) -> InputStatistics:
    """As if every row were a sentence."""
    wide = x.double()
    one, other = (Half(rows.double().abs().amax(0), rows) if len(rows) else Half(torch.zeros(x.shape[1]).double(), rows) for rows in (x[::2], x[1::2]))
    return InputStatistics(len(x), wide.abs().amax(0), wide.abs().mean(0), wide.T @ wide / len(x), x, (one, other))


def error_of(weight: Tensor, rounded: Tensor, x: Tensor, span: float) -> float:
    """By the formula, in float64."""
    step = span / 127
    seen = (x.double() / step).round().clamp(-127, 127) * step
    return float((seen @ rounded.double().T - x.double() @ weight.double().T).square().sum())


@pytest.mark.parametrize("kind", ["even", "an outlier"])
def test_the_range_is_the_best_share_on_sentences_that_it_was_not_made_of(kind: str) -> None:
    weight, x = random(6, K), random(400, K, seed=1)
    if kind == "an outlier":
        x[17, 5], x[230, 8] = 60.0, -45.0
    rounded = ops.quantize_int8(weight).dequantize()
    halves = ((x[::2], x[1::2]), (x[1::2], x[::2]))
    errors = {share: sum(error_of(weight, rounded, held, float(seen.abs().max()) * share) for seen, held in halves) for share in SHARES}
    found = float(input_range(weight, rounded, statistics(x)))
    share = found / float(x.abs().max())
    nearest = min(SHARES, key=lambda one: abs(one - share))
    assert share == pytest.approx(nearest, rel=1e-6) and errors[nearest] <= 1.001 * min(errors.values())
    assert min(SHARES) == 0.3 and max(SHARES) == 1.2 and 1.0 in SHARES
    assert float(input_range(weight, rounded, statistics(x[:1]))) == pytest.approx(float(x[:1].abs().max())), "one sentence: its largest input"


def test_outliers_saturate_and_nothing_else_changes() -> None:
    """An input that is a hundred times larger than the range counts as the range; by tokens it would take the steps from the rest of its row."""
    weight, x, span = ops.quantize_int8(random(6, K)), random(5, K, seed=1), torch.tensor([3.0])
    cut = x.clamp(-3, 3)
    loud = cut.clone()
    loud[2, 7], cut[2, 7] = 300.0, 3.0
    assert torch.equal(ops.int8_linear(loud, weight, input_range=span), ops.int8_linear(cut, weight, input_range=span))
    exact = cut @ weight.dequantize().T
    static, token = ops.int8_linear(loud, weight, input_range=span), ops.int8_linear(loud, weight)
    contribution = weight.dequantize()[:, 7] * 297
    assert (static - exact)[2].abs().max() < 0.1 and (token[2] - contribution - exact[2]).abs().max() > 3 * (static - exact)[2].abs().max()


def test_smoothquant_searches_for_the_rounding_that_there_will_be() -> None:
    """A loud input costs all rows where they share a range: a scale gains more than by tokens, where only loud rows pay."""
    weights, x = [random(6, K)], random(300, K, seed=1)
    x[::3, 4] *= 50
    channels, grid = torch.arange(K), Grid(8, K)
    scale, alpha = smoothquant.search_scale(weights, [statistics(x)], channels, grid, True)
    assert scale is not None and alpha is not None
    rounded = ops.quantize_int8(weights[0]).dequantize()
    smoothed = ops.quantize_int8(weights[0] * scale.float()).dequantize()
    plain = error_of(weights[0], rounded, x, float(x.abs().max()))
    found = error_of(weights[0] * scale.float(), smoothed, x / scale.float(), float((x / scale.float()).abs().max()))
    assert found < 0.2 * plain


# -- whole models ---------------------------------------------------------------------------------------------------------------------
def pairs(count: int = 30, seed: int = 5) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(4, 100, (3 + (index + side) % 8,), generator=generator).tolist() for side in (0, 1)) for index in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "gptq"])
def test_recipes(make_model: Make, method: Any) -> None:
    model = make_model(100, **SIZES, activation="gelu")
    found = quantize_model(model, Recipe("w8a8", method, static=True), pairs())
    built = found.build()
    layers, inputs = quantized_layers(built), collect(found.model, sites(found.model), pairs())
    for site in sites(model):
        layer = layers[site.name]
        assert layer.activations == ("token" if site.module is None else "static")
        if site.module is not None:
            smooth = layer.smooth_scale
            x = inputs[site.name].rows if smooth is None else inputs[site.name].rows / smooth
            assert layer.input_range is not None and 0.25 <= float(layer.input_range / x.abs().max()) <= 1.25
            assert signal_to_noise(matrix(found.model, site.name), layer.weight, inputs[site.name], "static", smooth, layer.input_range) > 25
    reports = {one.name: one for one in found.layers(built)}
    assert all(one.snr > 25 for one in reports.values())
    src, tgt = torch.randint(4, 100, (3, 7)), torch.randint(4, 100, (3, 6))
    with torch.no_grad():
        exact, got = model(src, tgt)[0], built(src, tgt)[0]
    assert 0 < (exact - got).square().mean() < 0.02 * exact.square().mean()


WORDS = "a man rides horse two horses ride the on in red big small".split()


def sentences(count: int, seed: int = 1) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (4 + n % 6,), generator=generator)) for n in range(count)]


def test_a_folder_and_the_command(tmp_path: Path, make_model: Make, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    save_model_folder(tmp_path / "model", make_model(tokenizer.vocab_size, **SIZES), tokenizer, "card")
    texts = {"calibration": sentences(60, 2), "sources": sentences(20)}
    texts["references"] = [" ".join(one.text.split()) or "nothing" for one in Translator(tmp_path / "model", threads=1).translate(texts["sources"])]
    for name, lines in texts.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    at = {name: str(tmp_path / name) for name in (*texts, "model", "out")}
    command = ["quantize", at["model"], "--calibrate", at["calibration"], "--evaluate", at["sources"], at["references"], "-o", at["out"], "--bootstrap", "50"]
    command += ["--max-drop", "100", "--activations", "static"]
    assert main([*command, "--scheme", "w4a8"]) == 2 and "static activation scales go with w8a8" in capsys.readouterr().err
    assert main(command) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kinds = [scheme for scheme in config["schemes"]["weights"].values() if scheme["type"] == "int8"]
    assert {"type": "int8", "activations": "static"} in kinds and config["requires"] == ["scheme:int8"]
    assert json.loads((tmp_path / "out" / "quantization.json").read_text())["recipe"]["static"] is True
    said = {engine: [one.text for one in Translator(at["out"], engine=engine, threads=1).translate(texts["sources"])] for engine in ("native", "torch")}
    assert all(len(one) == 20 and any(one) for one in said.values())  # that both compute the same is tests/formats/test_quantized_folder.py's
    model, _, _ = load_model_folder(at["out"])
    assert all((layer.input_range is None) == (layer.activations == "token") for layer in quantized_layers(model).values())
    pytest.importorskip("onnx")
    assert main(["export", at["out"], "--to", "onnx", "-o", str(tmp_path / "onnx")]) == ConfigError.exit_code
    assert "rounds its inputs by a static scale" in capsys.readouterr().err
