"""The native engine beside the torch engine: the same pieces for the same weights, and the same bits whatever else happens."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from paired_caches import attention_of_pairs

from cvmk import hardware, ops
from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError, DataError
from cvmk.formats import save_model_folder
from cvmk.formats.torch_weights import manifest_of, raw_tensors
from cvmk.inference import Request, SearchOptions, Translator, native_engine
from cvmk.inference.engine import Finished
from cvmk.inference.native_engine import NativeEngine
from cvmk.inference.options import Hypothesis
from cvmk.inference.torch_engine import TorchEngine
from cvmk.nn import CVMTransformer
from cvmk.nn.linear import Linear, TiedLinear, activate

OPTIONS = {
    "greedy": SearchOptions(),
    "beam": SearchOptions(5, n_best=3),
    "everything": SearchOptions(4, n_best=4, length_penalty=0.6, no_repeat_ngram=2, repetition_penalty=1.3, min_length=5, suppressed=(7, 9)),
    "no piece twice": SearchOptions(no_repeat_ngram=1, min_length=3),
    "patient": SearchOptions(5, n_best=5, patience=2.0),
    "impatient": SearchOptions(4, patience=0.5),
    "samples": SearchOptions(3, n_best=3, temperature=1.0, seed=5),
    "top-k": SearchOptions(temperature=0.7, top_k=5, seed=3, no_repeat_ngram=2, min_length=3),
    "nucleus": SearchOptions(2, 2, temperature=1.5, top_p=0.8),
    "biased beam": SearchOptions(4, n_best=2, prefix_bias=0.6),
    "biased": SearchOptions(prefix_bias=0.3),
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "modern": {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False, "kv_heads": 1, "ffn": 40},
    "causal, untied positions": {"positions": "none", "activation": "gelu", "encoder_direction": "causal", "tie_embeddings": True},
    "wide heads": {"d_model": 60, "heads": 2, "ffn": 100, "vocabulary": 1030},
    "deep encoder": {"encoder_layers": 3, "decoder_layers": 1, "activation": "swiglu", "ffn": 64, "positions": "rotary"},
    "ssru": {"decoder_mixers": ["ssru"]},
    "mamba": {"encoder_mixers": ["mamba"], "decoder_mixers": ["mamba"], "encoder_direction": "causal", "positions": "none", "norm": "rmsnorm", "bias": False},
}
"""What every option is tried on."""
ALL = {
    **MODELS,
    "ssru both ways": {"encoder_mixers": ["ssru", "attention"], "decoder_mixers": ["attention", "ssru"], "positions": "rotary", "d_model": 28},
    "mamba both ways": {"encoder_mixers": ["mamba"], "decoder_mixers": ["mamba", "ssru"], "d_model": 24, "decoder_layers": 3},
}
BYTES: dict[str, Any] = {"kv_cache": "int8", "positions": "rotary", "kv_heads": 1, "encoder_direction": "causal"}


def native(model: CVMTransformer, compute_type: str = "float32", threads: int = 2, **options: Any) -> NativeEngine:
    return NativeEngine(manifest_of(model), raw_tensors(model), compute_type, threads, **options)


def inputs(model: CVMTransformer, count: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Sources, the empty one among them, and prefixes."""
    generator = random.Random(seed)

    def pieces(length: int) -> list[int]:
        return [generator.randrange(4, model.vocab_size) for _ in range(length)]

    return [pieces(generator.randrange(20)) for _ in range(count - 1)] + [[]], [pieces(generator.choice((0, 0, 1, 6))) for _ in range(count)]


def agree(found: list[list[Hypothesis]], expected: list[list[Hypothesis]], error: float = 1e-4) -> None:
    assert [[h.tokens for h in one] for one in found] == [[h.tokens for h in one] for one in expected]
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.score == pytest.approx(b.score, rel=2e-5, abs=error) and list(a.scores) == pytest.approx(list(b.scores), rel=2e-5, abs=2 * error)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS)
def test_the_pieces_of_the_torch_engine(make_model, kind: dict[str, Any], options: SearchOptions) -> None:
    model = make_model(**{"vocabulary": 90, "seed": 3, "sharpness": 2.0, **kind})
    sources, prefixes = inputs(model, 8)
    agree(native(model).search(sources, options, prefixes), TorchEngine(model).search(sources, options, prefixes))


