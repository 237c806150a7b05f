"""Our models in ONNX (https://onnx.ai): encoder.onnx and decoder.onnx, which `onnx_graph` describes, the tokenizer, and config.json. Needs the package onnx.

The graphs are made node by node from manifest and weights, not traced by torch.onnx: shapes stay symbolic everywhere, inputs and weights are called what
they are, quantised weights stay what they are, and the files depend on no version of a tracer.

config.json
    format          "onnx"
    cvmk            version that wrote it
    quantization    null, or "dynamic" or "static"
    vocab_size, pad_id, unk_id, bos_id, eos_id
    max_length      longest source (EOS included) and target (BOS included)
    kv_heads, head_size, decoder_layers
    tokenizer       fingerprint
    languages       as in the model's manifest
    encoder, decoder    {"file", "inputs", "outputs"}
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cvmk
from cvmk.errors import ConfigError, DataError
from cvmk.files import write_bytes, write_json
from cvmk.formats.export_folder import export_folder
from cvmk.formats.folder import read_model_manifest
from cvmk.formats.manifest import CONFIG, Manifest
from cvmk.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from cvmk.formats.onnx_weights import Codes, Weight
    from cvmk.nn import CVMTransformer

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
FORMAT, KIND = "onnx", "export to ONNX"
EMBEDDED_LIMIT = 1 << 30
"""Bytes of weights that a file holds; those of a larger model stand beside it, in <file>.data, since a protobuf ends at 2 GB."""


def refusals(manifest: Manifest) -> list[str]:
    """Why a model cannot be written in ONNX, in sentences; empty where it can."""
    model = manifest.model
    others = sorted({*model.encoder_mixers, *model.decoder_mixers} - {"attention"})
    found = [f"it has the mixers {', '.join(others)}, and the export has graphs for attention only"] if others else []
    if model.kv_cache != "float":
        found.append('it keeps keys and values in bytes, and the graphs keep floats: set model.kv_cache in its config.json to "float"')
    return found


def need(*packages: str) -> None:
    """Raises ConfigError where a package is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"the export to ONNX needs the package {' and '.join(missing)}: pip install 'cvmk[export]'")


def export_onnx(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the model of a folder in ONNX into the folder `out`, whole or not at all; a folder that stands there is replaced if it is such an export.

    Floats are float32. Quantised weights stay what they are, bit for bit, and activations are rounded as our engines round them. Raises ConfigError, with
    the reasons, where the model cannot be written so or onnx is not installed, DataError where the folder is not sound or `out` cannot be written.
    """
    need("onnx")
    model, tokenizer, manifest = load_exportable(path)
    with export_folder(out, ENCODER, KIND) as folder:
        write_graphs(model, folder)
        write_description(folder, tokenizer, manifest)


def load_exportable(path: str | os.PathLike[str]) -> tuple[CVMTransformer, Tokenizer, Manifest]:
    """The model of a folder. Raises as `export_onnx`."""
    from cvmk.formats.torch_weights import load_model_folder

    _, manifest, _ = read_model_manifest(path)
    if reasons := refusals(manifest):
        raise ConfigError(f"{path} cannot be exported to ONNX: {'; '.join(reasons)}")
    model, tokenizer, _ = load_model_folder(path)
    return model, tokenizer, manifest


def write_graphs(model: CVMTransformer, folder: Path, *, for_quantization: bool = False) -> None:
    """encoder.onnx and decoder.onnx of a model into a folder, checked by onnx.

    With `for_quantization` the embeddings that are looked up are in 8 bits, a scale a row, and every other weight is one of its own, as onnxruntime's tools
    expect them.
    """
    from cvmk.formats.onnx_graph import decoder_graph, encoder_graph

    tensors, config, tables = _tensors(model), model.config, _tables(model)
    looked_up = _eight_bit_tables(model) if for_quantization else None
    graphs = encoder_graph(config, model.pad_id, tensors, tables, looked_up), decoder_graph(config, model.vocab_size, tensors, tables, looked_up)
    lost = sorted(tensors.keys() - graphs[0].used - graphs[1].used)
    if lost:
        raise ConfigError(f"the model has the tensor {lost[0]}, which the export to ONNX does not know: export it with the cvmk version that wrote it")
    for file, graph in zip((ENCODER, DECODER), graphs, strict=True):
        _write(graph.model(), folder / file)


def _tensors(model: CVMTransformer) -> dict[str, Weight]:
    """The weights of a model by name, quantised ones as they are."""
    from cvmk.formats.onnx_weights import Codes
    from cvmk.formats.quantized_weights import floating, quantized_layers

    found: dict[str, Weight] = {name: tensor.float().numpy() for name, tensor in floating(model).items()}
    for name, layer in quantized_layers(model).items():
        if layer.input_range is not None:
            raise ConfigError(f"{name} rounds its inputs by a static scale, which the export to ONNX does not have: quantise with activations by tokens")
        smooth = None if layer.smooth_scale is None else layer.smooth_scale.numpy()
        found[name] = Codes.of(layer.weight, smooth, token=layer.activations == "token")
    return found


def _eight_bit_tables(model: CVMTransformer) -> dict[str, Codes]:
    from cvmk.formats.onnx_weights import Codes
    from cvmk.ops import quantize_int8

    found = {f"embeddings.{name}": getattr(model.embeddings, name) for name in ("source", "target")}
    return {name: Codes.of(quantize_int8(matrix.float()), None, token=False) for name, matrix in found.items() if matrix is not None}


def write_description(folder: Path, tokenizer: Tokenizer, manifest: Manifest, quantization: str | None = None) -> None:
    """config.json and the tokenizer beside the graphs."""
    model = manifest.model
    tokenizer.save(folder)
    write_json(folder / CONFIG, {
        "format": FORMAT,
        "cvmk": cvmk.__version__,
        "quantization": quantization,
        "vocab_size": manifest.vocab_size,
        "pad_id": manifest.pad_id, "unk_id": tokenizer.UNK, "bos_id": tokenizer.BOS, "eos_id": tokenizer.EOS,
        "max_length": model.max_length,
        "kv_heads": model.kv_heads or model.heads,
        "head_size": model.d_model // model.heads,
        "decoder_layers": model.decoder_layers,
        "tokenizer": tokenizer.fingerprint,
        "languages": manifest.extra.get("languages"),
        **{Path(file).stem: _interface(folder / file) for file in (ENCODER, DECODER)},
    })  # fmt: skip


def _interface(file: Path) -> dict[str, Any]:
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    return {"file": file.name, "inputs": [value.name for value in graph.input], "outputs": [value.name for value in graph.output]}


def _tables(model: CVMTransformer) -> dict[str, np.ndarray]:
    """The tables that a model's positions are read from."""
    from cvmk.nn.positions import rotary_table, sinusoidal_table

    config = model.config
    if config.positions == "sinusoidal":
        return {"sinusoidal": sinusoidal_table(config.max_length, config.d_model).float().numpy()}
    if config.positions == "rotary":
        cos, sin = rotary_table(config.max_length, config.d_model // config.heads, config.rotary_base).float().numpy()
        return {"cos": cos, "sin": sin}
    return {}


def _write(model: Any, file: Path) -> None:
    """Raises DataError where onnx finds the file wrong."""
    import onnx

    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EMBEDDED_LIMIT:
        onnx.save_model(model, file, save_as_external_data=True, location=f"{file.name}.data", size_threshold=1024)
    else:
        write_bytes(file, model.SerializeToString())
    try:
        onnx.checker.check_model(file, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise DataError(f"{file.name} is not sound ({error}): report it with the model's {CONFIG}") from error
