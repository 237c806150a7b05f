"""`cvmk train CONFIG.toml`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cvmk.cli._commands import command
from cvmk.cli._streams import read_whole

HELP = "train a translation model: a teacher, distilled into a student"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="the configuration; - is standard input")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; may be repeated")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in run.folder from its last checkpoint")
    again.add_argument("--restart", action="store_true", help="set the run in run.folder aside under another name and start anew")
    parser.add_argument("--explain-config", action="store_true", help="print every key with its default and meaning, and stop")
    parser.add_argument("--check", action="store_true", help="check the configuration, and stop")
    parser.add_argument("--json", action="store_true", help="print the training report as JSON on stdout")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.config.loading import explain_config, parse_config
    from cvmk.config.overrides import with_overrides
    from cvmk.config.schema import TrainConfig
    from cvmk.errors import ConfigError

    if arguments.explain_config:
        print(explain_config())
        return 0
    if arguments.config is None:
        raise ConfigError("name a configuration file, for example `cvmk train examples/quickstart.toml`")
    text, name = read_whole(arguments.config)
    config = parse_config(TrainConfig, text, name, arguments.overrides)
    if arguments.check:
        print(f"{name} is a valid configuration")
        return 0

    from cvmk.hardware import keep_freed_memory
    from cvmk.telemetry import reporter
    from cvmk.training.pipeline import train
    from cvmk.training.trainer import Interrupted

    keep_freed_memory()
    try:
        report = train(config, with_overrides(text, arguments.overrides), reporter(), resume=arguments.resume, restart=arguments.restart)
    except Interrupted as interruption:
        print(f"cvmk: {interruption}; go on with: {command('train', Path(config.run.folder) / 'config.toml', '--resume')}", file=sys.stderr)
        raise
    if arguments.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(report, config.run.folder)
    return 0


def _show(report: dict[str, Any], folder: str) -> None:
    from cvmk.training.report import score_lines

    result = report["test"] or report["validation"]
    name = "held-out test" if report["test"] else "validation"
    print(f"\n{report['title']}: {report['parameters'] / 1e6:.2f} M parameters, {report['iterations']} iterations, "
          f"{report['throughput']['target_tokens_per_second']:.0f} target tokens/s; {report['weights']}")
    if report["teacher"] is not None and report["teacher"].get("test" if report["test"] else "validation"):
        scores = report["teacher"]["test" if report["test"] else "validation"]
        words = ", ".join(f"{score['metric']} {score['value']:.2f}" for score in scores)
        print(f"its teacher: {report['teacher']['parameters'] / 1e6:.2f} M parameters, {words}")
    print(f"\nScores on the {name} set ({result['sentences']} sentences):")
    print("\n".join(score_lines(result)))
    print("\nSample translations:")
    for sample in result["samples"]:
        print(f"  {sample['source']}\n    -> {sample['hypothesis']}\n    == {sample['reference']}")
    print("\nNext:")
    model = Path(folder) / "model"
    print(f'  echo "Good morning." | {command("translate", model)}')
    print(f"  {command('validate', model)} --source FILE --reference FILE")
    print("  cvmk doctor                    which kernels run on this machine")
    print("  cvmk train --explain-config    every key, for a configuration of your own")
