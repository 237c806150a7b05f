from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmk.errors import ConfigError
from cvmk.formats.torch_weights import manifest_of
from cvmk.inference import decoding, native_engine
from cvmk.inference.engine import Request
from cvmk.inference.options import Hypothesis, SearchOptions
from cvmk.inference.processors import History, NoRepeatNgram
from cvmk.inference.torch_engine import TorchEngine
from cvmk.nn import MIXERS, CVMTransformer

PAD, UNK, BOS, EOS = 0, 1, 2, 3


def log_probabilities(model: CVMTransformer, source: list[int], pieces: list[int], penalty: float = 1.0) -> torch.Tensor:
    """Teacher-forced log probabilities [len(pieces) + 1, V] by the whole forward pass, without the special pieces."""
    with torch.no_grad():
        logits = model(torch.tensor([[*source, EOS]]), torch.tensor([[BOS, *pieces]]))[0][0].double()
    logits[:, [PAD, UNK, BOS]] = -math.inf
    for length, row in enumerate(logits):
        for piece in set(pieces[:length]):
            row[piece] = row[piece] / penalty if row[piece] > 0 else row[piece] * penalty
    return logits.log_softmax(-1)


def forced_score(model: CVMTransformer, source: list[int], pieces: list[int], length_penalty: float) -> float:
    rows = log_probabilities(model, source, pieces)
    return sum(rows[t, piece].item() for t, piece in enumerate([*pieces, EOS])) / (len(pieces) + 1) ** length_penalty


def sources(count: int, vocabulary: int, longest: int = 12, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(4, vocabulary) for _ in range(generator.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 1.7])
@pytest.mark.parametrize("seed", range(4))
def test_beam_as_wide_as_the_space_finds_the_exhaustive_n_best(make_model, length_penalty: float, seed: int) -> None:
    """All 4 + 16 + 64 + 256 translations of up to four pieces are scored one by one."""
    model = make_model(8, seed=seed, sharpness=2.0).double()
    source, limit = [4, 6, 5], 4
    everything = [list(pieces) for length in range(1, limit + 1) for pieces in itertools.product(range(4, 8), repeat=length)]
    scored = sorted(((forced_score(model, source, pieces, length_penalty), pieces) for pieces in everything), reverse=True)[:10]
    options = SearchOptions(beam_size=400, n_best=10, length_penalty=length_penalty, max_length_a=0, max_length_b=limit)
    found = TorchEngine(model).search([source], options)[0]
    assert [hypothesis.tokens for hypothesis in found] == [pieces for _, pieces in scored]
    assert [hypothesis.score for hypothesis in found] == pytest.approx([score for score, _ in scored], abs=1e-9)


def naive_beam(model: CVMTransformer, source: list[int], options: SearchOptions, prefix: list[int] | None = None) -> list[tuple[list[int], float]]:
    """Beam search of one sentence as documented, with lists and the whole forward pass each time."""
    prefix = prefix or []
    limit = max(options.limit(len(source), model.config.max_length), len(prefix))
    rows = log_probabilities(model, source, prefix, options.repetition_penalty)
    live: list[tuple[float, list[int]]] = [(sum(rows[t, piece].item() for t, piece in enumerate(prefix)), prefix)]
    ended: list[tuple[float, list[int]]] = []
    for length in range(len(prefix), limit + 1):
        candidates = []
        for total, pieces in live:
            row = log_probabilities(model, source, pieces, options.repetition_penalty)[-1]
            for piece in range(3, len(row)):
                n = options.no_repeat_ngram
                grams = [tuple(pieces[i : i + n]) for i in range(len(pieces) - n + 1)] if n else []
                allowed = piece == EOS if length == limit else (piece != EOS or length >= options.min_length)
                if piece != EOS and n and (*pieces[len(pieces) - n + 1 :], piece) in grams:
                    allowed = False
                if piece in options.suppressed:
                    allowed = False
                if allowed:
                    candidates.append((total + row[piece].item(), [*pieces, piece]))
        candidates.sort(key=lambda c: -c[0])
        for total, pieces in candidates[: options.beam_size]:
            if pieces[-1] == EOS:
                ended.append((total / len(pieces) ** options.length_penalty, pieces[:-1]))
        live = [c for c in candidates[: 2 * options.beam_size] if c[1][-1] != EOS][: options.beam_size]
        ended.sort(key=lambda c: -c[0])
        if len(ended) >= options.beam_size or not live:
            break
        if len(ended) >= options.n_best and ended[options.n_best - 1][0] >= live[0][0] / (limit + 1) ** options.length_penalty:
            break
    return [(pieces, score) for score, pieces in ended[: options.n_best]]


