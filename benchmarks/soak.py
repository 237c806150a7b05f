"""A soak of the native engine: many sentences in every way that it is asked, with steady memory. `python benchmarks/soak.py MODEL --sentences 100000`

Batches of random sizes with random options, requests that come, are cancelled and run late, sessions whose source grows, and what is refused. Prints a line a
twentieth of the way. Exit code 1 where the process's own memory is more than --allowed MiB higher in the last quarter than in the second, by their medians.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cvmk.errors import CvmkError
from cvmk.files import read_text
from cvmk.inference import Request, SearchOptions, Translator
from cvmk.inference.engine import Finished

KINDS: list[dict[str, Any]] = [
    {}, {}, {}, {"beam_size": 2}, {"beam_size": 5, "n_best": 5}, {"beam_size": 4, "no_repeat_ngram": 2, "repetition_penalty": 1.2}, {"alignments": True},
    {"beam_size": 3, "n_best": 2, "temperature": 0.8, "top_k": 20, "seed": 3}, {"beam_size": 2, "patience": 2.0, "length_penalty": 0.6}, {"min_length": 6},
]  # fmt: skip
WRONG: list[dict[str, Any]] = [{"beam_size": 0}, {"beam_size": 10**6}, {"length_penalty": float("nan")}, {"suppressed": [10**9]}, {"shortlist": "yes"}]


def memory() -> dict[str, int]:
    """MiB: resident, and of that what is the process's own."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(told[key].split()[0]) >> 10 for name, key in (("resident", "VmRSS"), ("own", "RssAnon"))}


def own_kilobytes() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))


def without_huge_pages() -> None:
    """The kernel may join pages to huge ones at any time, as far as 2 MiB a time more than was asked for: such growth would hide ours, and look like it."""
    PR_SET_THP_DISABLE = 41
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def texts_of(translator: Translator, file: str | None, generator: random.Random) -> Iterator[str]:
    """The lines of a file, again and again, or texts of random pieces."""
    lines = [line for line in read_text(file).splitlines() if line] if file else []
    while True:
        if lines:
            yield from generator.sample(lines, len(lines))
        else:
            ids = [generator.randrange(4, translator.tokenizer.vocab_size) for _ in range(generator.randint(1, 30))]
            yield translator.tokenizer.decode(ids)


def batch(translator: Translator, texts: Iterator[str], generator: random.Random) -> int:
    """A call of `translate`."""
    options = dict(generator.choice(KINDS))
    found = translator.translate([next(texts) for _ in range(generator.choice((1, 1, 3, 8, 20)))], on_long="truncate", **options)
    return len(found)


def requests(translator: Translator, texts: Iterator[str], generator: random.Random) -> int:
    """Requests that come between steps, some of which are cancelled or too late."""
    engine, count, waiting = translator.engine, generator.randint(1, 12), set[int]()
    sources = [translator.tokenizer.encode(next(texts))[: engine.max_length - 1] for _ in range(count)]
    for index, source in enumerate(sources):
        timeout = generator.choice((None, None, 1e-9, 0.002))
        engine.submit(Request(index, source, SearchOptions(**generator.choice(KINDS)), partial=index % 2 == 0, timeout=timeout))
        waiting.add(index)
        waiting -= {event.id for event in engine.step() if isinstance(event, Finished)}
        if generator.random() < 0.2 and engine.cancel(index):
            waiting.discard(index)
    while waiting:
        waiting -= {event.id for event in engine.step() if isinstance(event, Finished)}
    return count


def session(translator: Translator, texts: Iterator[str], generator: random.Random) -> int:
    """A source that grows word by word, as long as the model reads it, with what was said of it before as a prefix."""
    words = next(texts).split()[:8]
    with translator.session(beam_size=generator.choice((1, 3))) as growing:
        for word in words:
            growing.append(f" {word}")
            if len(translator.tokenizer.encode(growing.source)) >= translator.engine.max_length:
                break
            growing.commit(growing.translate().tokens[: len(growing.committed) + 1])
    return len(words)


def refused(translator: Translator, texts: Iterator[str], generator: random.Random) -> int:
    """What is an error, and leaves the engine as it was."""
    for options in ({"on_long": "error"}, generator.choice(WRONG)):
        try:
            translator.translate(["word " * 100_000 if "on_long" in options else next(texts)], **options)
        except CvmkError:
            continue
        raise AssertionError(f"{options} was not refused")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--sentences", type=int, default=100_000)
    parser.add_argument("--text", help="sentences to translate, one a line; without it, texts of random pieces")
    parser.add_argument("--compute-type", default="int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allowed", type=float, default=2.0, help="MiB by which memory may rise")
    chosen = parser.parse_args(arguments)
    generator, start = random.Random(chosen.seed), time.monotonic()
    without_huge_pages()
    logging.disable(logging.WARNING)  # it truncates on purpose
    translator = Translator(chosen.model, compute_type=chosen.compute_type, engine="native", threads=chosen.threads)
    texts, done, told = texts_of(translator, chosen.text, generator), 0, 0
    samples: list[list[int]] = [[], [], [], []]  # a quarter each
    while done < chosen.sentences:
        way = generator.choices((batch, requests, session, refused), (8, 2, 1, 0.5))[0]
        done += way(translator, texts, generator)
        if generator.random() < 0.1:
            samples[min(4 * done // chosen.sentences, 3)].append(own_kilobytes())
        if 20 * done >= told * chosen.sentences:
            told += 1
            print(f"{done:8} sentences {time.monotonic() - start:7.1f} s  MiB: {memory()}  held by requests: {translator.engine.held_bytes()}", flush=True)
    for _ in range(200):  # what its threads work in is given back when it is idle
        translator.engine.step()
    rise, held = (statistics.median(samples[3]) - statistics.median(samples[1])) / 1024, translator.engine.held_bytes()
    print(f"{done} sentences in {time.monotonic() - start:.1f} s; memory rose by {rise:.2f} MiB from the second quarter to the last; {held} bytes are held")
    return int(rise > chosen.allowed)


if __name__ == "__main__":
    sys.exit(main())
