"""What rounding costs each matrix on text that calibration did not see: `python benchmarks/quantization_noise.py MODEL CALIBRATE SRC` prints a table.

For every scheme and method the mean signal-to-noise ratio of the matrices in dB, on the calibration inputs and on those of SRC, and the matrix that
is furthest below what rounding to nearest makes of it on SRC.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from cvmk.cli._streams import read_lines
from cvmk.formats import load_model_folder
from cvmk.inference import Translator
from cvmk.quantization import Recipe, collect, quantize_model, read_pairs
from cvmk.quantization.calibration import Pair
from cvmk.quantization.model import Quantized, signal_to_noise
from cvmk.quantization.sites import matrix, sites

ROWS = {
    "w8a8": ("rtn", "smoothquant", "gptq"),
    "w8a8 static": ("rtn", "smoothquant", "gptq"),
    "w4a16": ("rtn", "gptq", "awq"),
    "w4a8": ("rtn", "smoothquant", "gptq", "awq"),
}


def held_out(quantized: Quantized, pairs: Sequence[Pair]) -> dict[str, float]:
    """The ratio in dB of each matrix that multiplies something, of the inputs that it has on these pairs."""
    model = quantized.model
    chosen = [site for site in sites(model) if site.name in quantized.names and site.module is not None]
    statistics, built = collect(model, chosen, pairs), quantized.build()
    found = {}
    for site in chosen:
        layer = built.get_submodule(site.module or "") if not site.looked_up else built.embeddings.source
        weight, inputs = matrix(model, site.name), statistics[site.name]
        found[site.name] = signal_to_noise(weight, layer.weight, inputs, layer.activations, layer.smooth_scale, layer.input_range)
    return found


def mean(ratios: Mapping[str, float]) -> float:
    return sum(ratios.values()) / len(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "calibrate", "source"):
        parser.add_argument(name)
    parser.add_argument("--sentences", type=int, default=128, help="calibration sentences")
    arguments = parser.parse_args()
    model, tokenizer, _ = load_model_folder(arguments.model)
    translator = Translator.of_weights(model, tokenizer)
    calibration = read_pairs(read_lines(arguments.calibrate), translator, arguments.sentences)
    unseen = read_pairs(read_lines(arguments.source), translator, 1000)
    print("| scheme | method | dB, calibration | dB, unseen | furthest below rounding to nearest, unseen |\n|---|---|---|---|---|", flush=True)
    for scheme, methods in ROWS.items():
        nearest: dict[str, float] = {}
        for method in methods:
            name, _, static = scheme.partition(" ")
            quantized = quantize_model(model, Recipe(name, method, static=bool(static)), calibration)  # type: ignore[arg-type]
            seen, found = held_out(quantized, calibration), held_out(quantized, unseen)
            nearest = nearest or found
            name = min(found, key=lambda one: found[one] - nearest[one])
            worst = "" if method == "rtn" else f"{name.removesuffix('.weight')} {found[name] - nearest[name]:+.2f}"
            print(f"| {scheme} | {method} | {mean(seen):.2f} | {mean(found):.2f} | {worst} |", flush=True)


if __name__ == "__main__":
    main()
