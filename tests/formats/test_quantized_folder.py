"""Folders of quantised models: they come back as they were, in both engines, and what is wrong with one is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paired_caches import attention_of_pairs
from safetensors.torch import load_file, save_file

from cvmk import ops
from cvmk.errors import DataError
from cvmk.formats import Scheme, load_model_folder, read_model_manifest, save_model_folder
from cvmk.formats.quantized_weights import quantized_layers, replace_layer
from cvmk.formats.torch_weights import manifest_of, raw_tensors
from cvmk.inference import Translator
from cvmk.inference.native_engine import NativeEngine
from cvmk.inference.options import SearchOptions
from cvmk.inference.shortlist import build_shortlist
from cvmk.inference.torch_engine import TorchEngine
from cvmk.nn import CVMTransformer, QuantizedLinear, QuantizedTable
from cvmk.quantization.sites import sites
from cvmk.text.tokenizers import Tokenizer

Make = Callable[..., CVMTransformer]
SIZES = {"d_model": 64, "ffn": 128, "heads": 4, "seed": 3, "sharpness": 2.0}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_embeddings": True},
    "modern": {"positions": "rotary", "kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm", "bias": False},
    "recurrent": {"encoder_mixers": ["ssru", "attention"], "decoder_mixers": ["ssru"], "positions": "none"},
}


def eight(weight: torch.Tensor, number: int) -> dict[str, Any]:
    """Values that fill half of the range: quantised again they would become others."""
    found = ops.quantize_int8(weight).tensors()
    halved = {"values": found["values"] // 2, "scales": found["scales"] * 2}
    smooth = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(number)) + 0.5 if number % 3 == 0 else None
    return {"weight": ops.QuantizedWeight.from_tensors(halved), "smooth_scale": smooth}


def four(weight: torch.Tensor, number: int) -> dict[str, Any]:
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(number)) if number % 2 else None
    return {"weight": ops.quantize_int4(weight, 32, symmetric=number % 3 == 0, order=order)}


def four_by_tokens(weight: torch.Tensor, number: int) -> dict[str, Any]:
    return {"weight": ops.quantize_int4(weight, 64), "activations": "token"}


def eight_by_range(weight: torch.Tensor, number: int) -> dict[str, Any]:
    return {**eight(weight, number), "input_range": torch.tensor([0.5 + number % 5])}


SCHEMES = {"w8a8": eight, "w8a8 static": eight_by_range, "w4a16": four, "w4a8": four_by_tokens}
ACTIVATIONS = {"w8a8": "token", "w8a8 static": "static", "w4a16": "float", "w4a8": "token"}


def quantised(model: CVMTransformer, scheme: str) -> CVMTransformer:
    model = copy.deepcopy(model)
    for number, site in enumerate(sites(model)):
        options = SCHEMES[scheme](model.get_parameter(site.name).detach(), number)
        if site.name.startswith("embeddings."):
            options.pop("smooth_scale", None)
            if site.module is None:
                options.pop("input_range", None)
        replace_layer(model, site.name, **options)
    return model.eval()


def sources(count: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 200, (3 + index,), generator=generator).tolist() for index in range(count)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_gives_the_same_model(tmp_path: Path, make_model: Make, tokenizer: Tokenizer, kind: str, scheme: str) -> None:
    source = make_model(tokenizer.vocab_size, **SIZES, **MODELS[kind])
    model = quantised(source, scheme)
    save_model_folder(tmp_path / "m", model, tokenizer, "card", others={"report.json": "{}"})
    loaded, _, info = load_model_folder(tmp_path / "m")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    src, tgt = torch.randint(4, 200, (2, 7)), torch.randint(4, 200, (2, 5))
    assert torch.equal(loaded(src, tgt)[0], model(src, tgt)[0])
    assert [name for name in info["requires"] if name.startswith("scheme:")] == ["scheme:int8" if scheme.startswith("w8a8") else "scheme:int4"]
    assert info["parameters"] == sum(parameter.numel() for parameter in source.parameters())
    assert (tmp_path / "m" / "report.json").read_text() == "{}"
    layers = quantized_layers(loaded)
    assert len(layers) == len(sites(source))
    looked_up = {site.name for site in sites(source) if site.module is None and scheme == "w8a8 static"}
    assert all(layer.activations == ("token" if name in looked_up else ACTIVATIONS[scheme]) for name, layer in layers.items())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", MODELS)
def test_both_engines_compute_with_the_stored_values(
    tmp_path: Path, make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str, scheme: str
) -> None:
    model = quantised(make_model(tokenizer.vocab_size, **SIZES, **MODELS[kind]), scheme)
    save_model_folder(tmp_path, model, tokenizer, "card")
    engines = [Translator(tmp_path, engine=name, threads=1).engine for name in ("native", "torch")]
    if scheme != "w4a16":  # where activations are quantised, the native engine's caches are of bfloat16
        monkeypatch.setattr(ops, "flash_attention", attention_of_pairs)
    said = [found[0].tokens for found in engines[1].search(sources(), SearchOptions())]
    native, torch_ = ([score for found in engine.search(sources(), SearchOptions(), said) for score in found[0].scores] for engine in engines)
    apart = (torch.tensor(native) - torch.tensor(torch_)).abs()
    if scheme == "w4a16":
        assert apart.max() <= 2e-4
    else:  # the same integers, but where a number of a row that is rounded to bytes falls on the other side
        assert apart.median() <= 1e-4 and apart.mean() <= 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shortlists_choose_among_stored_rows(make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """The rows of a few outputs are taken out of the packed weight."""
    if scheme != "w4a16":
        monkeypatch.setattr(ops, "flash_attention", attention_of_pairs)
    model = quantised(make_model(tokenizer.vocab_size, **SIZES), scheme)
    pairs = [([piece], [piece, (7 * piece) % 250 + 4, (31 * piece) % 250 + 4]) for piece in range(4, 200)]
    shortlist = build_shortlist(pairs, tokenizer.vocab_size, 100, 20)
    native = NativeEngine(manifest_of(model), raw_tensors(model), "float32", 1, shortlist=shortlist)
    other = TorchEngine(model, shortlist=shortlist)
    options = SearchOptions(2, shortlist=True)
    found = [[one[0].tokens for one in engine.search(sources(), options)] for engine in (native, other)]
    assert sum(a == b for a, b in zip(*found, strict=True)) >= 7


def test_bfloat16_is_for_what_is_not_quantised(make_model: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = quantised(make_model(tokenizer.vocab_size, **SIZES), "w8a8")
    save_model_folder(tmp_path, model, tokenizer, "card")
    for engine in ("native", "torch"):
        found = Translator(tmp_path, engine=engine, compute_type="bfloat16").translate(["a man rides", "a horse"])
        assert all(one.tokens for one in found)
    moved = copy.deepcopy(model).bfloat16()
    assert moved.embeddings.embed_source(torch.tensor([[4, 5]])).dtype == torch.bfloat16
    assert moved.embeddings.source.weight.scales.dtype == torch.float32


@pytest.mark.parametrize("bits", [8, 4])
def test_a_table_gives_the_rows_of_its_matrix(bits: int) -> None:
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    packed = ops.quantize_int8(weight) if bits == 8 else ops.quantize_int4(weight, 32, symmetric=False, order=order)
    table, ids = QuantizedTable(packed), torch.tensor([[3, 0, 9], [1, 1, 2]])
    assert torch.equal(table.rows(ids), packed.dequantize()[ids]) and torch.equal(table.rows(ids[0]), packed.dequantize()[ids[0]])
    other = QuantizedTable(ops.quantize_int8(-weight) if bits == 8 else ops.quantize_int4(-weight, 32, symmetric=False, order=order))
    other.rows(ids)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.rows(ids), table.rows(ids)) and set(table.state_dict()) >= {"values", "scales"}
    x = torch.randn(3, 64)
    assert torch.equal(table(x), QuantizedLinear(packed)(x))


# -- what is wrong with a folder ---------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> Callable[[str], Path]:
    def make(scheme: str) -> Path:
        save_model_folder(tmp_path / "m", quantised(make_model(tokenizer.vocab_size, **SIZES), scheme), tokenizer, "card")
        return tmp_path / "m"

    return make


INNER = "encoder.blocks.0.ffn.inner"


def changed(values: torch.Tensor, **places: Any) -> torch.Tensor:
    found = values.clone()
    found.view(-1)[0] = places["first"]
    return found


@pytest.mark.parametrize(("scheme", "change", "message"), [
    ("w8a8", {f"{INNER}.weight.scales": None}, "lacks the tensor encoder.blocks.0.ffn.inner.weight.scales"),
    ("w8a8", {f"{INNER}.weight.values": None}, "lacks the tensor encoder.blocks.0.ffn.inner.weight.values"),
    ("w8a8", {f"{INNER}.weight.values": None, f"{INNER}.weight.scales": None}, "lacks the tensor encoder.blocks.0.ffn.inner.weight"),
    ("w8a8", {f"{INNER}.weight.zeros": torch.zeros(128, 1, dtype=torch.uint8)}, "has zeros for encoder.blocks.0.ffn.inner.weight"),
    ("w8a8", {"more": torch.zeros(3)}, "unknown tensor more"),
    ("w8a8", {f"{INNER}.weight.values": lambda t: changed(t, first=-128)}, "-128"),
    ("w8a8", {f"{INNER}.weight.scales": lambda t: changed(t, first=float("nan"))}, "scales holds an infinity or NaN|scales that are no finite numbers"),
    ("w8a8", {"encoder.blocks.0.mixer.qkv.smooth_scale": lambda t: changed(t, first=0.0)}, "smoothing scale that is not positive"),
    ("w8a8 static", {f"{INNER}.input_range": None}, "lacks the tensor encoder.blocks.0.ffn.inner.weight.input_range"),
    ("w8a8 static", {f"{INNER}.input_range": lambda t: -t}, "input range that is not positive"),
    ("w8a8 static", {f"{INNER}.input_range": lambda t: t * torch.nan}, "input range that is not positive|no finite numbers"),
    ("w8a8 static", {f"{INNER}.input_range": lambda t: torch.ones(128)}, r"input_range of float32 \[128\] where float32 \[1\]"),
    ("w8a8", {f"{INNER}.input_range": torch.ones(1)}, "has input_range for encoder.blocks.0.ffn.inner.weight"),
    ("w8a8", {f"{INNER}.weight.scales": lambda t: t[:-1].clone()}, r"scales of float32 \[127\] where float32 \[128\]"),
    ("w8a8", {f"{INNER}.weight.{part}": lambda t: t[:-1].clone() for part in ("values", "scales")}, "does not ask for|where config.json asks for"),
    ("w4a16", {"encoder.blocks.0.mixer.qkv.weight.order": lambda t: changed(t, first=int(t[1]))}, "permutation"),
    ("w4a16", {"encoder.blocks.0.mixer.out.weight.zeros": lambda t: changed(t, first=16)}, "above 15"),
    ("w4a16", {"encoder.blocks.0.mixer.qkv.weight.order": None}, "lacks the tensor encoder.blocks.0.mixer.qkv.weight.order"),
])  # fmt: skip
def test_wrong_tensors_are_named(folder: Callable[[str], Path], scheme: str, change: dict[str, Any], message: str) -> None:
    path = folder(scheme)
    tensors = load_file(path / "model.safetensors")
    for name, to in change.items():
        if to is None:
            del tensors[name]
        else:
            tensors[name] = to(tensors[name]) if callable(to) else to
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "weights_sha256": None}))
    for engine in ("native", "torch"):
        with pytest.raises(DataError, match=message):
            Translator(path, engine=engine)


def test_a_truncated_file_is_named(folder: Callable[[str], Path]) -> None:
    path = folder("w8a8")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(DataError, match="truncated or corrupt"):
        Translator(path)


@pytest.mark.parametrize(("scheme", "message"), [
    ({"type": "int8", "activations": "none"}, "activations = 'none' and not one of 'token'"),
    ({"type": "int8"}, "options"),
    ({"type": "int4", "activations": "float", "group": 48, "zeros": False, "order": False}, "group = 48"),
    ({"type": "int4", "activations": "float", "group": 64, "zeros": 1, "order": False}, "zeros = 1"),
    ({"type": "int4", "activations": "token", "group": 64, "zeros": True, "order": False}, "by tokens go with neither"),
])  # fmt: skip
def test_schemes_that_there_are_not(scheme: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme.from_dict(scheme)


def test_auto_means_floats_for_what_is_left(folder: Callable[[str], Path]) -> None:
    from cvmk.inference.engines import stored_type

    _, manifest, _ = read_model_manifest(folder("w8a8"))
    assert stored_type(manifest, "auto") == "float32"
