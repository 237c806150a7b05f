"""Whole models: where scales go, what calibration sees, and what a recipe makes of a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cvmk.errors import ConfigError, DataError
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer
from cvmk.quantization import Recipe, collect, quantize_model, read_pairs
from cvmk.quantization.calibration import check_language
from cvmk.quantization.model import sensitivities
from cvmk.quantization.sites import apply, folds, sites
from cvmk.text.tokenizers import Tokenizer

Make = Callable[..., CVMTransformer]
SIZES: dict[str, Any] = {"d_model": 64, "ffn": 128, "heads": 4, "seed": 3, "sharpness": 2.0}
MODELS: dict[str, dict[str, Any]] = {
    "tied, relu": {"tie_embeddings": True},
    "gelu": {"activation": "gelu", "bias": False},
    "swiglu, shared heads": {"positions": "rotary", "kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm"},
}
RECIPES = [
    ("w8a8", "rtn"), ("w8a8", "smoothquant"), ("w8a8", "gptq"), ("w4a16", "rtn"), ("w4a16", "gptq"), ("w4a16", "awq"), ("w4a8", "smoothquant"), ("w4a8", "awq"),
]  # fmt: skip


def calm(model: CVMTransformer) -> CVMTransformer:
    """With smaller weights, so that errors do not grow from layer to layer as they do in models of large random ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "blocks" in name:
                parameter.mul_(0.4)
    return model


def pairs(count: int = 24) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> list[int]:
        return torch.randint(4, 200, (length,), generator=generator).tolist()

    return [(ids(3 + index % 9), ids(2 + index % 7)) for index in range(count)]


def logits(model: CVMTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        return model(torch.randint(4, 200, (4, 9), generator=generator), torch.randint(4, 200, (4, 7), generator=generator))[0]


@pytest.mark.parametrize("kind", MODELS)
def test_folded_scales_change_nothing(make_model: Make, kind: str) -> None:
    model = make_model(200, **SIZES, **MODELS[kind]).double()
    before, generator = logits(model), torch.Generator().manual_seed(7)
    for fold in folds(model):
        apply(model, fold, torch.rand(fold.count, generator=generator, dtype=torch.float64) + 0.5)
    assert torch.allclose(logits(model), before, rtol=1e-9, atol=1e-9)
    reached = {name for fold in folds(model) for name in fold.readers}
    linears = {site.name for site in sites(model) if site.module is not None and not site.looked_up}
    assert reached == linears - ({f"{side}.blocks.{i}.ffn.outer.weight" for side in ("encoder", "decoder") for i in range(2)} if kind == "gelu" else set())


def test_calibration_sees_what_the_layers_read(make_model: Make) -> None:
    """Statistics of all rows without padding, against sentence by sentence and a list of inputs; a reservoir that is too small keeps some of them."""
    model = make_model(200, **SIZES)
    found, some = collect(model, sites(model), pairs()), collect(model, sites(model), pairs(), rows=16)
    assert set(found) == {site.name for site in sites(model) if site.module is not None}
    layers = ("encoder.blocks.1.ffn.outer", "decoder.blocks.0.cross.key_value", "decoder.blocks.1.mixer.qkv")
    for name, module in [*((f"{layer}.weight", layer) for layer in layers), ("embeddings.output", "embeddings.projection")]:
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(module).register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].flatten(0, -2)))
        with torch.no_grad():
            for source, target in pairs():
                model(torch.tensor([[*source, Tokenizer.EOS]]), torch.tensor([[Tokenizer.BOS, *target]]))
        handle.remove()
        x, one = torch.cat(seen).double(), found[name]
        assert one.count == len(x) == len(one.rows) or len(x) > 1024
        for statistic, expected in ((one.largest, x.abs().amax(0)), (one.mean, x.abs().mean(0)), (one.moment, x.T @ x / len(x))):
            assert torch.allclose(statistic, expected, rtol=1e-4, atol=1e-4)
        for half, own in enumerate(one.halves):
            other = collect(model, sites(model), pairs()[half::2])[name]
            assert torch.equal(own.largest, other.largest) and len(own.rows) == other.count
            assert torch.allclose(own.rows.sum(0), other.rows.sum(0), rtol=1e-4, atol=1e-3)
        kept = some[name].rows
        assert len(kept) == 16 and all(bool((row.double() - x).abs().amax(1).min() < 1e-4) for row in kept)
        assert torch.allclose(some[name].moment, one.moment)
    scale = torch.rand(64) + 0.5
    divided = found["decoder.blocks.1.mixer.qkv.weight"].divided(scale)
    assert torch.allclose(divided.moment, divided.rows.double().T @ divided.rows.double() / divided.count, rtol=1e-4, atol=1e-4)
    for half in divided.halves:
        assert torch.allclose(half.largest, half.rows.abs().amax(0).double(), rtol=1e-6)


def test_pairs_are_what_the_model_says(make_model: Make, tokenizer: Tokenizer) -> None:
    translator = Translator.of_weights(make_model(tokenizer.vocab_size, **SIZES), tokenizer)
    texts = ["a man rides", "", "two horses", "  ", "a horse rides a man", "two men"]
    found = read_pairs(texts, translator, 3)
    assert [source for source, _ in found] == [tokenizer.encode(text) for text in ("a man rides", "two horses", "a horse rides a man")]
    assert found[1][1] == translator.translate(["two horses"])[0].tokens
    with pytest.raises(DataError, match="calibration text is empty"):
        read_pairs(["", "  "], translator, 3)