OPTIONS = [
    SearchOptions(beam_size=1, max_length_b=8),
    SearchOptions(beam_size=2, n_best=2, max_length_a=1.5, max_length_b=3),
    SearchOptions(beam_size=4, n_best=3, length_penalty=0.6, max_length_a=1.0, max_length_b=4),
    SearchOptions(beam_size=5, n_best=5, length_penalty=0.0, max_length_a=1.0, max_length_b=6),
    SearchOptions(beam_size=3, n_best=1, length_penalty=2.0, max_length_a=1.0, max_length_b=6, no_repeat_ngram=2),
    SearchOptions(beam_size=3, n_best=2, no_repeat_ngram=1, max_length_b=3),
    SearchOptions(beam_size=1, max_length_b=8, min_length=5, suppressed=[5, 7, 9]),
    SearchOptions(beam_size=1, max_length_b=8, repetition_penalty=1.8),
    SearchOptions(beam_size=3, n_best=2, max_length_a=1.0, max_length_b=6, min_length=4, no_repeat_ngram=2, repetition_penalty=0.7, suppressed=(6,)),
    SearchOptions(beam_size=2, n_best=2, max_length_a=1.0, max_length_b=2, repetition_penalty=3.0, length_penalty=0.5),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_prefixes", [False, True])
def test_batched_search_agrees_with_the_naive_one(make_model, options: SearchOptions, with_prefixes: bool) -> None:
    model = make_model(14, seed=5, sharpness=1.5, positions="rotary", kv_heads=1).double()
    batch = sources(12, 14, longest=8, seed=2)
    generator = random.Random(3)
    prefixes = [[generator.randrange(4, 14) for _ in range(generator.choice((0, 1, 2, 5)))] if with_prefixes else [] for _ in batch]
    ends = 0
    for source, prefix, found in zip(batch, prefixes, TorchEngine(model).search(batch, options, prefixes if with_prefixes else None), strict=True):
        expected = naive_beam(model, source, options, prefix)
        assert all(hypothesis.tokens[: len(prefix)] == prefix for hypothesis in found)
        assert [hypothesis.tokens for hypothesis in found] == [pieces for pieces, _ in expected]
        assert [hypothesis.score for hypothesis in found] == pytest.approx([score for _, score in expected], abs=1e-9)
        ends += any(len(pieces) < options.limit(len(source), 40) for pieces, _ in expected)
    assert ends > 0, "every hypothesis ran into its limit: the test would not see how sentences end"


RECURRENT = sorted({*MIXERS} - {"attention"})


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[8]], ids=str)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_mixers_are_searched_as_naively(make_model, name: str, options: SearchOptions) -> None:
    """Beams take over each other's states, sentences leave the batch, and prefixes put rows at places of their own."""
    model = make_model(14, seed=5, sharpness=1.5, positions="none", encoder_mixers=[name], decoder_mixers=[name, "attention"]).double()
    batch, prefixes = sources(5, 14, longest=8, seed=2), [[], [5, 4], [7], [], [9, 9, 4, 8]]
    for source, prefix, found in zip(batch, prefixes, TorchEngine(model).search(batch, options, prefixes), strict=True):
        expected = naive_beam(model, source, options, prefix)
        assert [hypothesis.tokens for hypothesis in found] == [pieces for pieces, _ in expected]
        assert [hypothesis.score for hypothesis in found] == pytest.approx([score for _, score in expected], abs=1e-8)


@pytest.mark.parametrize("name", ["hyena", "mamba2", "retnet", "rwkv"])
def test_the_native_engine_says_that_it_lacks_a_mixer(make_model, name: str) -> None:
    manifest = manifest_of(make_model(14, decoder_mixers=[name]))
    assert f"the model has the mixers {name}, and the native engine has attention, mamba, ssru" in native_engine.refusals(manifest, "cpu", "float32")


def test_greedy_follows_the_argmax(make_model) -> None:
    model = make_model(20, seed=1, sharpness=2.0).double()
    batch = sources(6, 20)
    options = SearchOptions()
    for source, found in zip(batch, TorchEngine(model).search(batch, options), strict=True):
        pieces: list[int] = []
        for length in range(options.limit(len(source), 40)):
            row = log_probabilities(model, source, pieces)[-1]
            if length == 0:
                row[EOS] = -math.inf
            piece = int(row.argmax())
            if piece == EOS:
                break
            pieces.append(piece)
        assert found[0].tokens == pieces
        assert found[0].score == pytest.approx(forced_score(model, source, pieces, 1.0), abs=1e-9)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.5])
def test_n_best_scores_are_the_models_own(make_model, length_penalty: float) -> None:
    model = make_model(25, seed=3, sharpness=1.5)
    batch = sources(8, 25)
    for source, found in zip(batch, TorchEngine(model).search(batch, SearchOptions(4, 4, length_penalty, max_length_b=6)), strict=True):
        scores = [hypothesis.score for hypothesis in found]
        assert scores == sorted(scores, reverse=True) and len({tuple(hypothesis.tokens) for hypothesis in found}) == 4
        assert scores == pytest.approx([forced_score(model, source, hypothesis.tokens, length_penalty) for hypothesis in found], abs=1e-4)


