"""`cvmk translate MODEL < in > out`: one translation a line, in order, empty lines included."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from cvmk.cli._streams import STANDARD_INPUT, is_standard, need_open, output, standard_input
from cvmk.errors import ConfigError, DataError
from cvmk.files import explained, open_input
from cvmk.hardware import keep_freed_memory
from cvmk.text.lines import decode_line, one_line

if TYPE_CHECKING:
    from cvmk.inference import Translation, Translator
    from cvmk.text.tokenizers import Tokenizer

HELP = "Translate a text, line by line."
LINES_AT_ONCE = 1024
_BLOCK = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Translate a UTF-8 text, one sentence a line: line n of the output is the translation of line n of the input. Empty lines stay empty. "
    parser.description += "Input and output are UTF-8 whatever the locale."
    parser.add_argument("model", metavar="MODEL", help="folder of a model or of a run")
    parser.add_argument("--input", metavar="FILE", help="file to translate, plain or compressed (default, and -: standard input)")
    parser.add_argument("--output", metavar="FILE", help="file to write, whole or not at all (default, and -: standard output)")
    parser.add_argument("--beam-size", type=int, default=1, metavar="N", help="hypotheses a sentence; 1 is greedy search (default)")
    parser.add_argument(
        "--n-best", type=int, default=1, metavar="N", help="with N > 1: N lines a sentence, the best first, each `line number TAB score TAB translation`"
    )
    parser.add_argument("--length-penalty", type=float, default=1.0, metavar="X", help="scores are divided by length ** X (default 1)")
    parser.add_argument("--no-repeat-ngram", type=int, default=0, metavar="N", help="no N words' pieces twice in a translation (default 0: no limit)")
    parser.add_argument("--max-length-a", type=float, default=2.0, metavar="A", help="a translation has at most A * source pieces + B pieces (default 2)")
    parser.add_argument("--max-length-b", type=int, default=20, metavar="B", help="see --max-length-a (default 20)")
    parser.add_argument("--min-length", type=int, default=1, metavar="N", help="a translation has at least N pieces (default 1)")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="pieces that were said already count X times less, in their logits (default 1)"
    )
    parser.add_argument("--patience", type=float, default=1.0, metavar="X", help="a beam search ends when X * beam size hypotheses are finished (default 1)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="above 0: draw pieces at random, flattened by X (default 0: the most probable)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable pieces (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest pieces that have P of the probability (default 1: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument("--shortlist", action="store_true", help="choose only among the pieces of the model's shortlist (`cvmk shortlist`)")
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="source pieces times beam size of a batch (default 4096)")
    parser.add_argument("--on-long", choices=("error", "truncate"), default="error", help="what to do with a line that is too long for the model")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N or auto")
    parser.add_argument("--compute-type", default="auto", help="float32, bfloat16, int8 or int4 (both on a CPU); auto (default): as the model is stored")
    parser.add_argument("--engine", default="auto", help="native, torch, or auto (default): the first that can run the model")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default 0: all that the process may use)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: line, translation, score, truncated, hypotheses")
    parser.add_argument(
        "--alignments", action="store_true",
        help="with --json: source_pieces, the end sign last, and of each hypothesis its pieces and the weight that each gave to each piece of the source",
    )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of input: its number from 1, its text, and the line end that its translation gets."""

    number: int
    text: str
    end: str


def run(arguments: argparse.Namespace) -> int:
    from cvmk.config.section import MAX_THREADS
    from cvmk.inference.options import SearchOptions, scalar_options

    search = {option.name: getattr(arguments, option.name) for option in scalar_options() if option.name != "prefix_bias"}  # nothing here has a prefix
    SearchOptions(**search)
    if arguments.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens is {arguments.batch_tokens}, and must be at least 1")
    if arguments.alignments and not arguments.json:
        raise ConfigError("--alignments are shown in JSON: add --json")
    if not 0 <= arguments.threads <= MAX_THREADS:
        raise ConfigError(f"--threads is {arguments.threads}, and must be between 0 and {MAX_THREADS}")
    if is_standard(arguments.input):
        need_open(sys.stdin, "input", "open it, or give --input FILE")
    if is_standard(arguments.output):
        need_open(sys.stdout, "output", "open it, or give --output FILE")
    options = {**search, "max_batch_tokens": arguments.batch_tokens, "on_long": arguments.on_long, "shortlist": arguments.shortlist}
    options["alignments"] = arguments.alignments
    options["scores"] = arguments.json or options["n_best"] > 1  # which show them
    name = STANDARD_INPUT if is_standard(arguments.input) else arguments.input
    with contextlib.ExitStack() as stack:
        file = None if is_standard(arguments.input) else stack.enter_context(open_input(arguments.input))
        translator = _translator(arguments)
        sink = stack.enter_context(output(arguments.output))
        source = file or standard_input()  # waits for the first line
        stack.enter_context(_own_warnings())
        for lines, trouble in read_lines(source, name, LINES_AT_ONCE):
            _translate(translator, lines, name, options, arguments, sink)
            sink.flush()
            if trouble is not None:
                raise trouble
    return 0


