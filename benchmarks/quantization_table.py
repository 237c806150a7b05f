"""Quantised models beside what they were made of: `python benchmarks/quantization_table.py MODEL CALIBRATE SRC REF` prints a table in Markdown.

Every row is a process of its own, on one thread: size of the weights beside float32, BLEU (greedy, and beam 4), tokens of the beam search a second of the
processor's time, and the most memory that the process held above what it holds before it loads engine and model. CTranslate2's rows are there where it is
installed and can represent the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cvmk.cli._streams import read_lines

ROWS = [
    ("w8a8", "rtn"), ("w8a8", "smoothquant"), ("w8a8", "gptq"), ("w4a16", "rtn"), ("w4a16", "gptq"), ("w4a16", "awq"),
    ("w4a8", "rtn"), ("w4a8", "smoothquant"), ("w4a8", "gptq"), ("w4a8", "awq"),
]  # fmt: skip
NAMES = {0: "<blank>", 1: "<unk>", 2: "<s>", 3: "</s>"}
"""As `ctranslate2_peer.export` calls the special pieces; the others are t4, t5, ..."""


def measure(kind: str, path: str, compute_type: str, original: str, source: str, reference: str) -> dict[str, Any]:
    """In a process of its own: what one engine makes of a model."""
    sources, references = read_lines(source), read_lines(reference)
    before = _high_water()
    translate = _ctranslate2(path, compute_type, original) if kind == "CTranslate2" else _cvmk(kind, path, compute_type)
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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for row in _table(arguments, Path(name)):
            print("| " + " | ".join(row) + " |", flush=True)


def _table(arguments: argparse.Namespace, work: Path) -> Any:
    from cvmk.formats import load_model_folder, resolve_model_folder, save_model_folder
    from cvmk.formats.folder import WEIGHTS
    from cvmk.inference import Translator
    from cvmk.quantization import Recipe, quantize_model, read_pairs

    model, tokenizer, _ = load_model_folder(arguments.model)
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    texts, size = (arguments.source, arguments.reference), (resolve_model_folder(arguments.model) / WEIGHTS).stat().st_size / whole
    yield ("scheme", "method", "engine", "size", "BLEU, greedy", "BLEU, beam 4", "tokens/s", "peak memory, MB")
    yield ("---",) * 8
    yield from _rows("float32", "", {"native": (arguments.model, "float32"), "torch": (arguments.model, "float32")}, size, arguments.model, texts)
    yield from _rows("bfloat16", "at loading", {"native": (arguments.model, "bfloat16")}, size, arguments.model, texts)
    pairs = read_pairs(read_lines(arguments.calibrate), Translator.of_weights(model, tokenizer), 128)
    for scheme, method in ROWS:
        out = work / f"{scheme}-{method}"
        save_model_folder(out, quantize_model(model, Recipe(scheme, method), pairs).build(), tokenizer, "")  # type: ignore[arg-type]
        engines = {"native": (str(out), "auto"), "torch": (str(out), "auto")}
        yield from _rows(scheme, method, engines, (out / WEIGHTS).stat().st_size / whole, arguments.model, texts)
    import ctranslate2_peer

    if ctranslate2_peer.available() is None:
        ctranslate2_peer.export(model, work / "ct2")
        stored = (work / "ct2" / "model.bin").stat().st_size / whole  # in float32; int8 is what it becomes when it is loaded
        for kind in ("float32", "int8"):
            yield from _rows(kind, "at loading", {"CTranslate2": (str(work / "ct2"), kind)}, stored, arguments.model, texts)


def _rows(scheme: str, method: str, engines: dict[str, tuple[str, str]], size: float, original: str, texts: tuple[str, str]) -> Any:
    for engine, (path, compute_type) in engines.items():
        command = [sys.executable, __file__, "--measure", engine, path, compute_type, original, *texts]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        numbers = (f"{size:.3f}", f"{found['greedy']:.2f}", f"{found['beam']:.2f}", f"{found['rate']:.0f}", f"{found['memory'] / 1e6:.0f}")
        yield (scheme, method, engine, *numbers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main()