LEVELS = ["base", "avx2", "avx512", "amx"]
LEVELS = LEVELS[: LEVELS.index(hardware.cpu().detected) + 1]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(make_model, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("CVMK_CPU_ISA", level)
    for kind in ALL.values():
        model = make_model(**{"vocabulary": 90, "seed": 3, "sharpness": 2.0, **kind})
        sources, _ = inputs(model, 4)
        for options in (OPTIONS["greedy"], OPTIONS["beam"]):
            agree(native(model).search(sources, options), TorchEngine(model).search(sources, options))


@pytest.mark.parametrize("level", LEVELS)
def test_caches_of_bytes(make_model, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """The native engine rounds queries and weights too, to 2^-15 of their largest, which makes a later key's byte another now and then: what hangs on the last
    bits of a probability, as draws and long lists do, is not compared."""
    monkeypatch.setenv("CVMK_CPU_ISA", level)
    model = make_model(vocabulary=90, seed=3, sharpness=2.0, **BYTES)
    sources, _ = inputs(model, 8)
    for beam in (1, 5):
        options = SearchOptions(beam, max_length_a=0.0, max_length_b=12)
        agree(native(model).search(sources, options), TorchEngine(model).search(sources, options), 5e-3)


@pytest.mark.parametrize(
    ("kind", "compute_type"),
    [*(("deep encoder", name) for name in ("float32", "bfloat16", "int8", "int4")), ("mamba both ways", "int8"), ("byte caches", "int8")],
)
def test_company_and_threads_change_no_bit(make_model, kind: str, compute_type: str) -> None:
    """Alone, in a batch, among requests of other options, on one thread or three."""
    model = make_model(90, seed=3, sharpness=2.0, **{**ALL, "byte caches": BYTES}[kind])
    sources, prefixes = inputs(model, 12)
    kinds = list(OPTIONS.values())
    alone = native(model, compute_type, 1)
    expected = {index: alone.search([sources[index]], kinds[index % len(kinds)], [prefixes[index]])[0] for index in range(12)}
    for threads in (1, 2, 3):
        engine, found = native(model, compute_type, threads, max_batch_tokens=150), {}
        for index in range(12):
            engine.submit(Request(index, sources[index], kinds[index % len(kinds)], prefixes[index]))
            found |= {event.id: event for event in engine.step()}
        while len(found) < 12:
            found |= {event.id: event for event in engine.step()}
        for index in range(12):
            assert [(h.tokens, h.score, h.scores) for h in found[index].hypotheses] == [(h.tokens, h.score, h.scores) for h in expected[index]]
        batch = engine.search(sources, OPTIONS["beam"])
        assert [[h.score for h in one] for one in batch] == [[h.score for h in alone.search([source], OPTIONS["beam"])[0]] for source in sources]


@pytest.mark.parametrize("compute_type", ["float32", "int8"])
def test_company_changes_no_bit_of_a_large_vocabulary(make_model, compute_type: str) -> None:
    """Its logits come in pieces, of which there are more the more sentences there are."""
    engine = native(model := make_model(9000, seed=3, sharpness=2.0), compute_type, 1)
    sources, _ = inputs(model, 24)
    options = SearchOptions(2, max_length_a=0, max_length_b=4)
    alone = [engine.search([source], options)[0] for source in sources]
    for count in (5, 24):
        found = engine.search(sources[:count], options)
        assert [[(h.tokens, h.score, h.scores) for h in one] for one in found] == [[(h.tokens, h.score, h.scores) for h in one] for one in alone[:count]]


def quantised(model: CVMTransformer, compute_type: str) -> CVMTransformer:
    """The same model whose linear layers compute by our ops on quantised weights; those of 4 bits on rows that are quantised to bytes as int8_linear does."""

    def eight(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        packed = ops.quantize_int8(weight)
        return lambda x: ops.int8_linear(x, packed, bias)

    def four(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        group = next((size for size in (128, 64, 32, 16) if weight.shape[1] % size == 0), None)
        if group is None:  # the bottleneck of Mamba's steps
            return eight(weight, bias)
        plain = ops.quantize_int4(weight, group).dequantize()

        def linear(x: torch.Tensor) -> torch.Tensor:
            scale = x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100) / 127
            return torch.nn.functional.linear((x / scale).round() * scale, plain, bias)

        return linear

    def forward(module: Any) -> Any:
        linear = (eight if compute_type == "int8" else four)(module.weight.detach(), getattr(module, "bias", None))
        return lambda x, activation=None: activate(linear(x.contiguous().view(-1, x.shape[-1])).view(*x.shape[:-1], -1), activation)

    for module in model.modules():
        if isinstance(module, (Linear, TiedLinear)):
            module.forward = forward(module)
    return model


@pytest.mark.parametrize("compute_type", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["plain", "modern", "deep encoder", "ssru", "mamba"])
def test_quantised_weights_are_those_of_the_ops(make_model, monkeypatch: pytest.MonkeyPatch, kind: str, compute_type: str) -> None:
    options = {"vocabulary": 90, "seed": 3, "sharpness": 2.0, "d_model": 64, "heads": 4, **MODELS[kind], "ffn": 128}
    model = make_model(**options)
    sources, _ = inputs(model, 24)
    found = native(model, compute_type).search(sources, OPTIONS["beam"])
    monkeypatch.setattr(ops, "flash_attention", attention_of_pairs)
    expected = TorchEngine(quantised(make_model(**options), compute_type)).search(sources, OPTIONS["beam"])
    same = [a[0].tokens == b[0].tokens for a, b in zip(found, expected, strict=True)]
    assert sum(same) >= 18, "rounding may turn a choice between pieces that are equally good, seldom"
    apart = sorted(abs(a[0].score - b[0].score) for a, b in zip(found, expected, strict=True))
    assert apart[12] < 1e-4 and all(a[0].score == pytest.approx(b[0].score, abs=2e-2) for a, b, equal in zip(found, expected, same, strict=True) if equal)


def test_bfloat16_weights(make_model) -> None:
    """As float32 arithmetic on rounded weights."""
    model = make_model(90, seed=3, sharpness=2.0)
    rounded = make_model(90, seed=3, sharpness=2.0)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim == 2 and name not in ("embeddings.source", "embeddings.target"):
                parameter.copy_(parameter.bfloat16())
    sources, _ = inputs(model, 8)
    agree(native(model, "bfloat16").search(sources, OPTIONS["beam"]), TorchEngine(rounded).search(sources, OPTIONS["beam"]))
    stored = make_model(90, seed=3, sharpness=2.0).bfloat16()
    agree(native(stored).search(sources, OPTIONS["beam"]), native(stored.float()).search(sources, OPTIONS["beam"]), 0)


@pytest.mark.parametrize("name", OPTIONS)
def test_without_scores(make_model, name: str) -> None:
    """The same hypotheses by both engines, also where a prefix fills all that there is room for."""
    model = make_model(90, seed=3, sharpness=2.0)
    sources, prefixes = inputs(model, 12)
    options = dataclasses.replace(OPTIONS[name], scores=False, max_length_a=0.0, max_length_b=6)
    expected = native(model).search(sources, dataclasses.replace(options, scores=True), prefixes)
    for engine in (native(model), native(model, threads=1), TorchEngine(model)):
        found = engine.search(sources, options, prefixes)
        assert [[h.tokens for h in one] for one in found] == [[h.tokens for h in one] for one in expected]
        assert all(math.isnan(h.score) and not h.scores for one in found for h in one)


def test_alignments(make_model) -> None:
    """The weights of the last cross-attention, as the model's own maps have them."""
    model = make_model(90, seed=3, sharpness=2.0)
    sources, _ = inputs(model, 4)
    for options in (SearchOptions(alignments=True), SearchOptions(3, alignments=True)):
        for source, (best, *_rest) in zip(sources, native(model).search(sources, options), strict=True):
            with torch.no_grad():
                _, _, maps = model(torch.tensor([[*source, 3]]), torch.tensor([[2, *best.tokens]]), return_attention=True)
            cross = maps.cross[-1]
            weights = (cross.q @ cross.k.repeat_interleave(cross.q.shape[1] // cross.k.shape[1], 1).transpose(-1, -2) * cross.scale).softmax(-1).mean(1)[0]
            assert np.asarray(best.alignment) == pytest.approx(weights[: len(best.tokens)].numpy(), abs=1e-5)


@pytest.mark.parametrize("name", ["greedy", "beam", "samples", "biased beam"])
@pytest.mark.parametrize("kind", ["plain", "modern"])
def test_alignments_of_both_engines(make_model, kind: str, name: str) -> None:
    """With prefixes, in a batch, and with newcomers in between."""
    model = make_model(**{"vocabulary": 90, "seed": 3, "sharpness": 2.0, **MODELS[kind]})
    options = dataclasses.replace(OPTIONS[name], alignments=True)
    sources, prefixes = inputs(model, 8)
    expected = native(model).search(sources, options, prefixes)

    def same(found: Sequence[Hypothesis], index: int) -> None:
        assert [h.tokens for h in found] == [h.tokens for h in expected[index]]
        for one, other in zip(found, expected[index], strict=True):
            assert len(one.alignment) == len(one.tokens) and all(len(row) == len(sources[index]) + 1 for row in one.alignment)
            assert np.asarray(one.alignment) == pytest.approx(np.asarray(other.alignment), abs=1e-5)

    engine = TorchEngine(model)
    for index, found in enumerate(engine.search(sources, options, prefixes)):
        same(found, index)
    waiting, ended = [Request(index, source, options, prefixes[index]) for index, source in enumerate(sources)], 0
    while ended < len(sources):
        if waiting:
            engine.submit(waiting.pop())
        for event in engine.step():
            same(event.hypotheses, event.id)
            ended += 1


# -- a folder's model --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path, make_model, tokenizer) -> Path:
    save_model_folder(tmp_path / "model", make_model(tokenizer.vocab_size, sharpness=3.0), tokenizer, "")
    return tmp_path / "model"


WITHOUT = ("torch", "numpy", "asyncio", "cvmk.config.schema", "cvmk.config.data", "cvmk.ops", "cvmk.nn", "cvmk.inference.decoding")
"""What takes long to import, or megabytes, and no translation by the native engine needs."""


def test_nothing_heavy_in_the_process(folder: Path) -> None:
    code = f"""
import sys
from cvmk.inference import Translator
for compute_type in ("auto", "bf16", "int8", "int4"):
    translator = Translator({str(folder)!r}, compute_type=compute_type, threads=2)
    print(translator.translate(["a man", "a dog runs"], beam_size=2)[0].text)
print([name for name in {WITHOUT} if name in sys.modules], file=sys.stderr)
assert translator.explain()[0].chosen and translator.explain()[0].engine == "native"  # it asks the torch engine, so it stands behind the check
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4 and done.stderr == "[]\n", done.stderr


def test_the_command_line_uses_it(folder: Path) -> None:
    code = f"import sys; from cvmk.cli import main; code = main(sys.argv[1:]); assert not {{*{WITHOUT}}} & {{*sys.modules}}; raise SystemExit(code)"
    done = subprocess.run([sys.executable, "-c", code, "translate", str(folder), "--threads", "1"], input="a man\n\na dog\n", capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.split("\n")) == 4, done.stderr


def test_both_engines_refuse_bad_folders_alike(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = None
    (folder / "config.json").write_text(json.dumps(config))

    def refused(changed: dict[str, np.ndarray]) -> None:
        save_file(changed, folder / "model.safetensors")
        told = []
        for engine in ("native", "torch"):
            with pytest.raises(DataError) as error:
                Translator(folder, engine=engine)
            told.append(str(error.value))
        assert told[0] == told[1]

    name = "decoder.blocks.0.ffn.inner.weight"
    refused({key: value for key, value in weights.items() if key != name})
    refused({**weights, "another": weights["decoder.norm.weight"]})
    refused({**weights, name: np.ascontiguousarray(weights[name][:-1])})
    refused({**weights, name: np.where(np.arange(weights[name].size).reshape(weights[name].shape) == 3, np.nan, weights[name]).astype(np.float32)})
    whole = (folder / "model.safetensors").read_bytes()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(DataError):
            Translator(folder, engine="native")


def test_what_it_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ({"threads": 0}, {"threads": 10**6}, {"compute_type": "int3"}, {"engine": "swift"}, {"device": "tpu"}, {"device": "cuda:9", "engine": "native"})
    for options in wrong:
        with pytest.raises(ConfigError):
            Translator(folder, **options)
    manifest = manifest_of(CVMTransformer(ModelConfig(d_model=16, ffn=16, heads=2, encoder_layers=1, decoder_layers=1), 30))
    monkeypatch.setattr(native_engine, "_MIXERS", ())
    assert "attention" in native_engine.refusals(manifest, "cpu", "int8")[0]
    assert [reason.split()[0] for reason in native_engine.refusals(manifest, "cuda", "int3")] == ["device", "compute_type", "the"]


# -- endless service -----------------------------------------------------------------------------------------------------------------
def test_a_request_holds_what_was_said_before(make_model) -> None:
    model = make_model(40, seed=7)
    engine = native(model)
    requests = [Request(index, [4] * (3 + index), SearchOptions(4, min_length=20 + index)) for index in range(6)]
    for request in requests:
        engine.submit(request)
    ended = 0
    while ended < len(requests):  # what its threads work in has grown by then
        ended += len(engine.step())
    idle = engine.held_bytes()
    for request in requests:
        engine.submit(request)
    engine.step()
    assert engine.held_bytes() - idle == sum(map(engine.request_bytes, requests))
    assert all(engine.cancel(request.id) for request in requests) and engine.step() == [] and engine.held_bytes() == idle


def test_threads_submit_and_cancel_during_steps(make_model) -> None:
    model = make_model(40, seed=7, sharpness=2.0)
    engine, sources = native(model), [[4 + index] * (1 + index % 5) for index in range(8)]
    expected = [engine.search([source], SearchOptions())[0] for source in sources]
    kept: dict[Any, int] = {}

    def submit(name: str) -> None:
        for index in range(100):
            engine.submit(Request((name, index), sources[index % 8]))
            if index % 3 == 0:
                engine.cancel((name, index))
            else:
                kept[name, index] = index % 8

    threads = [threading.Thread(target=submit, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    found: dict[Any, Finished] = {}
    while any(thread.is_alive() for thread in threads) or len(found) < len(kept):
        found |= {event.id: event for event in engine.step()}
    assert {id: found[id].hypotheses for id in kept} == {id: expected[which] for id, which in kept.items()}


class Requests(RuleBasedStateMachine):
    """Random submissions, cancellations, deadlines and steps against what each request gives alone."""

    model: CVMTransformer
    alone: dict[tuple[int, int], list[Hypothesis]] = {}
    kinds = (SearchOptions(max_length_b=6, max_length_a=0), SearchOptions(3, 2, max_length_b=6, max_length_a=0))

    def __init__(self) -> None:
        super().__init__()
        self.engine, self.live, self.next = native(self.model, max_batch_tokens=40), {}, 0

    @rule(source=st.integers(0, 5), kind=st.integers(0, 1), late=st.booleans())
    def submit(self, source: int, kind: int, late: bool) -> None:
        self.engine.submit(Request(self.next, [4 + source] * source, self.kinds[kind], timeout=1e-9 if late else None))
        self.live[self.next] = (source, kind, late)
        self.next += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.live)))
        assert self.engine.cancel(id) and not self.engine.cancel(id)
        del self.live[id]

    @rule()
    def step(self) -> None:
        for event in self.engine.step():
            source, kind, late = self.live.pop(event.id)
            if late:
                assert event.reason in ("expired", "finished")
                continue
            if (source, kind) not in self.alone:
                self.alone[source, kind] = self.engine.search([[4 + source] * source], self.kinds[kind])[0]
            assert event.reason == "finished" and event.hypotheses == self.alone[source, kind]

    @invariant()
    def nothing_is_forgotten(self) -> None:
        assert len(self.engine._requests) == len(self.live)

    def teardown(self) -> None:
        for _ in range(200):
            self.step()
        assert not self.live


def test_random_requests(make_model) -> None:
    Requests.model = make_model(40, seed=7, sharpness=2.0)
    Requests.alone = {}
    checks = settings(max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Requests, settings=checks)


def test_a_busy_machine_slows_in_proportion(make_model) -> None:
    """With more threads than processors, and a loop on each of these, everything still ends; nobody waits for a thread that does not run."""
    model = make_model(40, seed=7, sharpness=2.0)
    expected = native(model, threads=1).search([[4, 5, 6]] * 40, SearchOptions(3))
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        assert native(model, threads=4 * (os.cpu_count() or 1)).search([[4, 5, 6]] * 40, SearchOptions(3)) == expected
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def test_bad_input_leaves_the_engine_as_it_was(make_model) -> None:
    model = make_model(40, seed=7, sharpness=2.0)
    engine = native(model)
    expected = engine.search([[4, 5]], SearchOptions())
    numbers = {"beam_size": (0, 10**6), "length_penalty": (float("nan"),), "repetition_penalty": (0.0,), "temperature": (-1.0,), "top_p": (0.0,)}
    for options in ({name: number} for name, wrong in numbers.items() for number in wrong):
        with pytest.raises(ConfigError):
            SearchOptions(**options)
    for source in ([4] * 40, [40], [0], [-1]):
        with pytest.raises(ConfigError):
            engine.search([source], SearchOptions())
        with pytest.raises(ConfigError):
            engine.submit(Request("x", source))
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        engine.search([["a"]], SearchOptions())
    with pytest.raises(ValueError, match="prefixes"):
        engine.search([[4], [5]], SearchOptions(), [[4]])
    assert engine.search([], SearchOptions()) == [] and engine.search([[]], SearchOptions())[0]
    assert not engine.cancel("x") and engine.step() == [] and engine.search([[4, 5]], SearchOptions()) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_goes_on(folder: Path) -> None:
    """It has none of the engine's threads: it translates alone, and ends."""
    code = f"""
import os
from cvmk.inference import Translator
translator = Translator({str(folder)!r}, threads=3)
texts = ["a man", "a dog runs", "two men"] * 8
expected = translator.translate(texts)
child = os.fork()
if child == 0:
    assert translator.translate(texts) == expected
    raise SystemExit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert translator.translate(texts) == expected
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="where a thread's stack does not count as memory of the process, it can be made")
def test_threads_that_the_system_does_not_have(folder: Path) -> None:
    """Stacks of 16 GiB in a process that may have 6: the caller does all, and `threads` says so."""
    code = f"""
import resource
from cvmk.inference import Translator
texts = ["a man", "a dog runs", "two men"] * 8
expected = Translator({str(folder)!r}, threads=1).translate(texts)
translator = Translator({str(folder)!r}, threads=3)
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
assert translator.engine.threads == 3
assert translator.translate(texts) == expected and translator.engine.threads == 1
"""
    stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (16 << 30, stack))
    )


@pytest.mark.parametrize("beam", [2, 32, 33, 50])
def test_wide_beams(make_model, beam: int) -> None:
    """Candidates in order and as a heap, among rows that want others; more than there are pieces."""
    model = make_model(70, seed=3, sharpness=2.0)
    engine, options = native(model), SearchOptions(beam, n_best=beam, max_length_a=0, max_length_b=4, suppressed=(9, 20))
    expected = TorchEngine(model).search([[4, 5, 6], [7]], options)
    agree(engine.search([[4, 5, 6], [7]], options), expected)
    engine.submit(Request("wide", [4, 5, 6], options))
    engine.submit(Request("greedy", [7]))
    found: dict[Any, Any] = {}
    while len(found) < 2:
        found |= {event.id: event.hypotheses for event in engine.step()}
    agree([found["wide"], found["greedy"]], [expected[0], engine.search([[7]], SearchOptions())[0]])


def test_numbers_beyond_any_length(make_model) -> None:
    engine = native(make_model(40))
    huge = SearchOptions(min_length=10**30, no_repeat_ngram=10**30, top_k=10**30)
    assert len(engine.search([[4, 5]], huge)[0][0].tokens) == 39


def test_control_c_ends_a_long_search(folder: Path) -> None:
    code = f"""
import os, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests without it
from cvmk.inference import Translator
translator = Translator({str(folder)!r}, threads=2)
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    while time.monotonic() - start < 40:
        translator.translate(["a man rides"] * 20000, beam_size=8, max_batch_tokens=10**9)
except KeyboardInterrupt:
    print("stopped")
    assert translator.translate(["a man"])[0].text is not None
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100).stdout == "stopped\n"


def test_patience_is_how_many_are_finished(make_model) -> None:
    """A beam of 8 with the patience of a quarter ends with fewer."""
    model = make_model(12, seed=3)
    sources, _ = inputs(model, 6)
    found = {}
    for patience in (0.25, 1.0):
        options = SearchOptions(8, n_best=8, patience=patience, length_penalty=2.0)
        found[patience] = TorchEngine(model).search(sources, options)
        agree(native(model).search(sources, options), found[patience])
    counts = {patience: sum(map(len, one)) for patience, one in found.items()}
    assert counts[0.25] < counts[1.0]
