"""Does it matter which sentences a model is calibrated on? `python benchmarks/coreset_study.py MODEL TRAIN.SRC SRC REF` prints a table.

For random sentences, a core-set by coverage, and the mix (`cvmk coreset`), 16 to 256 of them, five seeds: the mean signal-to-noise ratio of the matrices
on held-out inputs (the second half of SRC, as the model translates it), and BLEU on SRC, mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from quantization_noise import held_out, mean

from cvmk.cli._streams import read_lines
from cvmk.formats import load_model_folder
from cvmk.inference import Translator
from cvmk.quantization import Recipe, quantize_model, read_pairs
from cvmk.text.coreset import choose
from cvmk.validation.metrics import score

RECIPES = [Recipe("w8a8", "smoothquant"), Recipe("w4a8", "gptq", 32)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "train", "source", "reference"):
        parser.add_argument(name)
    parser.add_argument("--counts", nargs="+", type=int, default=[16, 32, 64, 128, 256])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer, _ = load_model_folder(arguments.model)
    translator = Translator.of_weights(model, tokenizer)
    train, sources, references = (read_lines(path) for path in (arguments.train, arguments.source, arguments.reference))
    unseen = read_pairs(sources[len(sources) // 2 :], translator, 256)
    whole = score("bleu", [one.text for one in translator.translate(sources)], references).value
    print(f"float32: BLEU {whole:.2f}\nscheme method      sentences  by        dB held out    BLEU difference", flush=True)
    for recipe in RECIPES:
        for count in arguments.counts:
            for kind in ("random", "coverage", "mix"):
                ratios, drops = [], []
                for seed in range(arguments.seeds):
                    texts = [text for _, text in choose(train, count, kind, seed=seed).sentences]
                    quantized = quantize_model(model, recipe, read_pairs(texts, translator, count))
                    ratios.append(mean(held_out(quantized, unseen)))
                    said = [one.text for one in Translator.of_weights(quantized.build(), tokenizer).translate(sources)]
                    drops.append(score("bleu", said, references).value - whole)
                print(f"{recipe.scheme:6} {recipe.method:12} {count:8}  {kind:9} {_spread(ratios)}  {_spread(drops)}", flush=True)


def _spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    return f"{mean:+6.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()
