"""`cvmk export MODEL --to FORMAT -o OUT`: a model in the format of another engine, and how alike the two translate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cvmk.cli._arguments import positive
from cvmk.cli._streams import read_lines
from cvmk.cli._terminal import show, show_json
from cvmk.errors import ConfigError

HELP = "Write a model in the format of another engine."
REPORT = "verify.json"
_KINDS = {"ctranslate2": "a model of CTranslate2", "onnx": "a model in ONNX", "safetensors": "a model in plain floats"}
_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a model in the format of another engine. ctranslate2: 8-bit weights stay what they are. "
    parser.description += "onnx: encoder and decoder as graphs in float32, or in the 8 bits of onnxruntime (--quantize). "
    parser.description += "safetensors: plain floats, whatever the model was quantised to. What a format cannot represent is refused with the reasons."
    parser.add_argument("model", metavar="MODEL", help="folder of a model or of a run")
    parser.add_argument("--to", required=True, choices=tuple(_KINDS), help="the format")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write, whole or not at all")
    parser.add_argument("--quantize", choices=("dynamic", "static"), help="onnx: 8 bits; activations are measured when they are multiplied, or on --calibrate")
    parser.add_argument("--calibrate", metavar="FILE", help="of --quantize static: sentences of the source language, one a line, as `cvmk coreset` chooses")
    parser.add_argument("--calibration-sentences", type=positive, metavar="N", help="how many of them are used (default 128)")
    parser.add_argument("--dtype", choices=_DTYPES, help="safetensors: the type of every weight (default float32)")
    parser.add_argument("--verify", type=positive, metavar="N", help="translate N sentences of --source with both engines, compare, and write OUT/verify.json")
    parser.add_argument("--source", "--text", metavar="FILE", help="the sentences of --verify, one a line, plain or compressed")
    parser.add_argument("--json", action="store_true", help="print what --verify found as one JSON object on stdout, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.files import write_json

    _check(arguments)
    texts = [] if arguments.source is None else [text for text in read_lines(arguments.source) if text.strip()][: arguments.verify]
    _export(arguments)
    Path(arguments.output, REPORT).unlink(missing_ok=True)  # of a model that stood there
    kind = _KINDS[arguments.to]
    if not texts:
        show_json({"output": arguments.output}) if arguments.json else show(f"{arguments.output}: {kind}")
        return 0
    from cvmk.inference.export_check import compare

    found: dict[str, Any] = compare(arguments.model, _runner(arguments), texts)
    write_json(Path(arguments.output, REPORT), found)
    if arguments.json:
        show_json(found)
    else:
        said = f"{found['identical']} of {found['sentences']} sentences have the same pieces"
        if found["largest"] is not None:
            said += f"; their log-probabilities differ by at most {found['largest']:.1e} (99% of them by {found['percentile_99']:.1e})"
        show(f"{arguments.output}: {kind}; {said}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together."""
    if (arguments.verify is None) != (arguments.source is None):
        raise ConfigError("--verify N and --source FILE go together: give both or neither")
    if arguments.verify is not None and arguments.to == "onnx":
        from cvmk.formats.onnx import need

        need("onnxruntime")
    if arguments.quantize is not None and arguments.to != "onnx":
        raise ConfigError("--quantize goes with --to onnx: for other formats quantise the model with cvmk quantize")
    if arguments.dtype is not None and arguments.to != "safetensors":
        raise ConfigError("--dtype goes with --to safetensors: the other formats have float32")
    if (arguments.calibrate is not None) != (arguments.quantize == "static"):
        raise ConfigError("--quantize static and --calibrate FILE go together: give both or neither")
    if arguments.calibration_sentences is not None and arguments.calibrate is None:
        raise ConfigError("--calibration-sentences goes with --calibrate FILE: give both or neither")


def _export(arguments: argparse.Namespace) -> None:
    if arguments.to == "ctranslate2":
        from cvmk.formats.ctranslate2 import export_ctranslate2

        export_ctranslate2(arguments.model, arguments.output)
    elif arguments.to == "safetensors":
        from cvmk.formats.plain import export_plain

        export_plain(arguments.model, arguments.output, arguments.dtype or "float32")
    elif arguments.quantize is None:
        from cvmk.formats.onnx import export_onnx

        export_onnx(arguments.model, arguments.output)
    else:
        from cvmk.quantization.onnx_runtime import export_quantized_onnx

        calibration = read_lines(arguments.calibrate) if arguments.calibrate is not None else ()
        export_quantized_onnx(
            arguments.model, arguments.output, arguments.quantize,
            calibration=calibration, calibration_sentences=arguments.calibration_sentences or 128,
        )  # fmt: skip


def _runner(arguments: argparse.Namespace) -> Any:
    """What runs the export."""
    if arguments.to == "safetensors":
        from cvmk.inference.export_check import FolderRunner

        return FolderRunner(arguments.output)
    if arguments.to == "onnx":
        from cvmk.inference.onnx_runner import OnnxRunner

        return OnnxRunner(arguments.output)
    from cvmk.formats import load_model_tokenizer, read_model_manifest
    from cvmk.inference.ctranslate2_runner import CTranslate2Runner

    folder, manifest, _ = read_model_manifest(arguments.model)
    return CTranslate2Runner(arguments.output, load_model_tokenizer(folder, manifest).pieces)