@pytest.mark.parametrize("more", [{}, {"min_length": 6, "no_repeat_ngram": 2, "repetition_penalty": 1.3, "suppressed": (5, 6, 30)}], ids=["plain", "all"])
@pytest.mark.parametrize("beam_size", [1, 4])
def test_output_does_not_depend_on_the_batch(make_model, beam_size: int, more: dict[str, Any]) -> None:
    """Each of a few sentences alone, and among random companions of other lengths, with other prefixes."""
    model = make_model(40, seed=7, sharpness=2.0)
    engine, options = TorchEngine(model), SearchOptions(beam_size, min(beam_size, 2), max_length_a=1.5, max_length_b=5, **more)
    generator = random.Random(11)
    for source, prefix in zip(sources(3, 40, longest=10, seed=21), ([], [7, 8, 9], []), strict=True):
        alone = engine.search([source], options, [prefix])[0]
        for trial in range(12):
            batch = sources(generator.randint(1, 12), 40, longest=15, seed=trial)
            prefixes = sources(len(batch), 40, longest=5, seed=trial + 100) if trial % 2 else [[] for _ in batch]
            place = generator.randint(0, len(batch))
            batch.insert(place, source)
            prefixes.insert(place, prefix)
            found = engine.search(batch, options, prefixes)[place]
            assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in alone]
            assert [hypothesis.score for hypothesis in found] == pytest.approx([hypothesis.score for hypothesis in alone], abs=1e-4)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_special_pieces_are_never_produced(make_model, beam_size: int) -> None:
    model = make_model(12, tie_embeddings=False)
    with torch.no_grad():  # a model that wants nothing but special pieces: their rows win whatever the sign of the state
        model.embeddings.output[[PAD, UNK, BOS]] *= 50
    for found in TorchEngine(model).search(sources(10, 12), SearchOptions(beam_size, beam_size)):
        assert found and all(min(hypothesis.tokens) >= 4 and math.isfinite(hypothesis.score) for hypothesis in found)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_no_ngram_twice(make_model, size: int, beam_size: int) -> None:
    model = make_model(9, seed=2, sharpness=3.0)
    batch = sources(8, 9)

    def repeats(options: SearchOptions) -> int:
        total = 0
        for found in TorchEngine(model).search(batch, options):
            for hypothesis in found:
                grams = [tuple(hypothesis.tokens[i : i + size]) for i in range(len(hypothesis.tokens) - size + 1)]
                total += len(grams) - len(set(grams))
        return total

    assert repeats(SearchOptions(beam_size, max_length_b=15)) > 0
    assert repeats(SearchOptions(beam_size, max_length_b=15, no_repeat_ngram=size)) == 0


