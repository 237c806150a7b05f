"""Translation by the native engine beside CTranslate2 and the torch engine, with the same weights and the same search.

Models of random weights; 16 source pieces, exactly 20 target pieces. Nobody tells scores: greedy searches compute no probabilities. CTranslate2 at each of
{AVX2, AVX512} x {1 replica of 1 thread, 1 of 2, 2 of 1}: the ratio is to the fastest of them. cvmk on all threads that the process may use. Rows "with
shortlist" are of a random one: 100 targets a source piece and 100 that are frequent, some 1,650 of 32,000 for these sentences; CTranslate2 looks at all of
them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ctranslate2_peer
import limits
import numpy as np
import pytest
import torch
from ctranslate2_peer import Peer, sources

from cvmk.config.schema import ModelConfig
from cvmk.formats.torch_weights import manifest_of, raw_tensors
from cvmk.inference import SearchOptions
from cvmk.inference.native_engine import NativeEngine
from cvmk.inference.shortlist import Shortlist
from cvmk.inference.torch_engine import TorchEngine
from cvmk.nn import CVMTransformer

MODELS = {
    "tiny 4+4 d128 V8000": (ModelConfig(d_model=128, ffn=256, heads=4, encoder_layers=4, decoder_layers=4, dropout=0.0), 8000),
    "student 6+2 d256 V32000": (ModelConfig(d_model=256, ffn=1536, heads=8, encoder_layers=6, decoder_layers=2, dropout=0.0), 32000),
    "base 6+6 d512 V8000": (ModelConfig(d_model=512, ffn=2048, heads=8, encoder_layers=6, decoder_layers=6, dropout=0.0), 8000),
}
SETTINGS = {"1x1": (1, 1), "1x2": (1, 2), "2x1": (2, 1)}
CASES = [(1, 1), (1, 5), (32, 1), (32, 5), (64, 1)]
SOURCE, LENGTH = 16, 20


class Contestants:
    """A model for every engine."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model = CVMTransformer(*MODELS[name]).eval()
        self.peers: dict[str, Peer] = {}
        if ctranslate2_peer.available() is None:
            ctranslate2_peer.export(self.model, folder)
            self.peers = {isa: Peer(folder, isa) for isa in ("AVX2", "AVX512")}
        self.torch = TorchEngine(self.model)
        self._native: dict[str, NativeEngine] = {}

    def native(self, compute_type: str) -> NativeEngine:
        if compute_type not in self._native:
            manifest, weights, shortlist = manifest_of(self.model), raw_tensors(self.model), random_shortlist(self.model.vocab_size)
            self._native[compute_type] = NativeEngine(manifest, weights, compute_type, torch.get_num_threads(), shortlist=shortlist)
        return self._native[compute_type]

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()


@pytest.fixture(scope="module", params=MODELS)
def contestants(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contestants]:
    found = Contestants(request.param, tmp_path_factory.mktemp("model"))
    yield found
    found.close()


def random_shortlist(vocabulary: int, targets: int = 100, frequent: int = 100) -> Shortlist:
    """Any `targets` pieces for each source piece; the first `frequent` for all."""
    found = np.random.default_rng(0).integers(4, vocabulary, targets * vocabulary, dtype=np.int32)
    return Shortlist(np.arange(0, targets * vocabulary + 1, targets, dtype=np.int32), found, np.arange(4, 4 + frequent, dtype=np.int32))


def step_bytes(model: CVMTransformer, compute_type: str) -> float:
    """Bytes of weights that a step of the decoder reads."""
    decoder = sum(parameter.numel() for name, parameter in model.decoder.named_parameters() if parameter.ndim == 2 and "key_value" not in name)
    return (decoder + model.embeddings.output_matrix.numel()) * {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.53}[compute_type]


