"""Requests come and go between the steps of the torch engine; what each becomes is what it is alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from cvmk.inference.engine import Finished, Partial, Request
from cvmk.inference.options import Hypothesis, SearchOptions
from cvmk.inference.torch_engine import TorchEngine

KINDS = (
    SearchOptions(max_length_a=1.0, max_length_b=8),
    SearchOptions(3, 2, max_length_a=1.0, max_length_b=8),
    SearchOptions(max_length_a=1.0, max_length_b=8, min_length=6, no_repeat_ngram=2, repetition_penalty=1.3, suppressed=(5, 6)),
    SearchOptions(3, 1, max_length_a=1.0, max_length_b=8, min_length=6, no_repeat_ngram=2, repetition_penalty=1.3, suppressed=(5, 6)),
)


def requests(count: int, seed: int, kinds: tuple[SearchOptions, ...] = KINDS) -> list[Request]:
    generator = random.Random(seed)

    def pieces(least: int, most: int) -> list[int]:
        return [generator.randrange(4, 40) for _ in range(generator.randint(least, most))]

    return [Request(f"r{index}", pieces(1, 12), generator.choice(kinds), generator.choice(([], pieces(1, 4))), partial=True) for index in range(count)]


def close(found: list[Hypothesis], expected: list[Hypothesis]) -> bool:
    assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in expected]
    assert [hypothesis.score for hypothesis in found] == pytest.approx([hypothesis.score for hypothesis in expected], abs=1e-4)
    return True


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "kv_heads": 1}], ids=["sinusoidal", "rotary"])
def test_requests_that_come_and_go_end_as_they_do_alone(make_model, seed: int, options: dict[str, Any]) -> None:
    """A few are cancelled on the way; partial translations end in the final one where the search is greedy."""
    engine = TorchEngine(make_model(40, seed=7, sharpness=2.0, **options), max_batch_tokens=80)
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


def test_newcomers_do_not_wait(make_model) -> None:
    """A request that comes while others run says its first piece in the next step, and one that ends leaves room at once."""
    engine = TorchEngine(make_model(40, seed=7, sharpness=2.0))
    options = SearchOptions(min_length=20)
    engine.submit(Request("long", [4, 5, 6], options))
    for _ in range(5):
        assert engine.step() == []
    engine.submit(Request("late", [7, 8], options, partial=True))
    assert [type(event) for event in engine.step()] == [Partial]
    assert engine.cancel("long") and engine.cancel("late") and engine.step() == []


def test_search_does_not_mix_with_submitted_requests(make_model) -> None:
    engine = TorchEngine(make_model(40, seed=7, sharpness=2.0), max_batch_tokens=1)
    engine.submit(Request(0, [4, 5, 6]))
    engine.step()
    expected = TorchEngine(engine.model).search([[9, 8], [7, 6, 5]], SearchOptions(2))
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
