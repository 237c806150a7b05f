"""`cvmk coreset FILE --count N -o OUT`: a few sentences that stand for a corpus, to calibrate with."""

from __future__ import annotations

import argparse

from cvmk.cli._arguments import positive
from cvmk.cli._streams import each_line
from cvmk.cli._terminal import show
from cvmk.errors import ConfigError, DataError

HELP = "Choose a few sentences of a corpus, to calibrate a quantised model with."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Choose sentences that stand for a corpus of any size, in one pass with bounded memory: by coverage of its distinct n-grams, "
    parser.description += "at random, or half and half."
    parser.add_argument("file", metavar="FILE", help="one sentence a line, plain or compressed; - is standard input")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="file to write, whole or not at all, one sentence a line in the corpus' order")
    parser.add_argument("--count", type=positive, default=128, metavar="N", help="sentences to choose (default 128)")
    parser.add_argument("--by", default="mix", choices=("coverage", "random", "mix"), help="coverage of distinct n-grams, random, or mix: half and half")
    parser.add_argument("--ngrams", nargs="+", type=positive, default=[1, 2, 3], metavar="N", help="lengths of n-grams in words (default 1 2 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice (default 0)")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.files import write_text
    from cvmk.text.coreset import choose

    if not 0 <= arguments.seed < 2**64:
        raise ConfigError(f"--seed is {arguments.seed}, and must be from 0 to 2^64 - 1")
    found = choose(each_line(arguments.file), arguments.count, arguments.by, orders=arguments.ngrams, seed=arguments.seed)
    if not found.sentences:
        raise DataError(f"{arguments.file} has no sentences: give text, one sentence a line")
    write_text(arguments.output, "".join(f"{text}\n" for _, text in found.sentences))
    said = f"{arguments.output}: {len(found.sentences)} of {found.lines} sentences"
    if found.distinct is not None and found.covered is not None:
        said += f"; of some {found.distinct:.0f} distinct n-grams {100 * found.covered:.1f}% of a sample are in them"
    show(said)
    return 0
