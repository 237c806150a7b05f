"""`cvmk report RUN...`: what runs were, what they reached, how they differ, and what to do next."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cvmk.cli._arguments import samples, share
from cvmk.cli._terminal import as_text, complain, show, show_json

HELP = "write a report of runs: one HTML page, Markdown and JSON, with significance, curves, samples and recommendations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "folder of a run, finished or not, of the teacher in one, of a search (for its best trials), or of a quantised model"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=kinds)
    parser.add_argument("--baseline", metavar="RUN", help="the run that the others are compared with; default: the first one")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="name of the files, OUT.html, OUT.md and OUT.json; default: report in the run's folder, of several here"
    )
    parser.add_argument("--benchmarks", nargs="+", default=[], metavar="FILE", help="timings to show: JSON of `cvmk bench --json` or of benchmarks/")
    parser.add_argument("--bootstrap", type=samples, default=1000, metavar="N", help="resamples of the bootstrap; default: 1000")
    parser.add_argument("--confidence", type=share, default=0.95, metavar="SHARE", help="confidence of the intervals; default: 0.95")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object on stdout too, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.report import figures_of, outputs, write_report

    baseline = [] if arguments.baseline is None else [arguments.baseline]
    several = len({os.path.realpath(folder) for folder in [*baseline, *arguments.runs]}) > 1
    out = arguments.output or (Path("report") if several else Path(arguments.runs[0]) / "report")
    outputs(out)  # a wrong name is told before the work is done
    figures = figures_of(
        arguments.runs, baseline=arguments.baseline, bootstrap=arguments.bootstrap, confidence=arguments.confidence, benchmarks=arguments.benchmarks
    )
    paths = write_report(figures, out)
    for text in dict.fromkeys([*(text for run in figures.runs for text in run.problems), *figures.problems]):
        complain(text)
    if arguments.json:
        show_json(figures.to_json())
        return 0
    for advice in figures.advice:
        show(as_text(f"{advice.about}: {advice.text} [{advice.rule}]"))
    show(f"{paths[0]} (and {', '.join(path.name for path in paths[1:])})")
    return 0
