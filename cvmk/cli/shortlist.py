"""`cvmk shortlist MODEL --source FILE --target FILE`: which pieces a source may become, so that a step looks at hundreds of pieces."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cvmk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cvmk.text.tokenizers import Tokenizer

HELP = "Make a model's lexical shortlist from aligned text."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Count in aligned text which pieces of the target the pieces of a source become, and write them into the model's folder. "
    parser.description += "`cvmk translate --shortlist` then chooses among these only: faster for large vocabularies; compare the scores with and without it."
    parser.add_argument("model", metavar="MODEL", help="folder of a model or of a run")
    parser.add_argument("--source", required=True, metavar="FILE", help="one sentence a line, plain or compressed: the training text, or a part of it")
    parser.add_argument("--target", required=True, metavar="FILE", help="their translations, line by line")
    parser.add_argument("--per-piece", type=int, default=100, metavar="N", help="pieces of the target for each piece of a source (default 100)")
    parser.add_argument("--frequent", type=int, default=100, metavar="N", help="commonest pieces of the target that may always be said (default 100)")
    parser.add_argument("--lines", type=int, default=1_000_000, metavar="N", help="read at most so many lines (default 1000000)")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.formats import load_model_tokenizer, read_model_manifest
    from cvmk.inference.shortlist import FILE, build_shortlist

    for name in ("per_piece", "frequent", "lines"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, and must be at least 1")
    folder, manifest, _ = read_model_manifest(arguments.model)
    tokenizer = load_model_tokenizer(folder, manifest)
    pairs = list(_pairs(arguments, tokenizer))
    if not pairs:
        raise DataError(f"{arguments.source} and {arguments.target} have no sentences: give aligned text")
    shortlist = build_shortlist(pairs, manifest.vocab_size, arguments.per_piece, arguments.frequent)
    shortlist.save(folder)
    sizes = sorted(len(shortlist.of(source)) for source, _ in pairs)
    said = f"a sentence of them may say {sizes[len(sizes) // 2]} of {manifest.vocab_size} pieces (median)"
    print(f"{folder / FILE}: from {len(pairs)} pairs of sentences; {said}")
    return 0


def _pairs(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    from cvmk.files import open_input
    from cvmk.text.lines import decode_line, trimmed

    with open_input(arguments.source) as source, open_input(arguments.target) as target:
        for number, (a, b) in enumerate(itertools.islice(itertools.zip_longest(source, target), arguments.lines), 1):
            if a is None or b is None:
                shorter = arguments.source if a is None else arguments.target
                raise DataError(f"{shorter} has {number - 1} lines, and the other text has more: give texts that are aligned line by line")
            try:
                yield tokenizer.encode(trimmed(decode_line(a))), tokenizer.encode(trimmed(decode_line(b)))
            except UnicodeDecodeError as error:
                raise DataError(f"line {number} of {arguments.source} or {arguments.target} is not valid UTF-8: convert the text to UTF-8") from error
