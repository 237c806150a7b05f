"""Shortlists: what text gives, what the engine makes of them, what it refuses."""

from __future__ import annotations

import dataclasses
import math
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import command

from cvmk import libraries
from cvmk.errors import ConfigError, DataError
from cvmk.formats import save_model_folder
from cvmk.formats.torch_weights import manifest_of, raw_tensors
from cvmk.inference import Request, SearchOptions, Translator, decoding
from cvmk.inference.native_engine import NativeEngine
from cvmk.inference.shortlist import FILE, Shortlist, build_shortlist, load_shortlist
from cvmk.inference.torch_engine import TorchEngine


def test_what_becomes_what() -> None:
    """Words that always come together are told from those that only stand beside them."""
    generator, pairs = random.Random(0), []
    for _ in range(400):
        source = [generator.randrange(4, 24) for _ in range(5)]
        pairs.append((source, [piece + 20 for piece in source] + [50]))
    found = build_shortlist(pairs, 60, per_piece=2, frequent=1)
    assert found.frequent.tolist() == [50]
    assert all(piece + 20 in found.targets[found.starts[piece] : found.starts[piece + 1]] for piece in range(4, 24))
    assert found.of([4, 5], prefix=[9])[:2] == [3, 9] and {24, 25, 50} <= set(found.of([4, 5])) and len(found.of([4])) <= 4
    assert build_shortlist([([], [4]), ([4], [])], 60).of([5]) == [3]


def shortlist_of(vocabulary: int, seed: int = 0) -> Shortlist:
    generator = np.random.default_rng(seed)
    lists = [np.sort(generator.choice(np.arange(4, vocabulary), 12, replace=False)) for _ in range(vocabulary)]
    return Shortlist(np.arange(0, 12 * vocabulary + 1, 12, dtype=np.int32), np.concatenate(lists).astype(np.int32), np.array([4, 7], np.int32))


