"""A source that grows is translated as it would be at once, and what was said stays."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from cvmk.errors import ConfigError, DataError
from cvmk.formats.torch_weights import manifest_of, raw_tensors
from cvmk.inference import Finished, Request, SearchOptions, Session, Translator
from cvmk.inference.native_engine import NativeEngine


@pytest.mark.parametrize("of", [Translator.from_model, Translator.of_weights], ids=["torch", "native"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder_direction": "causal"},
        {"encoder_direction": "causal", "positions": "rotary", "kv_heads": 1},
        {"encoder_direction": "causal", "encoder_mixers": ["ssru"], "decoder_mixers": ["ssru"]},
    ],
)
def test_as_if_at_once(make_model, tokenizer, of: Any, options: dict[str, Any]) -> None:
    translator = of(make_model(tokenizer.vocab_size, sharpness=3.0, **options), tokenizer)
    causal_and_native = "encoder_direction" in options and of == Translator.of_weights
    with translator.session(beam_size=2) as session:
        assert session.translate().text == "" and (session.nbytes > 0) == (of == Translator.of_weights)
        for part in ("ab", " c", "d ef", " ghi"):
            session.append(part)
            found = session.translate()
            expected = translator.engine.search([translator.encode(session.source)], SearchOptions(2), [session.committed])[0][0]
            assert found.tokens == expected.tokens and found.score == pytest.approx(expected.score, abs=0 if causal_and_native else 1e-6)
            session.commit(found.tokens[: len(session.committed) + 1])
        assert (session.kept > 0) == causal_and_native
        with pytest.raises(ValueError, match="were committed"):
            session.commit([])
        with pytest.raises(ConfigError, match="ids of pieces are from 4"):
            session.commit([*session.committed, 10**9])
        with pytest.raises(TypeError, match="grows by strings"):
            session.append(None)
        session.commit(tuple(session.committed))
        session.append(" abc" * 40)
        with pytest.raises(DataError):
            session.translate()
    for use in (session.translate, lambda: session.append("a")):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_edits_encode_what_follows_them(make_model) -> None:
    """Random changes of a source against an engine that knows nothing of what was before."""
    model = make_model(60, seed=2, sharpness=2.0, encoder_direction="causal")
    engine, fresh = (NativeEngine(manifest_of(model), raw_tensors(model), threads=1) for _ in range(2))
    state, generator, source = engine.open_source(), random.Random(0), list[int]()
    for _ in range(60):
        before, source = source, source[: generator.randint(0, len(source))] + [generator.randrange(4, 60) for _ in range(generator.randint(0, 6))]
        source = source[:39]
        found = engine.search_one(Request(None, source, SearchOptions(3), state=state))
        same = next((at for at, (a, b) in enumerate(zip([*before, 3], [*source, 3], strict=False)) if a != b), min(len(before), len(source)) + 1)
        assert state.kept == (same if before or _ else 0)
        expected = fresh.search([source], SearchOptions(3))[0]
        assert found == expected and [h.scores for h in found] == [h.scores for h in expected]


def test_states_go_on_from_where_they_stand(make_model) -> None:
    """A recurrent encoder cannot go back to any position: it begins again behind the last 32, 64, ... that are the same, or goes on before the end sign."""
    model = make_model(60, seed=2, sharpness=2.0, encoder_direction="causal", encoder_mixers=["mamba", "ssru", "attention"], encoder_layers=3, max_length=160)
    engine, fresh = (NativeEngine(manifest_of(model), raw_tensors(model), threads=1) for _ in range(2))
    state, generator, source = engine.open_source(), random.Random(0), list(range(4, 54))
    options = SearchOptions(2, max_length_a=0, max_length_b=6)

    def kept(changed: list[int]) -> int:
        found = engine.search_one(Request(None, changed, options, state=state))
        expected = fresh.search([changed], options)[0]
        assert found == expected and [h.scores for h in found] == [h.scores for h in expected]
        return int(state.kept)

    assert kept(source) == 0
    assert kept([*source, 9, 10]) == 50 and kept([*source, 9, 10]) == 53
    assert kept([*source, 9, 11]) == 32 and kept(source[:20]) == 0 and kept(source[:20]) == 21 and kept(source) == 20
    assert kept(source * 2) == 50 and kept([*source, *source[:49], 5]) == 96 and kept(source[:31]) == 0 and kept(source[:32]) == 31 and kept(source[:33]) == 32
    for _ in range(30):
        source = (source[: generator.randint(0, len(source))] + [generator.randrange(4, 60) for _ in range(generator.randint(0, 40))])[:150]
        kept(source)


def test_a_source_that_is_the_same_beside_another(make_model) -> None:
    """Nothing of it is encoded, whichever of the two comes first."""
    model = make_model(60, seed=2, sharpness=2.0)
    engine = NativeEngine(manifest_of(model), raw_tensors(model), "int8", threads=1)
    state, again, other = engine.open_source(), [4, 5, 6, 7], [8, 9, 10, 11, 12]
    engine.search_one(Request(None, again, state=state))
    expected = [engine.search([source], SearchOptions())[0] for source in (again, other)]
    for order in ((0, 1), (1, 0)):
        for index in order:
            engine.submit(Request(index, (again, other)[index], state=None if index else state))
        found: dict[Any, Any] = {}
        while len(found) < 2:
            found |= {event.id: event.hypotheses for event in engine.step() if isinstance(event, Finished)}
        assert [found[0], found[1]] == expected


def test_one_request_at_a_time(make_model) -> None:
    model = make_model(60, seed=2, encoder_direction="causal")
    engine = NativeEngine(manifest_of(model), raw_tensors(model), threads=2)
    before, state = engine.held_bytes(), engine.open_source()
    assert engine.held_bytes() - before == engine.source_bytes()
    engine.submit(Request("a", [4, 5], SearchOptions(min_length=20), state=state))
    engine.step()
    with pytest.raises(RuntimeError, match="has not ended"):
        engine.search_one(Request("b", [4, 5], state=state))
    with pytest.raises(RuntimeError, match="has not ended"):
        engine.submit(Request("b", [4, 5], state=state))
    assert engine.cancel("a") and engine.step() == []
    engine.submit(Request("b", [4, 5], state=state))
    assert engine.cancel("b")  # before it began
    engine.step()
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(engine.search_one(Request(None, [4, 5, 6], SearchOptions(5, min_length=30), state=state)))
        except RuntimeError as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = engine.search([[4, 5, 6]], SearchOptions(5, min_length=30))[0]
    assert any(result == expected for result in results) and all(result == expected or "has not ended" in result for result in results)
    workspace, another = engine.held_bytes(), engine.open_source()
    assert engine.held_bytes() == workspace + engine.source_bytes()
    del another
    assert engine.held_bytes() == workspace


def test_too_many(make_model) -> None:
    model = make_model(60)
    engine = NativeEngine(manifest_of(model), raw_tensors(model), max_sessions=2)
    kept = [engine.open_source(), engine.open_source()]
    with pytest.raises(ConfigError, match="max_sessions"):
        engine.open_source()
    kept.pop()
    assert engine.open_source() is not None


def test_a_session_keeps_its_engine(make_model, tokenizer) -> None:
    session = Session(Translator.of_weights(make_model(tokenizer.vocab_size, encoder_direction="causal"), tokenizer))
    session.append("ab")
    assert session.translate().tokens
