"""The native engine on models with recurrent mixers: the production student with an SSRU decoder, and what a new word of a long source costs.

Models of random weights, int8, greedy, one thread, so that sentences a second are those of a core. `-k translate`: 25 pieces a source and exactly
25 a translation, alone and 64 at once, beside the same shape with an attention decoder; rows "with shortlist" as in bench_translate.py. The limit is
the memory's for one sentence (limits.MEMORY), and for many the multiply-adds of a core (CVMK_LIMIT_TOPS_INT8).

`-k new_word`: a source that grows piece by piece in a session; each new piece is encoded and one piece of the translation is decoded. All models have as many
parameters. Attention that sees both ways encodes the whole source again; causal attention keeps its keys and values, which grow with it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import limits
import numpy as np
import pytest
import torch
from bench_translate import random_shortlist

from cvmk.config.schema import ModelConfig
from cvmk.formats.torch_weights import manifest_of, raw_tensors
from cvmk.inference import Request, SearchOptions
from cvmk.inference.native_engine import NativeEngine
from cvmk.nn import CVMTransformer

LENGTH = 25
LETTERS = {"attention": "A", "ssru": "S", "mamba": "M"}
FFN = {"attention": 1536, "ssru": 1792, "mamba": 1216}
"""With which blocks of d_model 256 have as many parameters: the mixers have 4, 2 and 6.5 d^2 of them."""


@functools.cache
def engine_of(vocabulary: int, **options: Any) -> tuple[NativeEngine, CVMTransformer]:
    torch.manual_seed(0)
    model = CVMTransformer(ModelConfig(d_model=256, heads=8, encoder_layers=6, decoder_layers=2, dropout=0.0, **options), vocabulary).eval()
    return NativeEngine(manifest_of(model), raw_tensors(model), "int8", 1, shortlist=random_shortlist(vocabulary)), model


def operations(model: CVMTransformer, outputs: float) -> float:
    """Of a sentence: two for each weight that a position is multiplied with, without attention's own."""
    weights = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim == 2 and not name.startswith("embeddings")}
    return 2 * LENGTH * (sum(weights.values()) + 256 * outputs)


def texts_of(vocabulary: int, count: int) -> list[list[int]]:
    pieces: list[list[int]] = np.random.default_rng(1).integers(4, vocabulary, (count, LENGTH - 1)).tolist()
    return pieces  # and the end sign


@pytest.mark.parametrize("shortlist", [False, True], ids=["", "shortlist"])
@pytest.mark.parametrize("count", [1, 64])
def test_cpu_translate_ssru(compare: Callable[..., Any], count: int, shortlist: bool) -> None:
    (engine, model), (attention, _) = (engine_of(32000, ffn=1536, decoder_mixers=LETTERS[name]) for name in ("ssru", "attention"))
    texts, options = texts_of(32000, count), SearchOptions(min_length=LENGTH, max_length_a=0, max_length_b=LENGTH, scores=False, shortlist=shortlist)
    decoder = sum(parameter.numel() for name, parameter in model.decoder.named_parameters() if parameter.ndim == 2 and "key_value" not in name)
    outputs = 2600 if shortlist else 32000  # of a random shortlist nearly all are different
    limit = LENGTH * (decoder + 256 * outputs) / limits.MEMORY if count == 1 else count * operations(model, outputs) / limits.INT8
    name = f"translate cpu student 6+2 ssru d256 V32000 int8, {count} x 25 pieces, one thread{', with shortlist' if shortlist else ''}"
    compare(lambda: engine.search(texts, options), {"attention decoder": lambda: attention.search(texts, options)}, case=name, limit=limit)


def growing(engine: NativeEngine, length: int, words: int = 16) -> Callable[[], float]:
    """Seconds a new piece, up to a source of `length`."""
    source, options = np.random.default_rng(1).integers(4, 8000, length - 1).tolist(), SearchOptions(max_length_a=0, max_length_b=1, scores=False)
    state = engine.open_source()

    def grow() -> float:
        engine.search_one(Request(None, source[:-words], options, state=state))
        start = time.perf_counter()
        for left in range(words - 1, -1, -1):
            engine.search_one(Request(None, source[: len(source) - left], options, state=state))
        return (time.perf_counter() - start) / words

    return grow


@pytest.mark.parametrize("length", [32, 256, 1024])
@pytest.mark.parametrize("mixer", ["ssru", "mamba"])
def test_cpu_new_word(compare: Callable[..., Any], mixer: str, length: int) -> None:
    def of(name: str, direction: str) -> Callable[[], float]:
        mixers = {"encoder_mixers": LETTERS[name], "decoder_mixers": LETTERS[name], "ffn": FFN[name]}
        return growing(engine_of(8000, encoder_direction=direction, max_length=1024, **mixers)[0], length)

    peers = {"attention": of("attention", "bidirectional"), "causal attention": of("attention", "causal")}
    compare(of(mixer, "causal"), peers, case=f"new word cpu 6+2 d256 {mixer}, source of {length}, int8, one thread")