@given(st.lists(st.lists(st.integers(4, 7), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_forbidden_repeats_by_definition(histories: list[list[int]], size: int) -> None:
    scores = torch.zeros(len(histories), 8)
    history = History(len(histories), 1, torch.device("cpu"))
    longest = max(map(len, histories))
    history.append_rows(histories, torch.zeros(len(histories), longest), torch.zeros(len(histories), longest, 0))
    NoRepeatNgram(size)(history, scores)
    for row, history in enumerate(histories):
        grams = {tuple(history[i : i + size]) for i in range(len(history) - size + 1)}
        for piece in range(4, 8):
            assert (scores[row, piece] == -math.inf) == ((*history[len(history) - size + 1 :], piece) in grams)


def test_limits(make_model) -> None:
    model = make_model(12)
    with torch.no_grad():  # EOS has logit 0 and the others are two opposite groups, one of which is above it whatever the state
        model.embeddings.output.zero_()
        direction = torch.randn(16)
        model.embeddings.output[4:8], model.embeddings.output[8:] = 9 * direction, -9 * direction
    engine = TorchEngine(model)
    for beam_size in (1, 3):
        short = engine.search([[4], [4, 5, 6]], SearchOptions(beam_size, max_length_a=1.5, max_length_b=2))
        assert [len(found[0].tokens) for found in short] == [3, 6]
        long = engine.search([[4] * 39], SearchOptions(beam_size, max_length_a=50, max_length_b=1000))
        assert len(long[0][0].tokens) == 39
        assert len(engine.search([[4]], SearchOptions(beam_size, max_length_a=0, max_length_b=0))[0][0].tokens) == 1


def test_equal_scores_are_ordered_by_piece(make_model) -> None:
    model = make_model(12)
    with torch.no_grad():
        model.embeddings.output.zero_()
    found = TorchEngine(model).search([[4, 5]], SearchOptions(3, 3, max_length_a=0, max_length_b=1))[0]
    assert len({hypothesis.score for hypothesis in found}) == 1
    assert [hypothesis.tokens for hypothesis in found] == sorted(hypothesis.tokens for hypothesis in found)


def test_a_prefix_counts_as_pieces_of_the_translation(make_model) -> None:
    """What is found without a prefix is found again, with the same score, from any prefix of it; at the limit nothing follows."""
    model = make_model(20, seed=1, sharpness=3.0).double()
    engine = TorchEngine(model)
    for options in (SearchOptions(max_length_b=6), SearchOptions(repetition_penalty=1.5, max_length_b=6)):
        best = engine.search([[4, 9, 6]], options)[0][0]
        assert len(best.tokens) >= 4
        prefixes = [best.tokens[:length] for length in range(len(best.tokens) + 1)]
        for found in engine.search([[4, 9, 6]] * len(prefixes), options, prefixes):
            assert found[0].tokens == best.tokens and found[0].score == pytest.approx(best.score, abs=1e-9)
    long = [5] * 39
    found = engine.search([[4], [4]], SearchOptions(2, max_length_a=0, max_length_b=3), [long, []])
    assert found[0][0].tokens == long and len(found[1][0].tokens) <= 3
    forbidden = engine.search([[4]], SearchOptions(no_repeat_ngram=1, suppressed=(5,), max_length_b=5), [[5, 5]])[0][0].tokens
    assert forbidden[:2] == [5, 5] and 5 not in forbidden[2:]


def test_long_prefixes_are_read_in_parts(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(20, seed=1, sharpness=2.0).double()
    batch, prefixes = sources(4, 20, seed=5), sources(4, 20, longest=20, seed=6)
    options = SearchOptions(2, alignments=True)
    whole = TorchEngine(model).search(batch, options, prefixes)
    monkeypatch.setattr(decoding, "_PREFIX_SCORES", 3 * 8 * 20)
    for found, expected in zip(TorchEngine(model).search(batch, options, prefixes), whole, strict=True):
        assert [h.tokens for h in found] == [h.tokens for h in expected]
        assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-9)
        assert all(np.asarray(h.alignment) == pytest.approx(np.asarray(e.alignment), abs=1e-6) for h, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(("source", "prefix", "suppressed", "message"), [
    ([4] * 40, [], (), "the source has 40 pieces, and the model has room for 39"), ([4], [4] * 40, (), "the prefix has 40 pieces"),
    ([4, 30], [], (), "the source has the id 30, and ids of pieces are from 1 to 29"), ([4, 0], [], (), "the source has the id 0"),
    ([4], [3], (), "the prefix has the id 3, and ids of pieces are from 4 to 29"), ([4], [], (31,), "the suppressed list has the id 31"),
])  # fmt: skip
def test_what_the_model_cannot_have_is_named(make_model, source, prefix, suppressed, message: str) -> None:
    engine = TorchEngine(make_model(30))
    with pytest.raises(ConfigError, match=message):
        engine.search([[5], source], SearchOptions(suppressed=suppressed), [[], prefix])
    with pytest.raises(ConfigError, match=message):
        engine.submit(Request("a", source, SearchOptions(suppressed=suppressed), prefix))
    assert engine.step() == []


def test_broken_model_ends_and_gives_the_worst_score(make_model) -> None:
    model = make_model(12)
    with torch.no_grad():
        model.embeddings.output.fill_(math.nan)
    for beam_size in (1, 2):
        assert TorchEngine(model).search([[4, 5]], SearchOptions(beam_size)) == [[Hypothesis([], -math.inf)]]


def test_empty_batch_and_training_mode(make_model) -> None:
    model = make_model(12, dropout=0.5)
    engine = TorchEngine(model)
    assert engine.search([], SearchOptions()) == []
    expected = engine.search([[4, 5, 6]], SearchOptions(2))
    model.train()
    assert engine.search([[4, 5, 6]], SearchOptions(2)) == expected
    assert model.training and engine.model is model


def test_bfloat16_and_its_errors(make_model) -> None:
    model = make_model(12, sharpness=3.0)
    engine = TorchEngine(model, "cpu", "bfloat16")
    assert next(engine.model.parameters()).dtype == torch.bfloat16 and next(model.parameters()).dtype == torch.float32
    found, exact = (e.search([[4, 5, 6]], SearchOptions())[0][0] for e in (engine, TorchEngine(model)))
    assert abs(found.score - exact.score) < 0.2
    with pytest.raises(ConfigError, match="compute_type is 'int3'.*float32 and bfloat16"):
        TorchEngine(model, "cpu", "int3")
    for name in ("tpu9", "meta", "cuda:99"):
        with pytest.raises(ConfigError, match="device is"):
            TorchEngine(model, name)
