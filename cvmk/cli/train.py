"""`cvmk train CONFIG.toml`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cvmk.cli._streams import need_open, read_whole
from cvmk.cli._terminal import as_text, complain, show, show_json

HELP = "train a translation model: a teacher, distilled into a student"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="the configuration; - is standard input")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; may be repeated")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in run.folder from its last checkpoint")
    again.add_argument("--restart", action="store_true", help="set the run in run.folder aside under another name and start anew")
    parser.add_argument("--explain-config", action="store_true", help="print every key with its default and meaning, and stop")
    parser.add_argument("--check", action="store_true", help="check the configuration, and stop")
    parser.add_argument("--profile", action="store_true", help="watch some iterations, and write where their time goes to profile/ in run.folder")
    parser.add_argument("--json", action="store_true", help="print the training report as JSON on stdout")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.config.loading import explain_config, parse_config
    from cvmk.config.overrides import with_overrides
    from cvmk.config.schema import TrainConfig, check_packages
    from cvmk.errors import ConfigError
    from cvmk.validation.tokenization import check_tokenizer

    if arguments.explain_config or arguments.check or arguments.json:
        need_open(sys.stdout, "output")
    if arguments.explain_config:
        show(explain_config())
        return 0
    if arguments.config is None:
        raise ConfigError("name a configuration file, for example `cvmk train examples/quickstart.toml`")
    text, name = read_whole(arguments.config)
    overrides = [as_text(override) for override in arguments.overrides]
    config = parse_config(TrainConfig, text, name, overrides)
    if arguments.check:
        check_packages(config)
        check_tokenizer(config.validation.bleu_tokenize, "validation.bleu_tokenize")
        show(f"{name} is a valid configuration")
        return 0

    from cvmk.hardware import keep_freed_memory
    from cvmk.telemetry import reporter
    from cvmk.telemetry.commands import command
    from cvmk.training.pipeline import train
    from cvmk.training.trainer import Interrupted

    keep_freed_memory()
    try:
        report = train(config, with_overrides(text, overrides), reporter(), resume=arguments.resume, restart=arguments.restart, profile=arguments.profile)
    except Interrupted as interruption:
        complain(f"{interruption}; go on with: {command('train', Path(config.run.folder) / 'config.toml', '--resume')}")
        raise
    if arguments.json:
        show_json(report, indent=None)
    else:
        show(_summary(report, config.run.folder))
    return 0


def _summary(report: dict[str, Any], folder: str) -> str:
    from cvmk.report.names import REPORT
    from cvmk.telemetry.commands import command
    from cvmk.training.report import score_lines

    name = "test" if report["test"] else "validation"
    result = report[name]
    lines = [
        f"\n{report['title']}: {report['parameters'] / 1e6:.2f} M parameters, {report['iterations']} iterations, "
        f"{report['throughput']['target_tokens_per_second']:.0f} target tokens/s; {report['weights']}"
    ]
    if report["teacher"] is not None and report["teacher"].get(name):
        words = _teacher_scores(report["teacher"][name], result["scores"])
        lines.append(f"its teacher: {report['teacher']['parameters'] / 1e6:.2f} M parameters, {words}")
    lines += [f"\nScores on the {'held-out test' if report['test'] else name} set ({result['sentences']} sentences):", *score_lines(result)]
    lines.append("\nSample translations:")
    lines += [f"  {sample['source']}\n    -> {sample['hypothesis']}\n    == {sample['reference']}" for sample in result["samples"]]
    model, page = Path(folder) / "model", Path(folder) / f"{REPORT}.html"
    return "\n".join([
        *lines,
        "\nNext:",
        *([f"  {page}: what it reached, and what to do next"] if page.exists() else []),
        f'  echo "Good morning." | {command("translate", model)}',
        f"  {command('validate', model)} --source FILE --reference FILE",
        "  cvmk doctor                    which kernels run on this machine",
        "  cvmk train --explain-config    every key, for a configuration of your own",
    ])  # fmt: skip


def _teacher_scores(scores: list[dict[str, Any]], students: list[dict[str, Any]]) -> str:
    """The teacher's scores; those that were made in another way than the student's cannot stand beside them without a word."""
    ours = {score["metric"]: score["signature"] for score in students}
    return ", ".join(
        f"{score['metric']} {score['value']:.2f}"
        + ("" if ours.get(score["metric"], score["signature"]) == score["signature"] else f" (not comparable: {score['signature']})")
        for score in scores
    )
