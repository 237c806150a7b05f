"""CTranslate2 as a peer of translation: the weights of a CVMTransformer in its format, and a process that times it at given settings.

A process of its own, since the instruction set is chosen once a process (CT2_FORCE_CPU_ISA); the times are taken there, so that the pipe costs
nothing. The format was learnt from ctranslate2.specs (MIT licence).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

REPLICAS = (1, 2)


# -- export ----------------------------------------------------------------------------------------------------------------------
def export(model: Any, folder: Path) -> None:
    """A CVMTransformer in float32; its pieces are called t4, t5, ..."""
    from cvmk.formats.ctranslate2 import specification

    spec = specification(model, ["<blank>", "<unk>", "<s>", "</s>", *(f"t{index}" for index in range(4, model.vocab_size))])
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


# -- the process -------------------------------------------------------------------------------------------------------------------
class Peer:
    """CTranslate2 with one instruction set; `seconds` runs a case and gives its time."""

    def __init__(self, folder: Path, isa: str) -> None:
        # Threads that wait in a loop after their call would take the processors from the one that comes next.
        quiet = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
        environment = {**os.environ, **quiet, "CT2_FORCE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, **case: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(case), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("CTranslate2 ended")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(folder: str) -> None:
    """A case a line: compute_type, replicas, threads, sources, beam_size, length -> seconds; with `tokens`, the pieces instead."""
    import ctranslate2

    translators: dict[tuple[Any, ...], Any] = {}
    for line in sys.stdin:
        case = json.loads(line)
        key = case["compute_type"], case["replicas"], case["threads"]
        if key not in translators:
            translators[key] = ctranslate2.Translator(
                folder, device="cpu", compute_type=case["compute_type"], inter_threads=case["replicas"], intra_threads=case["threads"]
            )
        sources = [[f"t{piece}" for piece in source] for source in case["sources"]]
        options: dict[str, Any] = {"beam_size": case["beam_size"], "max_batch_size": 0 if case["replicas"] == 1 else -(-len(sources) // case["replicas"])}
        if case.get("tokens"):
            never = {"suppress_sequences": [["<s>"], ["<blank>"]], "disable_unk": True}
            found = translators[key].translate_batch(sources, max_decoding_length=case["length"], min_decoding_length=1, **options, **never)
            print(json.dumps([[int(piece[1:]) for piece in one.hypotheses[0]] for one in found]), flush=True)
            continue
        start = time.perf_counter()
        translators[key].translate_batch(sources, max_decoding_length=case["length"], min_decoding_length=case["length"], **options)
        print(time.perf_counter() - start, flush=True)


def available() -> str | None:
    """Why there is no such peer here; None where there is."""
    try:
        import ctranslate2  # noqa: F401
    except ImportError:
        return "ctranslate2 is not installed (pip install cvmk[export])"
    return None


def sources(vocabulary: int, count: int, length: int = 16) -> list[list[int]]:
    return np.random.default_rng(1).integers(4, vocabulary, (count, length)).tolist()


if __name__ == "__main__":
    serve(sys.argv[1])