def test_the_librarys_lists_are_those_of_the_definition() -> None:
    library, reason = libraries.load("_native", "native")
    assert library is not None, reason
    for vocabulary in (20, 64, 130, 1000):
        shortlist, generator = shortlist_of(vocabulary, vocabulary), random.Random(vocabulary)
        candidates = library.Candidates(*shortlist.arrays(), vocabulary)
        for _ in range(50):
            source, prefix = ([generator.randrange(1, vocabulary) for _ in range(generator.randrange(20))] for _ in range(2))
            assert candidates.of(source, prefix) == shortlist.of(source, prefix)
    starts, targets, frequent = shortlist.arrays()
    wrong = [
        (starts, targets, frequent, 999), (starts[:-1], targets, frequent, 999), (starts, targets[:-1], frequent, 1000), (starts, targets + 1, frequent, 1000),
        (starts[::-1].copy(), targets, frequent, 1000), (starts, targets, frequent - 4, 1000), (starts.astype(np.int64), targets, frequent, 1000),
        (starts, np.repeat(targets, 2)[::2], frequent, 1000),
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(ValueError, match="shortlist"):
            library.Candidates(*arguments)


@pytest.mark.parametrize("compute_type", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "options",
    [SearchOptions(), SearchOptions(4, n_best=4), SearchOptions(3, no_repeat_ngram=2, repetition_penalty=1.3, suppressed=(7, 9), min_length=5),
     SearchOptions(2, 2, temperature=1.0, seed=3), SearchOptions(2, prefix_bias=0.5), SearchOptions(40)],
)  # fmt: skip
def test_both_engines_choose_among_its_pieces(make_model, compute_type: str, options: SearchOptions) -> None:
    model = make_model(150, seed=3, sharpness=2.0, d_model=32, heads=2)
    shortlist = shortlist_of(150)
    engine = NativeEngine(manifest_of(model), raw_tensors(model), compute_type, 2, shortlist=shortlist)
    chosen = dataclasses.replace(options, shortlist=True)
    sources, prefixes = [[5, 6, 7], [8], [], [20] * 9], [[], [30], [], [40, 41]]
    found = engine.search(sources, chosen, prefixes)
    if compute_type == "float32":
        expected = TorchEngine(model, shortlist=shortlist).search(sources, chosen, prefixes)
        assert [[h.tokens for h in one] for one in found] == [[h.tokens for h in one] for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert [h.score for h in one] == pytest.approx([h.score for h in other], abs=1e-4)
    for source, prefix, one in zip(sources, prefixes, found, strict=True):
        assert set(one[0].tokens) <= set(shortlist.of(source, prefix))
        alone = engine.search([source], chosen, [prefix])[0]
        assert [(h.tokens, h.score) for h in alone] == [(h.tokens, h.score) for h in one]


def test_as_if_all_other_pieces_were_impossible(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a model whose output bias, so to speak, forbids the others: probabilities are of the listed pieces."""
    model, shortlist = make_model(150, seed=3, sharpness=2.0), shortlist_of(150)
    engine, options = TorchEngine(model, shortlist=shortlist), SearchOptions(4, n_best=4, shortlist=True, no_repeat_ngram=2, repetition_penalty=1.3)
    sources, prefixes = [[5, 6, 7], [8], [], [20] * 9], [[], [30], [], [40, 41]]
    found = engine.search(sources, options, prefixes)
    for source, prefix, one in zip(sources, prefixes, found, strict=True):
        bias = torch.full((150,), -math.inf)
        bias[shortlist.of(source, prefix)] = 0
        with monkeypatch.context() as patch:
            plain = decoding.next_scores
            patch.setattr(decoding, "next_scores", lambda logits, plain=plain, bias=bias: plain(logits) + bias)
            expected = engine.search([source], dataclasses.replace(options, shortlist=False), [prefix])[0]
        assert [h.tokens for h in one] == [h.tokens for h in expected]
        assert [h.score for h in one] == pytest.approx([h.score for h in expected], abs=1e-4)


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_with_others_that_have_none(make_model, kind: str) -> None:
    model, shortlist = make_model(150, seed=3, sharpness=2.0), shortlist_of(150)
    engine: Any = TorchEngine(model, shortlist=shortlist)
    if kind == "native":
        engine = NativeEngine(manifest_of(model), raw_tensors(model), "int8", 2, shortlist=shortlist)
    kinds = [SearchOptions(2, shortlist=index % 2 == 0) for index in range(8)]
    alone = [engine.search([[4 + index]], options)[0] for index, options in enumerate(kinds)]
    found: dict[Any, Any] = {}
    for index, options in enumerate(kinds):
        engine.submit(Request(index, [4 + index], options))
        found |= {event.id: event.hypotheses for event in engine.step()}
    while len(found) < 8:
        found |= {event.id: event.hypotheses for event in engine.step()}
    assert [[h.tokens for h in found[index]] for index in range(8)] == [[h.tokens for h in one] for one in alone]
    assert all(set(found[index][0].tokens) <= set(shortlist.of([4 + index])) for index in (0, 2, 4, 6))


def test_refusals(make_model, tokenizer, tmp_path: Path) -> None:
    model = make_model(tokenizer.vocab_size)
    save_model_folder(tmp_path, model, tokenizer, "")
    for engine in ("native", "torch"):
        with pytest.raises(ConfigError, match="shortlist"):
            Translator(tmp_path, engine=engine).translate(["ab"], shortlist=True)
    shortlist_of(tokenizer.vocab_size).save(tmp_path)
    for engine in ("native", "torch"):
        assert Translator(tmp_path, engine=engine).translate(["ab"], shortlist=True)[0].text is not None
    shortlist_of(tokenizer.vocab_size + 1).save(tmp_path)
    with pytest.raises(DataError, match="another vocabulary"):
        load_shortlist(tmp_path, tokenizer.vocab_size)
    (tmp_path / FILE).write_bytes(b"1234567890")
    with pytest.raises(DataError, match="cvmk shortlist"):
        Translator(tmp_path)
    with pytest.raises(DataError, match="cvmk shortlist"):
        Translator(tmp_path, engine="torch")


def test_the_verb(make_model, tokenizer, tmp_path: Path) -> None:
    save_model_folder(tmp_path / "model", make_model(tokenizer.vocab_size, sharpness=3.0), tokenizer, "")
    (tmp_path / "a").write_text("ab cd\nef\n" * 5)
    (tmp_path / "b").write_text("uv wx\nyz\n" * 5)

    def run(*arguments: object, text: str = "") -> tuple[int, str, str]:
        done = subprocess.run(command(*arguments), input=text, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    code, out, error = run("shortlist", "model", "--source", "a", "--target", "b", "--per-piece", 3, "--frequent", 2)
    assert code == 0 and error == "" and "from 10 pairs" in out and (tmp_path / "model" / FILE).exists()
    assert run("translate", "model", "--shortlist", text="ab cd\n")[0] == 0
    (tmp_path / "b").write_text("uv wx\n")
    code, out, error = run("shortlist", "model", "--source", "a", "--target", "b")
    assert code == 5 and error.count("\n") == 1 and "b has 1 lines" in error
    assert run("shortlist", "model", "--source", "a", "--target", "b", "--lines", 0)[0] == 2