def test_text_of_another_language_is_refused(tokenizer: Tokenizer) -> None:
    sources, references = ["a man rides a horse"] * 5, ["ein mann reitet ein pferd"] * 5
    check_language("f", ["two horses ride a man"], sources, references, tokenizer)
    with pytest.raises(DataError, match="f looks like the language that the model writes"):
        check_language("f", ["ein pferd reitet"], sources, references, tokenizer)
    with pytest.raises(DataError, match="f does not look like the language"):
        check_language("f", ["человек едет на лошади a"], sources, ["xxxx"], tokenizer)


@pytest.mark.parametrize(("scheme", "method"), RECIPES)
@pytest.mark.parametrize("kind", MODELS)
def test_recipes(make_model: Make, kind: str, scheme: Any, method: Any) -> None:
    model = calm(make_model(200, **SIZES, **MODELS[kind]))
    before = copy.deepcopy(model.state_dict())
    found = quantize_model(model, Recipe(scheme, method), pairs())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the source stays as it is"
    assert torch.allclose(logits(found.model), logits(model), rtol=1e-3, atol=1e-2), "the scales that were folded in change nothing"
    built = found.build()
    layers = found.layers(built)
    assert found.names == [site.name for site in sites(model)] == [layer.name for layer in layers]
    better = [layer.snr - layer.nearest_snr for layer in layers]
    if method == "rtn":
        assert better == [0.0] * len(better)
    elif method == "gptq":
        assert min(better) > -0.5 and sum(better) / len(better) > 1.0
    elif method == "smoothquant":  # chosen by what it does on sentences that its scales were not made of, so these ones gain less and nothing loses much
        assert min(better) > -0.5 and sum(better) / len(better) > (0.05 if scheme == "w4a8" else 0.15)
    else:
        assert min(better) > -3.0 and sum(better) / len(better) > 0.2
    noise = (logits(built) - logits(model)).double().square().mean() / logits(model).double().square().mean()
    assert 0 < noise < (0.01 if scheme == "w8a8" else 0.6)


def test_single_matrices_are_raised(make_model: Make) -> None:
    model = make_model(200, **SIZES)
    four = quantize_model(model, Recipe("w4a16", "gptq"), pairs())
    name = "encoder.blocks.0.ffn.inner.weight"
    layers = {layer.name: layer for layer in four.layers(four.build({name}))}
    assert layers[name].stored == "int8" and layers["encoder.blocks.0.ffn.outer.weight"].stored == "int4"
    eight = quantize_model(model, Recipe("w8a8", "rtn"), pairs())
    layers = {layer.name: layer for layer in eight.layers(eight.build({name, "embeddings.source"}))}
    assert layers[name].stored == "float" and layers[name].snr == math.inf and layers[name].bytes == 4 * 64 * 128
    assert torch.equal(eight.build(eight.names).state_dict()[name], model.state_dict()[name])
    costs = sensitivities(four, pairs(), 8)
    assert set(costs) == set(four.names) and all(0 <= cost < 5 for cost in costs.values()) and max(costs.values()) > 1e-4


def test_parts_are_kept(make_model: Make) -> None:
    for options, missing in (({}, {"embeddings.source", "embeddings.target"}), ({"tie_embeddings": True}, {"embeddings.source"})):
        model = make_model(200, **SIZES, **options)
        found = quantize_model(model, Recipe("w8a8", keep=("embeddings", "cross")), pairs(4)).names
        gone = {site.name for site in sites(model)} - set(found)
        assert gone == missing | {f"decoder.blocks.{i}.cross.{part}.weight" for i in range(2) for part in ("query", "key_value", "out")}
    tied = quantize_model(make_model(200, **SIZES, tie_embeddings=True), Recipe("w8a8", keep=("output",)), pairs(4))
    assert "embeddings.source" not in tied.names


def test_what_does_not_go(make_model: Make) -> None:
    for options, message in (
        ({"scheme": "w3a8"}, "scheme is 'w3a8'"), ({"method": "magic"}, "method is 'magic'"), ({"group_size": 16, "scheme": "w4a16"}, "group_size is 16"),
        ({"scheme": "w4a16", "method": "smoothquant"}, "does not quantise them"), ({"method": "awq"}, "awq chooses the ranges of 4-bit"),
        ({"scheme": "w4a8", "symmetric": False}, "without zero points"),
        ({"scheme": "w4a8", "static": True}, "static activation scales go with w8a8"), ({"keep": ("all",)}, "keep has 'all'"),
        ({"damping": -1.0}, "damping is -1.0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Recipe(**options)  # type: ignore[arg-type]
    model = make_model(200, **{**SIZES, "ffn": 96})
    with pytest.raises(ConfigError, match=r"encoder.blocks.0.ffn.outer.weight has 96 inputs, which groups of 64 do not divide: choose"):
        quantize_model(model, Recipe("w4a16"), pairs(2))
    quantised = quantize_model(model, Recipe("w8a8"), pairs(2)).build()
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_model(quantised, Recipe("w8a8"), pairs(2))
