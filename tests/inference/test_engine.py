"""Requests come and go between the steps of an engine; what each becomes is what it is alone."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from cvmk.errors import ConfigError
from cvmk.formats.torch_weights import manifest_of, raw_tensors
from cvmk.inference.engine import Engine, Finished, Partial, Request
from cvmk.inference.native_engine import NativeEngine
from cvmk.inference.options import Hypothesis, SearchOptions
from cvmk.inference.torch_engine import TorchEngine
from cvmk.nn import CVMTransformer

KINDS = (
    SearchOptions(max_length_a=1.0, max_length_b=8),
    SearchOptions(3, 2, max_length_a=1.0, max_length_b=8),
    SearchOptions(max_length_a=1.0, max_length_b=8, min_length=6, no_repeat_ngram=2, repetition_penalty=1.3, suppressed=(5, 6)),
    SearchOptions(3, 1, max_length_a=1.0, max_length_b=8, min_length=6, no_repeat_ngram=2, repetition_penalty=1.3, suppressed=(5, 6)),
)


BOTH = pytest.mark.parametrize("kind", ["torch", "native"])


def engine_of(kind: str, model: CVMTransformer, max_batch_tokens: int = 4096) -> Engine:
    if kind == "torch":
        return TorchEngine(model, max_batch_tokens=max_batch_tokens)
    return NativeEngine(manifest_of(model), raw_tensors(model), threads=2, max_batch_tokens=max_batch_tokens)


def requests(count: int, seed: int, kinds: tuple[SearchOptions, ...] = KINDS) -> list[Request]:
    generator = random.Random(seed)

    def pieces(least: int, most: int) -> list[int]:
        return [generator.randrange(4, 40) for _ in range(generator.randint(least, most))]

    return [Request(f"r{index}", pieces(1, 12), generator.choice(kinds), generator.choice(([], pieces(1, 4))), partial=True) for index in range(count)]


def close(found: list[Hypothesis], expected: list[Hypothesis]) -> bool:
    assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in expected]
    assert [hypothesis.score for hypothesis in found] == pytest.approx([hypothesis.score for hypothesis in expected], abs=1e-4)
    return True


@BOTH
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "kv_heads": 1}], ids=["sinusoidal", "rotary"])
def test_requests_that_come_and_go_end_as_they_do_alone(make_model, kind: str, seed: int, options: dict[str, Any]) -> None:
    """A few are cancelled on the way; partial translations end in the final one where the search is greedy."""
    engine = engine_of(kind, make_model(40, seed=7, sharpness=2.0, **options), 80)
    generator, waiting = random.Random(seed), requests(16, seed)
    alone = {request.id: engine.search([request.source], request.options, [request.prefix])[0] for request in waiting}
    live: dict[Any, Request] = {}
    said: dict[Any, list[list[int]]] = {request.id: [] for request in waiting}
    cancelled = 0
    while waiting or live:
        for request in waiting[: generator.randint(0, 3)]:
            waiting.remove(request)
            engine.submit(request)
            live[request.id] = request
        if live and generator.random() < 0.08:
            assert engine.cancel(gone := generator.choice(list(live)))
            del live[gone]
            cancelled += 1
        for event in engine.step():
            request = live[event.id]
            if isinstance(event, Finished):
                assert close(event.hypotheses, alone[event.id])
                if request.options.beam_size == 1:
                    final = event.hypotheses[0].tokens
                    assert all(final[: len(tokens)] == tokens and len(tokens) == len(request.prefix) + step for step, tokens in enumerate(said[event.id], 1))
                del live[event.id]
            else:
                assert isinstance(event, Partial) and event.tokens[: len(request.prefix)] == request.prefix
                said[event.id].append(event.tokens)
    assert cancelled < 16 and engine.step() == []


@BOTH
def test_newcomers_do_not_wait(make_model, kind: str) -> None:
    """A request that comes while others run says its first piece in the next step, and one that ends leaves room at once."""
    engine = engine_of(kind, make_model(40, seed=7, sharpness=2.0))
    options = SearchOptions(min_length=20)
    engine.submit(Request("long", [4, 5, 6], options))
    for _ in range(5):
        assert engine.step() == []
    engine.submit(Request("late", [7, 8], options, partial=True))
    assert [type(event) for event in engine.step()] == [Partial]
    assert engine.cancel("long") and engine.cancel("late") and engine.step() == []


@BOTH
def test_search_does_not_mix_with_submitted_requests(make_model, kind: str) -> None:
    model = make_model(40, seed=7, sharpness=2.0)
    engine = engine_of(kind, model, 1)
    engine.submit(Request(0, [4, 5, 6]))
    engine.step()
    expected = engine_of(kind, model).search([[9, 8], [7, 6, 5]], SearchOptions(2))
    assert engine.search([[9, 8], [7, 6, 5]], SearchOptions(2)) == expected
    found: list[Any] = []
    while not found:
        found = engine.step()
    assert close(found[0].hypotheses, engine.search([[4, 5, 6]], SearchOptions())[0]) and not engine.cancel(0)


def test_a_model_that_fails_loses_only_what_it_was_at(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(make_model(40, sharpness=2.0))
    engine.submit(Request("ill", [4, 5]))
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.model), "step", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.step() == [] and not engine.cancel("ill")
    engine.submit(Request("ill", [4, 5]))
    while not engine.step():
        pass


def test_an_engine_of_a_model_in_training_leaves_it_so(make_model) -> None:
    model = make_model(40, dropout=0.5, sharpness=2.0)
    engine = TorchEngine(model)
    expected = engine.search([[4, 5, 6]], SearchOptions())
    model.train()
    engine.submit(Request("a", [4, 5, 6]))
    found: list[Any] = []
    while not found:
        found = engine.step()
        assert model.training and not torch.is_inference_mode_enabled()
    assert found == [Finished("a", expected[0])]


def test_memory_comes_back(make_model) -> None:
    """A thousand requests, some cancelled, leave nothing in the engine."""
    engine = TorchEngine(make_model(12, encoder_layers=1, decoder_layers=1), max_batch_tokens=64)
    options = SearchOptions(max_length_a=0, max_length_b=2)
    generator, told, gone = random.Random(0), 0, 0
    for index in range(1000):
        engine.submit(Request(index, [generator.randrange(4, 12)], options))
        if index % 7 == 0:
            gone += engine.cancel(index - generator.randint(0, 20))
        if index % 3 == 0:
            told += len(engine.step())
    while events := engine.step() or engine._scheduler._entries:
        told += len(events) if isinstance(events, list) else 0
    scheduler = engine._scheduler
    assert told + gone == 1000 and not (scheduler._entries or scheduler._waiting or scheduler._running or scheduler._told)


@BOTH
def test_a_late_request_ends_with_what_it_has(make_model, kind: str) -> None:
    """Running or waiting; the id is free then, and the others go on."""
    engine = engine_of(kind, make_model(40, seed=7, sharpness=2.0), 1)
    options = SearchOptions(min_length=30)
    engine.submit(Request("late", [4, 5, 6], options, timeout=0.05, partial=True))
    engine.submit(Request("waiting", [4, 5], options, timeout=0.01))
    said: list[Partial] = [event for event in engine.step() if isinstance(event, Partial)]
    time.sleep(0.06)
    found: dict[Any, Finished] = {}
    while len(found) < 2:
        found |= {event.id: event for event in engine.step() if isinstance(event, Finished)}
    assert found["late"].reason == found["waiting"].reason == "expired"
    assert found["late"].hypotheses[0].tokens == said[-1].tokens
    assert found["waiting"].hypotheses[0].tokens == [] and not engine.cancel("late")
    engine.submit(Request("late", [4], SearchOptions(max_length_a=0, max_length_b=2)))
    events: list[Any] = []
    while not events:
        events = engine.step()
    assert events[0].reason == "finished"


@BOTH
def test_ids_and_threads(make_model, kind: str) -> None:
    engine = engine_of(kind, make_model(40, seed=7, sharpness=2.0))
    engine.submit(Request("a", [4]))
    with pytest.raises(ValueError, match="in use"):
        engine.submit(Request("a", [5]))
    with pytest.raises(ConfigError, match="source"):
        engine.submit(Request("b", [4] * 40))
    with pytest.raises(ConfigError, match="the id 40"):
        engine.submit(Request("b", [40]))
    assert engine.cancel("a") and not engine.cancel("a") and not engine.cancel("b") and engine.step() == []


@BOTH
def test_scores_of_pieces(make_model, kind: str) -> None:
    engine = engine_of(kind, make_model(40, seed=7, sharpness=2.0))
    for options in (SearchOptions(), SearchOptions(4, 4), SearchOptions(2, 2, temperature=1.0, seed=1)):
        for hypotheses in engine.search([[4, 5, 6], [7]], options, [[], [9, 10]]):
            for hypothesis in hypotheses:
                assert len(hypothesis.scores) == len(hypothesis.tokens) + 1
                assert sum(hypothesis.scores) / len(hypothesis.scores) == pytest.approx(hypothesis.score, abs=1e-5)
