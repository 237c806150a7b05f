"""The export to ONNX: every architecture's numbers against float64, whole decodes against the torch engine, the 8 bits of onnxruntime, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import save
from quantized_cases import check

from cvmk import ops
from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError, DataError
from cvmk.formats import load_model_folder, read_model_manifest, save_model_folder
from cvmk.formats import onnx as export
from cvmk.formats.onnx import export_onnx, refusals, write_graphs
from cvmk.inference import Translator
from cvmk.inference.export_check import compare
from cvmk.inference.onnx_runner import OnnxRunner
from cvmk.nn import CVMTransformer, QuantizedLinear
from cvmk.quantization import Recipe
from cvmk.quantization.onnx_runtime import export_quantized_onnx
from cvmk.text.tokenizers import Tokenizer

pytest.importorskip("onnxruntime")
Make = Callable[..., CVMTransformer]
TEXTS = ["a man rides a horse", "two horses ride", "a man", "two men ride a horse", "horse a two rides man a", "a"]
MODELS: dict[str, dict[str, Any]] = {
    "tied, relu": {"tie_embeddings": True},
    "gelu, causal encoder, no positions": {"activation": "gelu", "encoder_direction": "causal", "positions": "none"},
    "rotary, rms norm, gates, grouped keys": {
        "positions": "rotary", "norm": "rmsnorm", "kv_heads": 2, "activation": "swiglu", "bias": False, "decoder_layers": 1, "norm_eps": 1e-6
    },
    "one head, one key of many": {"heads": 8, "kv_heads": 1, "encoder_layers": 1, "tie_embeddings": True, "positions": "rotary", "rotary_base": 500.0},
}  # fmt: skip
SOURCE = torch.tensor([[5, 6, 7, 8, 9, 3], [8, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
TARGET = torch.tensor([[2, 5, 9, 11], [2, 7, 4, 0], [2, 4, 6, 8]])


def run_by_onnx(folder: Path) -> OnnxRunner:
    return OnnxRunner(folder, threads=1)  # more would wait for each other where the machine is busy


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def logits(runner: OnnxRunner, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of whole sequences, as `CVMTransformer.forward` gives them."""
    rows = runner.start([[4]] * len(source))
    found = runner._encoder.run(runner._read, {"source": source.numpy()})
    rows.inputs.update(zip(runner._read, found, strict=True))
    return torch.from_numpy(runner.extend(target.numpy(), rows))


# -- numbers ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MODELS)
def test_numbers_and_translations(tmp_path: Path, make_model: Make, tokenizer: Tokenizer, kind: str) -> None:
    """Whole padded sequences against float64, a row without a source too; step by step what they are at once; and whole translations."""
    folder = save(tmp_path / "m", make_model, tokenizer, **MODELS[kind])
    before = contents(folder)
    export_onnx(folder, tmp_path / "out" / "onnx")
    runner, (model, _, _) = run_by_onnx(tmp_path / "out" / "onnx"), load_model_folder(folder)
    got = logits(runner, SOURCE, TARGET)
    with torch.no_grad():
        check(got, model(SOURCE, TARGET)[0], model.double()(SOURCE, TARGET)[0])
    rows = runner.start([[5, 6, 7, 8, 9], [8]])
    for position in range(TARGET.shape[1]):
        step = runner.extend(TARGET[:2, position : position + 1].numpy(), rows)[:, 0]
        assert np.allclose(step, got[:2, position], atol=1e-4)
    ours = Translator(folder, engine="torch").translate(TEXTS)
    assert runner.translate(TEXTS) == [one.tokens for one in ours]
    for size in (2, 5):
        ours = Translator(folder, engine="torch").translate(TEXTS, beam_size=size)
        assert runner.translate(TEXTS, beam_size=size) == [one.tokens for one in ours]
    assert runner.translate(["a man", "", "two"], max_batch_tokens=1) == [one.tokens for one in Translator(folder).translate(["a man", "", "two"])]
    found = compare(folder, runner, TEXTS)
    assert found["sentences"] == found["identical"] == len(TEXTS) and (found["largest"] is None or found["largest"] < 1e-4)
    assert contents(folder) == before and [entry.name for entry in (tmp_path / "out").iterdir()] == ["onnx"]
    export_onnx(folder, tmp_path / "out" / "onnx")  # one of its kind is replaced


