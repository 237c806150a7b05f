"""A model in ONNX with the 8 bits of onnxruntime's own tools: its weights a scale an output, activations a scale a tensor."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from cvmk.errors import ConfigError
from cvmk.files import sync_folder
from cvmk.formats.export_folder import export_folder
from cvmk.formats.manifest import QUANTIZED, Manifest
from cvmk.formats.onnx import DECODER, ENCODER, KIND, load_exportable, need, write_description, write_graphs
from cvmk.quantization.calibration import Pair, read_pairs
from cvmk.text.tokenizers import Tokenizer

Mode = Literal["dynamic", "static"]
_OPERATIONS = ["MatMul"]


def export_quantized_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    mode: Mode,
    *,
    calibration: Sequence[str] = (),
    calibration_sentences: int = 128,
) -> None:
    """As `formats.onnx.export_onnx`, with the linear layers and embeddings in 8 bits.

    dynamic   activations get their scale when they are multiplied, one for the whole batch: what a sentence becomes may depend on what else is in it.
    static    activations get the range that they have on `calibration`, sentences of the source language, at most `calibration_sentences` of them;
              what the decoder reads is the model's own greedy translation of them (QDQ format).

    Raises ConfigError for another mode, a model that is quantised already, and where onnx or onnxruntime are not installed; DataError where static has
    no calibration text, and as `export_onnx`.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"quantisation by onnxruntime is {mode!r}, and must be one of {', '.join(get_args(Mode))}")
    need("onnx", "onnxruntime")
    model, tokenizer, manifest = load_exportable(path)
    _check(path, manifest)
    pairs: list[Pair] = []
    if mode == "static":
        from cvmk.inference import Translator

        pairs = read_pairs(calibration, Translator(path), calibration_sentences)
    with export_folder(out, ENCODER, KIND) as folder:
        floats = folder / "float"
        floats.mkdir()
        write_graphs(model, floats, for_quantization=True)
        with _quiet():
            if mode == "dynamic":
                _dynamic(floats, folder, manifest)
            else:
                _static(floats, folder, pairs, manifest)
        shutil.rmtree(floats)
        write_description(folder, tokenizer, manifest, mode)
        sync_folder(folder)


def _check(path: str | os.PathLike[str], manifest: Manifest) -> None:
    schemes = manifest.schemes
    if schemes is not None and any(scheme.type in QUANTIZED for scheme in (schemes.default, *schemes.weights.values())):
        raise ConfigError(f"{path} is quantised already: quantise the model that it was made of, or export it as it is")


def _dynamic(floats: Path, folder: Path, manifest: Manifest) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from cvmk.formats.onnx_graph import attention_products

    for file in (ENCODER, DECODER):
        quantize_dynamic(
            floats / file, folder / file, op_types_to_quantize=_OPERATIONS, per_channel=True, weight_type=QuantType.QInt8,
            nodes_to_exclude=attention_products(manifest.model), use_external_data_format=_external(floats / file),
        )  # fmt: skip


def _static(floats: Path, folder: Path, pairs: Sequence[Pair], manifest: Manifest) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    from cvmk.formats.onnx_graph import attention_products

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
            self._batches = batches

        def get_next(self) -> dict[str, Any] | None:
            return next(self._batches, None)

    inputs = _Inputs(floats, pairs, manifest)
    for file, batches in ((ENCODER, inputs.encoder()), (DECODER, inputs.decoder())):
        quantize_static(
            floats / file, folder / file, Reader(batches), quant_format=QuantFormat.QDQ, op_types_to_quantize=_OPERATIONS, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=attention_products(manifest.model),
            use_external_data_format=_external(floats / file), extra_options={"OpTypesToExcludeOutputQuantization": _OPERATIONS},
        )  # fmt: skip


def _external(file: Path) -> bool:
    """Whether the weights of a graph stand beside it."""
    return file.with_name(f"{file.name}.data").exists()


class _Inputs:
    """What the two floating graphs are given, sentence by sentence, without padding, which would widen the ranges."""

    def __init__(self, floats: Path, pairs: Sequence[Pair], manifest: Manifest) -> None:
        import numpy as np
        import onnxruntime

        model = manifest.model
        self._encoder = onnxruntime.InferenceSession(os.fspath(floats / ENCODER), providers=["CPUExecutionProvider"])
        self._read = [value.name for value in self._encoder.get_outputs() if value.name != "encoded"]
        self._sources = [np.array([[*source, Tokenizer.EOS]]) for source, _ in pairs]
        self._targets = [np.array([[Tokenizer.BOS, *target]]) for _, target in pairs]
        empty = np.zeros((1, model.kv_heads or model.heads, 0, model.d_model // model.heads), np.float32)
        self._past = {f"past.{index}.{kind}": empty for index in range(model.decoder_layers) for kind in ("keys", "values")}

    def encoder(self) -> Iterator[dict[str, Any]]:
        for source in self._sources:
            yield {"source": source}

    def decoder(self) -> Iterator[dict[str, Any]]:
        for source, target in zip(self._sources, self._targets, strict=True):
            found = self._encoder.run(self._read, {"source": source})
            yield {"tokens": target, **dict(zip(self._read, found, strict=True)), **self._past}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tool's advice to optimise the graph first, which is for graphs of other makes."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