def limit_of(model: CVMTransformer, compute_type: str, count: int, beam: int) -> float:
    """Seconds that reading the weights at every step, or all products, take at least; attention and everything else is not counted."""

    def matrices(named: Any, of: Callable[[str], bool]) -> int:
        return sum(parameter.numel() for name, parameter in named if parameter.ndim == 2 and of(name))

    once = matrices(model.encoder.named_parameters(), lambda name: True) + matrices(model.decoder.named_parameters(), lambda name: "key_value" in name)
    each = matrices(model.decoder.named_parameters(), lambda name: "key_value" not in name) + model.embeddings.output_matrix.numel()
    operations = 2 * count * (once * (SOURCE + 1) + each * LENGTH * beam)
    traffic = LENGTH * step_bytes(model, compute_type)
    return limits.cpu_limit(operations=operations, dtype=torch.float32 if compute_type == "float32" else torch.int8, traffic=traffic)


def translate(
    compare: Callable[..., Any],
    contestants: Contestants,
    compute_type: str,
    count: int,
    beam: int,
    peers: dict[str, Callable[[], Any]],
    shortlist: bool = False,
) -> None:
    texts = sources(contestants.model.vocab_size, count, SOURCE)
    options = SearchOptions(beam, min_length=LENGTH, max_length_a=0, max_length_b=LENGTH, scores=False, shortlist=shortlist)
    engine = contestants.native(compute_type)
    for isa, peer in contestants.peers.items():
        for setting, (replicas, threads) in SETTINGS.items():
            if replicas == 1 or count > 1:
                case = {"compute_type": "float32" if compute_type == "float32" else "int8", "replicas": replicas, "threads": threads}
                peers[f"CT2 {isa} {setting}"] = lambda peer=peer, case=case: peer.ask(**case, sources=texts, beam_size=beam, length=LENGTH)  # type: ignore[misc]
    name = f"translate cpu {contestants.name} {compute_type} {count} sentence{'s' if count > 1 else ''} beam {beam}{' with shortlist' if shortlist else ''}"
    limit = None if shortlist else limit_of(contestants.model, compute_type, count, beam)
    compare(lambda: engine.search(texts, options), peers, case=name, limit=limit)


@pytest.mark.parametrize(("count", "beam"), CASES)
def test_cpu_translate_int8(compare: Callable[..., Any], contestants: Contestants, count: int, beam: int) -> None:
    translate(compare, contestants, "int8", count, beam, {})


@pytest.mark.parametrize(("count", "beam"), CASES)
def test_cpu_translate_with_shortlist(compare: Callable[..., Any], contestants: Contestants, count: int, beam: int) -> None:
    if "student" not in contestants.name:
        pytest.skip("the shape whose vocabulary is large")
    translate(compare, contestants, "int8", count, beam, {}, shortlist=True)


@pytest.mark.parametrize("count", [1, 32])
def test_cpu_translate_int4(compare: Callable[..., Any], contestants: Contestants, count: int) -> None:
    translate(compare, contestants, "int4", count, 1, {})


@pytest.mark.parametrize(("count", "beam"), [(1, 1), (1, 5), (32, 1), (32, 5)])
def test_cpu_translate_float32(compare: Callable[..., Any], contestants: Contestants, count: int, beam: int) -> None:
    """The torch engine among the peers; and the greedy pieces of CTranslate2 are those of cvmk."""
    texts = sources(contestants.model.vocab_size, count)
    options = SearchOptions(beam, min_length=LENGTH, max_length_a=0, max_length_b=LENGTH)
    translate(compare, contestants, "float32", count, beam, {"torch engine": lambda: contestants.torch.search(texts, options)})
    if beam > 1:
        return
    free = SearchOptions(max_length_a=0, max_length_b=LENGTH)
    found = [one[0].tokens for one in contestants.native("float32").search(texts, free)]
    for peer in contestants.peers.values():
        assert peer.ask(compute_type="float32", replicas=1, threads=1, sources=texts, beam_size=1, length=LENGTH, tokens=True) == found