RECIPES = {
    "w8a8": Recipe("w8a8", "smoothquant"),
    "w4a16, zeros and order": Recipe("w4a16", "gptq", 32),
    "w4a16, symmetric": Recipe("w4a16", "rtn", 64, True, ("embeddings",)),
    "w4a8": Recipe("w4a8", "rtn", keep=("cross",)),
}


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_quantised_models_stay_what_they_are(tmp_path: Path, make_model: Make, tokenizer: Tokenizer, kind: str, tied: bool) -> None:
    """The files are as small as the model, and the numbers are those of its own layers."""
    folder = save(tmp_path / "m", make_model, tokenizer, RECIPES[kind], tie_embeddings=tied, kv_heads=2)
    export_onnx(folder, tmp_path / "onnx")
    got, (model, _, _) = logits(run_by_onnx(tmp_path / "onnx"), SOURCE, TARGET), load_model_folder(folder)
    with torch.no_grad(), ops.use("reference"):
        own, law = model(SOURCE, TARGET)[0], model.double()(SOURCE, TARGET)[0]
    if kind.startswith("w4a16"):
        check(got, own, law)
        assert compare(folder, run_by_onnx(tmp_path / "onnx"), TEXTS)["identical"] == len(TEXTS)
    else:  # a value that is rounded to the other side is another step of 255
        assert (got - law).norm() < 0.03 * law.norm()
    table = tokenizer.vocab_size * 64 * (4 if "symmetric" in kind else 1)
    weights = (folder / "model.safetensors").stat().st_size + (table if tied else 0)
    written = sum((tmp_path / "onnx" / f"{side}.onnx").stat().st_size for side in ("encoder", "decoder"))
    assert written < weights + 110_000  # nodes, names, positions


LAYERS: dict[str, Any] = {
    "8 bits": lambda w: (ops.quantize_int8(w), None, True),
    "8 bits, smoothing scale": lambda w: (ops.quantize_int8(w * SMOOTH), SMOOTH, True),
    "4 bits": lambda w: (ops.quantize_int4(w, 32), None, False),
    "4 bits, tokens": lambda w: (ops.quantize_int4(w, 64), None, True),
    "4 bits, zeros, order": lambda w: (ops.quantize_int4(w, 32, symmetric=False, order=torch.randperm(128)), None, False),
}
SMOOTH = torch.linspace(0.1, 3, 128)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_quantised_layer(kind: str) -> None:
    """Products and rows of one weight, beside the layer that holds it; activations are whole numbers of steps, so that nothing is rounded by chance."""
    import onnxruntime
    from onnx import TensorProto

    from cvmk.formats.onnx_nodes import Graph
    from cvmk.formats.onnx_weights import Codes, product, rows

    torch.manual_seed(0)
    weight, smooth, token = LAYERS[kind](torch.randn(24, 128))
    layer = QuantizedLinear(weight, smooth_scale=smooth, activations="token" if token else None)
    x, ids = torch.randint(-127, 128, (3, 5, 128)).float(), torch.tensor([[0, 23, 7], [7, 7, 1]])
    x[..., 0], x[0, 0], x[0, 1] = 127, 0, 1e-35
    x = x if smooth is None else x * smooth
    graph = Graph("layer")
    codes = Codes.of(weight, None if smooth is None else smooth.numpy(), token=token)
    y = product(graph, graph.input("x", TensorProto.FLOAT, ("b", "t", 128)), "layer.weight", codes)
    graph.output(y, TensorProto.FLOAT, ("b", "t", 24))
    found = rows(graph, graph.input("ids", TensorProto.INT64, ("b", "n")), "layer.weight", codes)
    graph.output(found, TensorProto.FLOAT, ("b", "n", 128))
    session = onnxruntime.InferenceSession(graph.model().SerializeToString(), providers=["CPUExecutionProvider"])
    got, looked_up = session.run(None, {"x": x.numpy(), "ids": ids.numpy()})
    with ops.use("reference"), torch.no_grad():
        check(torch.from_numpy(got), layer(x), layer(x.double()))
    assert np.array_equal(looked_up, weight.dequantize()[ids].numpy())


