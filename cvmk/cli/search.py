"""`cvmk search CONFIG.toml`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from cvmk.cli._arguments import positive
from cvmk.cli._streams import need_open, read_whole
from cvmk.cli._terminal import as_text, complain, show, show_json, table

if TYPE_CHECKING:
    from cvmk.search.result import SearchResult

HELP = "search for the best values of configuration keys: trials proposed and pruned by Optuna"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train trials of a configuration with other values of some keys, as its table [search] says, until a budget is used up. "
    parser.description += "A search that was interrupted goes on with the same command."
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="a training configuration with a table [search]; - is standard input")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; may be repeated")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="trials that run at once on this machine (default 1)")
    parser.add_argument("--explain-config", action="store_true", help="print every key with its default and meaning, and stop")
    parser.add_argument("--check", action="store_true", help="check the configuration and the space, and stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.config.loading import explain_config
    from cvmk.config.schema import check_packages
    from cvmk.config.search import SearchDocument
    from cvmk.errors import ConfigError
    from cvmk.search.run import Search, SearchInterrupted
    from cvmk.search.setup import parse_search
    from cvmk.search.study import library
    from cvmk.search.table import view
    from cvmk.telemetry import EventStream, RunLog
    from cvmk.telemetry.commands import command
    from cvmk.validation.tokenization import check_tokenizer

    if arguments.explain_config or arguments.check or arguments.json:
        need_open(sys.stdout, "output")
    if arguments.explain_config:
        show(explain_config(SearchDocument))
        return 0
    if arguments.config is None:
        raise ConfigError("name a configuration file, for example `cvmk search examples/search.toml`")
    text, name = read_whole(arguments.config)
    overrides = [as_text(override) for override in arguments.overrides]
    found = parse_search(text, name, overrides)
    check_tokenizer(found.config.validation.bleu_tokenize, "validation.bleu_tokenize")
    check_packages(found.config)
    library()
    if arguments.check:
        show(f"{name} is a valid configuration of a search over {', '.join(found.space.keys)}")
        return 0
    search = Search(found, lambda folder: EventStream(RunLog(folder), [view()]), workers=arguments.workers)
    try:
        result = search.run()
    except SearchInterrupted:
        options = [word for override in overrides for word in ("--set", override)]
        options += ["--workers", str(arguments.workers)] if arguments.workers > 1 else []
        complain(f"the search is interrupted, no trial is lost; go on with: {command('search', arguments.config, *options)}")
        raise
    if arguments.json:
        show_json(result.to_dict(), indent=None)
    else:
        show(summary(result))
    return 0


def summary(result: SearchResult) -> str:
    from cvmk.search.table import shown
    from cvmk.telemetry.commands import command

    counts = ", ".join(f"{count} {state}" for state, count in result.counts().items())
    rows = [("key", "best", "importance")]
    for key, value in result.best.parameters.items():
        share = result.importances.get(key)
        rows.append((key, shown(value), "" if share is None else f"{share:.2f}"))
    return "\n".join([
        f"\n{result.study}: {counts}; {result.reason}",
        f"best: trial {result.best.number}, {result.metric} {result.best.value:.2f} on the validation set\n",
        table(rows),
        "\nNext:",
        f"  {command('train', result.configuration)}    the best configuration, as it is",
        f"  {command('report', result.folder)}    all trials, and how the best ones differ",
        f"  {result.folder}/plots: history, importances, parameters; {result.folder}/search_report.json: all trials",
    ])  # fmt: skip