def _translator(arguments: argparse.Namespace) -> Translator:
    from cvmk.inference import Translator

    keep_freed_memory()
    return Translator(arguments.model, arguments.device, arguments.compute_type, engine=arguments.engine, threads=arguments.threads or None)


def _translate(translator: Translator, lines: list[Line], name: str, options: dict[str, Any], arguments: argparse.Namespace, sink: BinaryIO) -> None:
    """Translate and write some lines. What comes before a line that is too long is written before the error is raised."""
    from cvmk.inference import TooLongError

    trouble = None
    try:
        found = translator.translate([line.text for line in lines], **options)
    except TooLongError as error:
        trouble = DataError(f"{name}, line {lines[error.index].number} {error.reason}: split it into sentences, or use --on-long truncate")
        lines = lines[: error.index]
        found = translator.translate([line.text for line in lines], **options)
    aligned = translator.tokenizer if arguments.alignments else None
    for line, translation in zip(lines, found, strict=True):
        if translation.truncated:
            print(f"cvmk: warning: {name}, line {line.number} is too long for the model: its end was left out", file=sys.stderr)
        sink.write((_record(line, translation, aligned) if arguments.json else _format(line, translation, arguments.n_best)).encode())
    if trouble is not None:
        sink.flush()
        raise trouble


def _format(line: Line, translation: Translation, n_best: int) -> str:
    if n_best > 1:
        return "".join(f"{line.number}\t{one.score:.6f}\t{one_line(one.text)}\n" for one in translation.hypotheses)
    return one_line(translation.text) + line.end


def _record(line: Line, translation: Translation, aligned: Tokenizer | None) -> str:
    """The JSON of a line; with alignments, by the tokenizer's pieces, where it is given."""
    hypotheses = []
    for one in translation.hypotheses:
        hypothesis: dict[str, Any] = {"translation": one_line(one.text), "score": one.score}
        if aligned is not None:
            hypothesis["pieces"] = [aligned.pieces[piece] for piece in one.tokens]
            hypothesis["alignment"] = [[round(weight, 4) for weight in row] for row in one.alignment]
        hypotheses.append(hypothesis)
    record = {
        "line": line.number,
        "translation": hypotheses[0]["translation"],
        "score": translation.score,
        "truncated": translation.truncated,
        "hypotheses": hypotheses,
    }
    if aligned is not None:
        record["source_pieces"] = [aligned.pieces[piece] for piece in (*translation.source, aligned.EOS)]
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_lines(stream: BinaryIO, name: str, at_once: int) -> Iterator[tuple[list[Line], DataError | None]]:
    """The lines of a stream, as many at a time as are there already, but at most `at_once`.

    Lines end at \\n or \\r\\n only, and the last one may lack its end. Where a line is not UTF-8, the lines before it come
    together with the error that names it, and nothing after.
    """
    number = 0
    for raw in _raw_lines(stream, name, at_once):
        lines: list[Line] = []
        for data in raw:
            number += 1
            end = "\r\n" if data.endswith(b"\r\n") else "\n" if data.endswith(b"\n") else ""
            try:
                text = decode_line(data[: len(data) - len(end)])
            except UnicodeDecodeError as error:
                yield lines, DataError(f"{name}, line {number} is not valid UTF-8 (byte {error.start + 1} of the line): convert the text to UTF-8")
                return
            lines.append(Line(number, text, end))
        yield lines, None


def _raw_lines(stream: BinaryIO, name: str, at_once: int) -> Iterator[list[bytes]]:
    ready: list[bytes] = []
    rest: list[bytes] = []
    while True:
        with explained(name, "read"):
            block = stream.read1(_BLOCK)  # type: ignore[attr-defined]
        if not block:
            break
        *whole, tail = block.split(b"\n")
        for part in whole:
            ready.append(b"".join((*rest, part, b"\n")))
            rest.clear()
        if tail:
            rest.append(tail)
        while len(ready) >= at_once or (ready and not _more(stream)):
            yield ready[:at_once]
            del ready[:at_once]
    if rest:
        ready.append(b"".join(rest))
    if ready:
        yield ready


def _more(stream: BinaryIO) -> bool:
    """Whether reading would give something at once (or the end of a file); False where that cannot be known."""
    try:
        return bool(select.select([stream.fileno()], [], [], 0)[0])
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _own_warnings() -> Iterator[None]:
    """Silence the translator's warnings: they count texts within a call, and here lines are counted."""
    logger = logging.getLogger("cvmk.inference.translator")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