def test_a_model_stored_in_bfloat16(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model(tokenizer.vocab_size).bfloat16()
    save_model_folder(tmp_path / "m", model, tokenizer, "")
    export_onnx(tmp_path / "m", tmp_path / "onnx")
    got = logits(run_by_onnx(tmp_path / "onnx"), SOURCE, TARGET)
    with torch.no_grad():
        check(got, model.float()(SOURCE, TARGET)[0], model.double()(SOURCE, TARGET)[0])
    found = compare(tmp_path / "m", run_by_onnx(tmp_path / "onnx"), TEXTS)
    assert found["identical"] == len(TEXTS) and (found["largest"] is None or found["largest"] < 1e-4)


def test_what_the_files_say(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    import onnx

    folder = save(tmp_path / "m", make_model, tokenizer, tie_embeddings=True)
    export_onnx(folder, tmp_path / "onnx")
    info = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert (info["format"], info["quantization"], info["kv_heads"], info["head_size"], info["max_length"]) == ("onnx", None, 4, 16, 40)
    assert info["decoder"]["inputs"][:4] == ["tokens", "lengths", "cross.0.keys", "cross.0.values"]
    decoder = onnx.load(tmp_path / "onnx" / "decoder.onnx").graph
    shapes = {value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in (*decoder.input, *decoder.output)}
    assert shapes["tokens"] == ["batch", "target"] and shapes["past.1.keys"] == ["batch", 4, "past", 16]
    assert shapes["present.1.values"] == ["batch", 4, "past + target", 16] and shapes["logits"] == ["batch", "target", tokenizer.vocab_size]
    (matrix,) = (value for value in decoder.initializer if value.name == "embeddings.source")  # once, though it is the output layer too
    assert not any(list(value.dims) == list(matrix.dims)[::-1] for value in decoder.initializer)
    assert not set(load_model_folder(folder)[0].state_dict()) - {
        value.name.removesuffix(".turned") for file in ("encoder", "decoder") for value in onnx.load(tmp_path / "onnx" / f"{file}.onnx").graph.initializer
    }


def test_positions_beyond_the_table_are_refused(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    export_onnx(save(tmp_path / "m", make_model, tokenizer, max_length=8), tmp_path / "onnx")
    runner = run_by_onnx(tmp_path / "onnx")
    rows = runner.start([[4, 5]])
    runner.extend(np.full((1, 8), 5), rows)
    with pytest.raises(Exception, match="out of data bounds"):
        runner.extend(np.full((1, 1), 5), rows)


def test_the_runner_needs_no_torch(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    export_onnx(save(tmp_path / "m", make_model, tokenizer), tmp_path / "onnx")
    code = "import sys; from cvmk.inference.onnx_runner import OnnxRunner as R; R(sys.argv[1], threads=1).translate(['a man']); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "onnx")], capture_output=True, text=True, check=True).stdout == "False\n"


# -- the 8 bits of onnxruntime ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("external", [False, True])
def test_eight_bits(
    tmp_path: Path, make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, mode: Any, external: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Smaller, and near to the floats; also where weights stand beside the graphs, as those of large models do."""
    folder = save(tmp_path / "m", make_model, tokenizer, tie_embeddings=True, positions="rotary", kv_heads=2)
    export_onnx(folder, tmp_path / "float")
    monkeypatch.setattr(export, "EMBEDDED_LIMIT", 1000 if external else 1 << 30)
    export_quantized_onnx(folder, tmp_path / mode, mode, calibration=TEXTS)
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).iterdir() if ".onnx" in file.name) for name in (mode, "float")]
    assert sizes[0] < 0.55 * sizes[1] and (tmp_path / mode / "decoder.onnx.data").exists() == external
    assert json.loads((tmp_path / mode / "config.json").read_text())["quantization"] == mode
    runner, floats = run_by_onnx(tmp_path / mode), run_by_onnx(tmp_path / "float")
    source = tokenizer.encode(TEXTS[0])  # of the text that it was calibrated with
    target = torch.tensor([[Tokenizer.BOS, *floats.greedy(source, 20)]])
    got, law = (logits(one, torch.tensor([[*source, Tokenizer.EOS]]), target) for one in (runner, floats))
    error = (got - law).norm() / law.norm()
    assert 1e-4 < error < 0.1
    assert compare(folder, runner, TEXTS)["sentences"] == len(TEXTS)
    assert not caplog.records and not (tmp_path / mode / "float").exists()


def test_large_models_have_their_weights_beside_the_graphs(tmp_path: Path, make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "EMBEDDED_LIMIT", 1000)
    folder = save(tmp_path / "m", make_model, tokenizer)
    export_onnx(folder, tmp_path / "onnx")
    assert (tmp_path / "onnx" / "encoder.onnx").stat().st_size < 100_000 < (tmp_path / "onnx" / "encoder.onnx.data").stat().st_size
    assert compare(folder, run_by_onnx(tmp_path / "onnx"), TEXTS)["identical"] == len(TEXTS)


# -- bad input ----------------------------------------------------------------------------------------------------------------------
def test_refusals(tmp_path: Path, make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "m", make_model, tokenizer)
    manifest = read_model_manifest(folder)[1]
    assert refusals(manifest) == []
    other = dataclasses.replace(manifest, model=manifest.model.model_copy(update={"decoder_mixers": ["scan"]}))
    bytes_kept = dataclasses.replace(manifest, model=manifest.model.model_copy(update={"kv_cache": "int8"}))
    assert refusals(bytes_kept) == ['it keeps keys and values in bytes, and the graphs keep floats: set model.kv_cache in its config.json to "float"']
    assert refusals(other) == ["it has the mixers scan, and the export has graphs for attention only"]
    with monkeypatch.context() as patch:
        patch.setattr(export, "refusals", lambda manifest: ["it is strange"])
        with pytest.raises(ConfigError, match="m cannot be exported to ONNX: it is strange"):
            export_onnx(folder, tmp_path / "out")
    with pytest.raises(DataError, match="nowhere does not exist"):
        export_onnx(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match="no export to ONNX; name another folder"):
        export_onnx(folder, folder)
    with pytest.raises(DataError, match="calibration text is empty"):
        export_quantized_onnx(folder, tmp_path / "out", "static", calibration=["", " "])
    with pytest.raises(ConfigError, match="'other', and must be one of dynamic, static"):
        export_quantized_onnx(folder, tmp_path / "out", "other")  # type: ignore[arg-type]
    quantised = save(tmp_path / "q", make_model, tokenizer, Recipe("w8a8", "rtn"))
    with pytest.raises(ConfigError, match="is quantised already"):
        export_quantized_onnx(quantised, tmp_path / "out", "dynamic")
    model = make_model(30)
    model.register_parameter("gain", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ConfigError, match="the tensor gain, which the export to ONNX does not know"):
        write_graphs(model, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package onnx: pip install 'cvmk\[export\]'"):
        export_onnx(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    folder = save(tmp_path / "m", make_model, tokenizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot write"):
            export_onnx(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_damaged_exports(tmp_path: Path, make_model: Make, tokenizer: Tokenizer) -> None:
    folder = save(tmp_path / "m", make_model, tokenizer)
    export_onnx(folder, tmp_path / "onnx")
    for wrong, message in ((folder, "describes no export to ONNX"), (tmp_path, "holds no export to ONNX")):
        with pytest.raises(DataError, match=message):
            OnnxRunner(wrong)
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        OnnxRunner(tmp_path / "onnx", device="tpu")  # type: ignore[arg-type]
    described = tmp_path / "onnx" / "config.json"
    text = described.read_text()
    for old, new, message in (
        (tokenizer.fingerprint, "other", "is not the one that the model was exported with"),
        ('"max_length": 40', '"max_length": null', "max_length"),
    ):
        described.write_text(text.replace(old, new))
        with pytest.raises(DataError, match=message):
            OnnxRunner(tmp_path / "onnx")
    described.write_text(text)
    decoder = tmp_path / "onnx" / "decoder.onnx"
    decoder.write_bytes(decoder.read_bytes()[:5000])
    with pytest.raises(DataError, match="decoder.onnx cannot be loaded by onnxruntime"):
        OnnxRunner(tmp_path / "onnx")
    decoder.unlink()
    with pytest.raises(DataError, match="decoder.onnx is missing"):
        OnnxRunner(tmp_path / "onnx")


def test_every_option_of_a_model_is_thought_of() -> None:
    """A new key of [model] may change what a graph must do: it is listed here when `onnx_graph` does it, or `refusals` refuses it."""
    known = {
        "d_model", "ffn", "heads", "kv_heads", "encoder_layers", "decoder_layers", "encoder_mixers", "decoder_mixers", "norm", "norm_eps", "encoder_direction",
        "positions", "rotary_base", "activation", "bias", "tie_embeddings", "dropout", "attention_dropout", "max_length",
        "kv_cache",
    }  # fmt: skip
    assert set(ModelConfig.model_fields) == known
