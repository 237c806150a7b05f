"""`cvmk quantize MODEL --scheme S --calibrate FILE --evaluate SRC REF -o OUT`: a smaller model, and what that costs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from cvmk.cli._arguments import number, points, positive, samples
from cvmk.cli._log import add_log, events_into
from cvmk.cli._streams import read_lines
from cvmk.cli._terminal import complain, show, show_json, table
from cvmk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cvmk.quantization import Recover

HELP = "Compress a model to 8 or 4 bits, and refuse one that translates worse."
_BEST = {"w8a8": "smoothquant", "w4a16": "gptq", "w4a8": "gptq"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Quantise a model, and compare it with what it was on an evaluation set. A model that loses more than --max-drop gets its most "
    parser.description += "sensitive matrices in a higher precision, one by one; if that is not enough the exit code is 3 and nothing is written."
    parser.add_argument("model", metavar="MODEL", help="folder of a model or of a run; it stays as it is")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write, whole or not at all")
    parser.add_argument(
        "--scheme", default="w8a8", choices=tuple(_BEST),
        help="w8a8 (default): weights and activations in 8 bits; w4a16: weights in 4 bits; w4a8: weights in 4 bits, activations in 8",
    )  # fmt: skip
    parser.add_argument("--method", choices=("smoothquant", "gptq", "awq", "rtn"), help="default: smoothquant for w8a8, gptq for the others")
    parser.add_argument("--calibrate", required=True, metavar="FILE", help="sentences of the source language, one a line, such as `cvmk coreset` chooses")
    parser.add_argument("--calibration-sentences", type=positive, default=128, metavar="N", help="how many of them are used (default 128)")
    parser.add_argument("--evaluate", required=True, nargs=2, metavar=("SRC", "REF"), help="the evaluation set: sentences and their reference translations")
    parser.add_argument("--beam-size", type=positive, default=1, metavar="N", help="beam of its translations (default 1, greedy)")
    parser.add_argument("--max-drop", type=points, default=0.3, metavar="X", help="points of BLEU that may be lost (default 0.3)")
    parser.add_argument("--max-raised", type=_count, metavar="N", help="matrices that may get a higher precision (default: a quarter of them)")
    parser.add_argument(
        "--keep", nargs="+", default=[], choices=("embeddings", "output", "cross"), help="parts that stay floats: embeddings, output layer, cross-attention"
    )
    parser.add_argument(
        "--activations", default="token", choices=("token", "static"),
        help="w8a8: 8 bits by each token's largest magnitude (default), or by one a layer that calibration finds",
    )  # fmt: skip
    parser.add_argument(
        "--kv-cache", default="float", choices=("float", "int8"),
        help="int8: the decoder keeps keys and values in bytes, a scale for each head's of a position (default: as floats)",
    )  # fmt: skip
    parser.add_argument("--group-size", type=int, default=0, choices=(32, 64, 128), help="inputs of a scale, of 4-bit weights (default: 64, w4a8: 32)")
    parser.add_argument("--symmetric", action="store_true", help="4-bit weights without zero points (w4a8 has none anyway)")
    parser.add_argument("--damping", type=number, default=0.01, metavar="X", help="gptq: share of the mean that is added to the diagonal (default 0.01)")
    parser.add_argument("--in-order", action="store_true", help="gptq: round inputs in their own order, not the largest first")
    parser.add_argument("--moving-groups", action="store_true", help="gptq: scales of a group as its weights have become, not as they were")
    parser.add_argument(
        "--recover", type=positive, metavar="STEPS",
        help="train the quantised model through its rounding to say what the model before says; what is best on held-out text comes to the gate",
    )  # fmt: skip
    parser.add_argument(
        "--train", nargs=2, metavar=("SRC", "TGT"), help="--recover: pairs to train on (default: the calibration text and the model's own translations of it)"
    )
    parser.add_argument("--recover-every", type=positive, default=500, metavar="N", help="--recover: steps between two validations (default 500)")
    parser.add_argument("--recover-rate", type=number, default=1e-4, metavar="X", help="--recover: peak learning rate (default 1e-4)")
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="--recover: the order of the text (default 0)")
    parser.add_argument("--bootstrap", type=samples, default=1000, metavar="N", help="resamples of the bootstrap (default 1000)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all that the process may use)")
    add_log(parser)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on stdout, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.quantization.quantize import GateFailure, quantize
    from cvmk.quantization.recipe import Recipe

    method: Any = arguments.method or _BEST[arguments.scheme]
    recipe = Recipe(
        arguments.scheme, method, arguments.group_size, True if arguments.symmetric else None,
        tuple(dict.fromkeys(arguments.keep)), arguments.damping, not arguments.in_order, not arguments.moving_groups, arguments.activations == "static",
        arguments.kv_cache,
    )  # fmt: skip
    _threads(arguments.threads)
    calibration = read_lines(arguments.calibrate)
    sources, references = _aligned(*arguments.evaluate)
    recover = _recovery(arguments)
    failure = None
    with events_into(arguments.log) as tell, contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        try:
            report = quantize(
                arguments.model, arguments.output, recipe, calibration=calibration, sources=sources, references=references,
                calibration_sentences=arguments.calibration_sentences, max_drop=arguments.max_drop, max_raised=arguments.max_raised,
                beam_size=arguments.beam_size, bootstrap=arguments.bootstrap, calibration_name=arguments.calibrate, recover=recover, say=complain,
                tell=tell,
            )  # fmt: skip
        except GateFailure as error:
            failure, report = error, error.report
    if arguments.json:
        show_json(report)
    else:
        show(text_of(report, None if failure else arguments.output))
    if failure is not None:
        raise failure
    return 0


def _recovery(arguments: argparse.Namespace) -> Recover | None:
    """What --recover and its options ask for."""
    if arguments.recover is None:
        if arguments.train is not None:
            raise ConfigError("--train is the text of a recovery: give --recover STEPS too, or leave it out")
        return None
    from cvmk.training.recovery import Recovery

    pairs = None if arguments.train is None else _aligned(*arguments.train)
    return Recovery(arguments.recover, arguments.recover_every, pairs, arguments.recover_rate, seed=arguments.seed)


def _aligned(source: str, reference: str) -> tuple[list[str], list[str]]:
    """The lines of two files. Raises DataError where they are not equally many."""
    sources, references = read_lines(source), read_lines(reference)
    if len(sources) != len(references):
        raise DataError(f"{source} has {len(sources)} lines but {reference} has {len(references)}: the two files must be aligned line by line")
    return sources, references


def text_of(report: dict[str, Any], out: str | None) -> str:
    """The report for people; `out` is where the model is, None where it was not written."""
    from cvmk.report.quantization import facts, layer_rows, score_rows

    parts = [table(score_rows(report)), "\n".join(facts(report)), table(layer_rows(report))]
    if report["changed"]:
        shown = [f"{one['line']}: {one['source']}\n   before  {one['before']}\n   after   {one['after']}" for one in report["changed"]]
        parts.append("The sentences that changed most\n" + "\n".join(shown))
    parts.append("Nothing was written." if out is None else f"{out}: {report['recipe']['scheme']} by {report['recipe']['method']}")
    return "\n\n".join(parts)


def _threads(threads: int | None) -> None:
    from cvmk.config.section import MAX_THREADS

    if threads is None:
        return
    if threads > MAX_THREADS:
        raise ConfigError(f"--threads is {threads}, and must be at most {MAX_THREADS}")
    import torch

    torch.set_num_threads(threads)


def _count(text: str) -> int:
    found = int(text)
    if found < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative: give 0 or more")
    return found


_count.__name__ = "whole number"
