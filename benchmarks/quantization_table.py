"""Quantised models beside what they were made of: `python benchmarks/quantization_table.py MODEL CALIBRATE SRC REF` prints a table in Markdown.

Every row is a process of its own, on one thread: size of the weights beside float32, BLEU (greedy, and beam 4), tokens of the beam search a second of the
processor's time, and the most memory that the process held above what it holds before it loads engine and model. Rows of onnxruntime and CTranslate2 are
there where these are installed and can represent the model; onnxruntime searches with `cvmk.inference.onnx_search`. `--engines` chooses.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cvmk.cli._streams import read_lines

ROWS = [
    ("w8a8", "rtn"), ("w8a8", "smoothquant"), ("w8a8", "gptq"), ("w8a8 static", "smoothquant"), ("w8a8 byte caches", "smoothquant"),
    ("w4a16", "rtn"), ("w4a16", "gptq"), ("w4a16", "awq"),
    ("w4a8", "rtn"), ("w4a8", "smoothquant"), ("w4a8", "gptq"), ("w4a8", "awq"),
]  # fmt: skip
ENGINES = ("native", "torch", "onnxruntime", "CTranslate2")
NAMES = {0: "<blank>", 1: "<unk>", 2: "<s>", 3: "</s>"}
"""As `ctranslate2_peer.export` calls the special pieces; the others are t4, t5, ..."""


def measure(kind: str, path: str, compute_type: str, original: str, source: str, reference: str) -> dict[str, Any]:
    """In a process of its own: what one engine makes of a model."""
    sources, references = read_lines(source), read_lines(reference)
    before = _high_water()
    if kind == "CTranslate2":
        translate = _ctranslate2(path, compute_type, original)
    else:
        translate = _onnxruntime(path) if kind == "onnxruntime" else _cvmk(kind, path, compute_type)
    translate(sources[:16], 1)
    greedy, _ = translate(sources, 1)
    start = time.process_time()
    beam, tokens = translate(sources, 4)
    seconds, memory = time.process_time() - start, _high_water() - before
    from cvmk.validation.metrics import score

    scores = [score("bleu", texts, references).value for texts in (greedy, beam)]
    return {"greedy": scores[0], "beam": scores[1], "rate": tokens / seconds, "memory": memory}


def _cvmk(engine: str, path: str, compute_type: str) -> Any:
    from cvmk.inference import Translator

    translator = Translator(path, engine=engine, compute_type=compute_type, threads=1)

    def translate(texts: list[str], beam: int) -> tuple[list[str], int]:
        found = translator.translate(texts, beam_size=beam)
        return [one.text for one in found], sum(len(one.tokens) for one in found)

    return translate


def _onnxruntime(path: str) -> Any:
    from cvmk.inference.onnx_runner import OnnxRunner

    runner = OnnxRunner(path, threads=1)

    def translate(texts: list[str], beam: int) -> tuple[list[str], int]:
        found = runner.translate(texts, beam_size=beam)
        return [runner.tokenizer.decode(pieces) for pieces in found], sum(map(len, found))

    return translate


def _ctranslate2(path: str, compute_type: str, original: str) -> Any:
    import ctranslate2

    from cvmk.formats import load_model_tokenizer, read_model_manifest

    folder, manifest, _ = read_model_manifest(original)
    tokenizer = load_model_tokenizer(folder, manifest)
    translator = ctranslate2.Translator(path, device="cpu", compute_type=compute_type, intra_threads=1, inter_threads=1)

    def translate(texts: list[str], beam: int) -> tuple[list[str], int]:
        pieces = [[NAMES.get(piece, f"t{piece}") for piece in tokenizer.encode(text.strip())] for text in texts]
        limit = 2 * max(map(len, pieces)) + 20
        found = translator.translate_batch(pieces, beam_size=beam, max_batch_size=4096 // beam, batch_type="tokens", max_decoding_length=limit)
        ids = [[int(piece[1:]) for piece in one.hypotheses[0] if piece not in NAMES.values()] for one in found]
        return [tokenizer.decode(one) for one in ids], sum(map(len, ids))

    return translate


def _high_water() -> int:
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "calibrate", "source", "reference"):
        parser.add_argument(name)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for row in _table(arguments, Path(name)):
            print("| " + " | ".join(row) + " |", flush=True)


def _table(arguments: argparse.Namespace, work: Path) -> Any:
    from cvmk.formats import load_model_folder, save_model_folder
    from cvmk.inference import Translator
    from cvmk.quantization import Recipe, quantize_model, read_pairs

    model, tokenizer, _ = load_model_folder(arguments.model)
    rows = _Rows(arguments, work, 4 * sum(parameter.numel() for parameter in model.parameters()))
    yield ("scheme", "method", "engine", "size", "BLEU, greedy", "BLEU, beam 4", "tokens/s", "peak memory, MB")
    yield ("---",) * 8
    yield from rows.of("float32", "", arguments.model, "float32")
    yield from rows.of("bfloat16", "at loading", arguments.model, "bfloat16", ("native",))
    calibration = read_lines(arguments.calibrate)
    pairs = read_pairs(calibration, Translator.of_weights(model, tokenizer), 128)
    for scheme, method in ROWS:
        name, _, more = scheme.partition(" ")
        recipe = Recipe(name, method, static=more == "static", kv_cache="int8" if more == "byte caches" else "float")  # type: ignore[arg-type]
        out = work / f"{scheme}-{method}"
        save_model_folder(out, quantize_model(model, recipe, pairs).build(), tokenizer, "")
        yield from rows.of(scheme, method, str(out), "auto")
    yield from rows.onnxruntime(calibration)
    yield from rows.ctranslate2(model)


class _Rows:
    """Rows of the table: what each engine that is asked for makes of a model, a process each. `whole`: bytes of the weights in float32."""

    def __init__(self, arguments: argparse.Namespace, work: Path, whole: int) -> None:
        self._model, self._texts, self._engines = arguments.model, (arguments.source, arguments.reference), arguments.engines
        self._work, self._whole = work, whole

    def of(self, scheme: str, method: str, path: str, compute_type: str, engines: tuple[str, ...] = ("native", "torch", "onnxruntime")) -> Any:
        from cvmk.formats import resolve_model_folder
        from cvmk.formats.folder import WEIGHTS
        from cvmk.formats.onnx import export_onnx

        for engine in (engine for engine in engines if engine in self._engines):
            if engine != "onnxruntime":
                yield self._row(scheme, method, engine, path, compute_type, [resolve_model_folder(path) / WEIGHTS])
            elif _has("onnx", "onnxruntime"):
                export_onnx(path, self._work / "onnx")
                yield self._graphs(scheme, method)

    def onnxruntime(self, calibration: list[str]) -> Any:
        """Its own 8 bits."""
        if "onnxruntime" in self._engines and _has("onnx", "onnxruntime"):
            from cvmk.quantization.onnx_runtime import export_quantized_onnx

            for mode, kept in (("dynamic", []), ("static", calibration)):
                export_quantized_onnx(self._model, self._work / "onnx", mode, calibration=kept)  # type: ignore[arg-type]
                yield self._graphs("int8", mode)

    def ctranslate2(self, model: Any) -> Any:
        import ctranslate2_peer

        if "CTranslate2" in self._engines and ctranslate2_peer.available() is None:
            out = self._work / "ct2"
            ctranslate2_peer.export(model, out)
            for kind in ("float32", "int8"):  # the file is in float32; int8 is what it becomes when it is loaded
                yield self._row(kind, "at loading", "CTranslate2", str(out), kind, [out / "model.bin"])

    def _graphs(self, scheme: str, method: str) -> tuple[str, ...]:
        folder = self._work / "onnx"
        return self._row(scheme, method, "onnxruntime", str(folder), "", [file for file in folder.iterdir() if ".onnx" in file.name])

    def _row(self, scheme: str, method: str, engine: str, path: str, compute_type: str, files: list[Path]) -> tuple[str, ...]:
        command = [sys.executable, __file__, "--measure", engine, path, compute_type, self._model, *self._texts]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found, size = json.loads(done.stdout.splitlines()[-1]), sum(file.stat().st_size for file in files) / self._whole
        numbers = (f"{size:.3f}", f"{found['greedy']:.2f}", f"{found['beam']:.2f}", f"{found['rate']:.0f}", f"{found['memory'] / 1e6:.0f}")
        return (scheme, method, engine, *numbers)


def _has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main()
