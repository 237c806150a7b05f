"""`cvmk export MODEL --to FORMAT -o OUT`: a model in the format of another engine, and how alike the two translate."""

from __future__ import annotations

import argparse
from typing import Any

from cvmk.cli._arguments import positive
from cvmk.cli._streams import read_lines
from cvmk.cli._terminal import show, show_json
from cvmk.errors import ConfigError

HELP = "Write a model in the format of another engine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a model in CTranslate2's format; 8-bit weights stay what they are. "
    parser.description += "What CTranslate2 cannot represent is refused with the reasons."
    parser.add_argument("model", metavar="MODEL", help="folder of a model or of a run")
    parser.add_argument("--to", required=True, choices=("ctranslate2",), help="the format")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write, whole or not at all")
    parser.add_argument("--verify", type=positive, metavar="N", help="translate N sentences of --source with both engines, compare, and write OUT/verify.json")
    parser.add_argument("--source", metavar="FILE", help="the sentences of --verify, one a line, plain or compressed")
    parser.add_argument("--json", action="store_true", help="print what --verify found as one JSON object on stdout, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.files import write_json
    from cvmk.formats.ctranslate2 import export_ctranslate2

    if (arguments.verify is None) != (arguments.source is None):
        raise ConfigError("--verify N and --source FILE go together: give both or neither")
    texts = [] if arguments.source is None else [text for text in read_lines(arguments.source) if text.strip()][: arguments.verify]
    export_ctranslate2(arguments.model, arguments.output)
    if not texts:
        show_json({"output": arguments.output}) if arguments.json else show(f"{arguments.output}: a model of CTranslate2")
        return 0
    from cvmk.inference.ctranslate2_check import compare

    found: dict[str, Any] = compare(arguments.model, arguments.output, texts)
    write_json(f"{arguments.output}/verify.json", found)
    if arguments.json:
        show_json(found)
    else:
        said = f"{found['identical']} of {found['sentences']} sentences have the same pieces"
        if found["largest"] is not None:
            said += f"; their log-probabilities differ by at most {found['largest']:.1e} (99% of them by {found['percentile_99']:.1e})"
        show(f"{arguments.output}: a model of CTranslate2; {said}")
    return 0
