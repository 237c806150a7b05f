from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvmk.config.schema import TokenizerConfig
from cvmk.errors import ConfigError, DataError
from cvmk.formats import save_model_folder
from cvmk.inference import TooLongError, Translator, engines
from cvmk.inference.engines import EngineAnswer
from cvmk.inference.options import Hypothesis, SearchOptions
from cvmk.inference.torch_engine import TorchEngine
from cvmk.inference.translator import batches
from cvmk.text.tokenizers import train_tokenizer


class Echo:
    """An engine that says each source backwards, and notes its batches."""

    max_length = 10

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []

    def search(self, sources: list[list[int]], options: SearchOptions) -> list[list[Hypothesis]]:
        self.batches.append(sources)
        return [[Hypothesis(source[::-1], -float(rank)) for rank in range(options.n_best)] for source in sources]


def test_order_is_kept_and_empty_texts_are_never_decoded(words) -> None:
    engine = Echo()
    translator = Translator.from_engine(engine, words(30))
    texts = ["w4 w5 w6", "", "w7", "  \t\u3000", "w8 w9 w10 w11", "w12 w13", "\n"]
    found = translator.translate(texts, max_batch_tokens=8)
    assert [translation.text for translation in found] == ["w6 w5 w4", "", "w7", "", "w11 w10 w9 w8", "w13 w12", ""]
    assert [source for batch in engine.batches for source in batch] == [[8, 9, 10, 11], [4, 5, 6], [12, 13], [7]]
    assert found[1].score == 0 and found[1].tokens == [] and [h.text for h in found[1].hypotheses] == [""]
    assert translator.translate([]) == [] and translator.translate(["", " "])[1].text == ""


def test_space_around_a_text_does_not_matter(make_model) -> None:
    tokenizer = train_tokenizer(["a man rides a horse"] * 20, TokenizerConfig(kind="fallback", vocabulary=265))
    assert tokenizer.encode(" a man") != tokenizer.encode("a man")
    translator = Translator.from_model(make_model(tokenizer.vocab_size), tokenizer)
    plain, spaced = translator.translate(["a man", " \ta man \r"], max_length_b=5)
    assert plain.tokens == spaced.tokens


def test_n_best(words) -> None:
    found = Translator.from_engine(Echo(), words(30)).translate(["w4 w5"], beam_size=3, n_best=3)[0]
    assert [h.score for h in found.hypotheses] == [0.0, -1.0, -2.0]
    assert (found.text, found.score, found.tokens) == (found.hypotheses[0].text, 0.0, [5, 4])


@given(st.lists(st.integers(0, 12), max_size=40), st.integers(1, 60))
def test_batches_cover_each_text_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = list(batches(lengths, budget))
    assert sorted(index for batch in found for index in batch) == [index for index, length in enumerate(lengths) if length]
    for batch in found:
        assert len(batch) == 1 or len(batch) * (max(lengths[index] for index in batch) + 1) <= budget


def test_too_long(words, caplog: pytest.LogCaptureFixture) -> None:
    translator = Translator.from_engine(Echo(), words(30))
    long = " ".join(["w4"] * 10)
    assert translator.translate([" ".join(["w4"] * 9)])[0].tokens == [4] * 9
    with pytest.raises(TooLongError, match=r"text 2 of 2 has 10 pieces.*at most 9") as caught:
        translator.translate(["w5", long])
    assert isinstance(caught.value, DataError) and caught.value.index == 1
    found = translator.translate(["w5", long], on_long="truncate")
    assert found[1].tokens == [4] * 9 and [translation.truncated for translation in found] == [False, True]
    assert "text 2 of 2" in caplog.text


def test_wrong_arguments(words) -> None:
    translator = Translator.from_engine(Echo(), words(30))
    with pytest.raises(TypeError, match="list of strings"):
        translator.translate("w4 w5")
    for texts, message in ((b"w4", "bytes was given"), (None, "NoneType was given"), (["w4", None], "text 2 of 2 is no string but NoneType")):
        with pytest.raises(TypeError, match=message):
            translator.translate(texts)
    with pytest.raises(TypeError, match="prefix 1 of 1 is no string"):
        translator.translate(["w4"], prefixes=[4])
    assert len(translator.translate(text for text in ("w4", "w5"))) == 2
    for options, name in (
        ({"max_batch_tokens": None}, "max_batch_tokens"),
        ({"beam_size": 0}, "beam_size"),
        ({"n_best": 2}, "n_best"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"on_long": "x"}, "on_long"),
    ):
        with pytest.raises(ConfigError, match=name):
            translator.translate(["w4"], **options)


def test_results_do_not_depend_on_batching(make_model, words) -> None:
    translator = Translator.from_model(make_model(40, seed=4, sharpness=2.0), words(40))
    generator = random.Random(0)
    texts = [" ".join(f"w{generator.randrange(4, 40)}" for _ in range(generator.randint(0, 10))) for _ in range(15)]
    for beam_size in (1, 3):
        whole = translator.translate(texts, beam_size=beam_size, max_length_b=5)
        for budget in (1, 60, 300):
            found = translator.translate(texts, beam_size=beam_size, max_length_b=5, max_batch_tokens=budget)
            assert [t.tokens for t in found] == [t.tokens for t in whole]
            assert [t.score for t in found] == pytest.approx([t.score for t in whole], abs=1e-4)


def test_from_model_follows_the_weights(make_model, words) -> None:
    model = make_model(30, sharpness=3.0)
    translator = Translator.from_model(model, words(30))
    copied = Translator.from_model(model, words(30), compute_type="bfloat16")
    before = translator.translate(["w4 w5 w6"])[0], copied.translate(["w4 w5 w6"])[0]
    with torch.no_grad():
        model.embeddings.output.copy_(model.embeddings.output.flip(0))
    assert translator.translate(["w4 w5 w6"])[0] != before[0]
    assert copied.translate(["w4 w5 w6"])[0] == before[1]


def test_from_a_folder(tmp_path: Path, make_model) -> None:
    tokenizer = train_tokenizer(["a man rides a horse"] * 20, TokenizerConfig(kind="fallback", vocabulary=265))
    model = make_model(tokenizer.vocab_size, sharpness=3.0)
    save_model_folder(tmp_path / "model", model, tokenizer, "", {"languages": {"source": "en", "target": "de"}})
    translator = Translator(tmp_path, engine="torch")
    assert translator.info["languages"]["target"] == "de"
    expected = Translator.from_model(model, tokenizer).translate(["a man"], beam_size=2)
    assert translator.translate(["a man"], beam_size=2) == expected
    Translator(tmp_path, device="auto", compute_type="bfloat16").translate(["a man"])
    with pytest.raises(ConfigError, match="compute_type"):
        Translator(tmp_path, compute_type="int3")
    with pytest.raises(ConfigError, match="device"):
        Translator(tmp_path, device="gpu")


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_what_a_translator_is_not_made_of(tmp_path: Path, make_model, engine: str) -> None:
    tokenizer = train_tokenizer(["ab cd ef gh"] * 10, TokenizerConfig(kind="fallback", vocabulary=264))
    save_model_folder(tmp_path, make_model(tokenizer.vocab_size), tokenizer, "")
    for name in ("threads", "device", "compute_type"):
        with pytest.raises(ConfigError, match=f"^{name} is "):
            Translator(tmp_path, engine=engine, **{name: 1.5})
    with pytest.raises(DataError, match="name of the model is empty"):
        Translator("")
    translator = Translator(tmp_path, engine=engine)
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="a Translator cannot be pickled or copied: make another one"):
            copied(translator)


def test_import_needs_no_torch() -> None:
    code = "import cvmk.inference, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prefixes_and_further_options(make_model, tokenizer) -> None:
    model = make_model(tokenizer.vocab_size, sharpness=3.0)
    translator = Translator.from_model(model, tokenizer)
    texts, prefixes = ["a man rides", "two horses", ""], ["a horse", "", "two"]
    found = translator.translate(texts, prefixes=prefixes, beam_size=2, max_length_b=6, max_batch_tokens=20)
    assert found[0].text.startswith("a horse") and found[0].tokens[: len(tokenizer.encode("a horse"))] == tokenizer.encode("a horse")
    plain = translator.translate(texts, beam_size=2, max_length_b=6)
    assert found[1].tokens == plain[1].tokens and found[2].text == ""
    said = translator.translate(["two horses"], max_length_b=6)[0].tokens
    other = translator.translate(["two horses"], max_length_b=6, suppressed=said[:1], min_length=4, repetition_penalty=1.5)[0].tokens
    assert said[0] not in other and len(other) >= 4
    for wrong in (["a"], "a", ["a"] * 4):
        with pytest.raises(ConfigError, match="prefixes must be a list of 3 strings"):
            translator.translate(texts, prefixes=wrong)
    with pytest.raises(ConfigError, match=r"prefix 2 of 3 has \d+ pieces and the model writes at most 39 \(model.max_length = 40\)"):
        translator.translate(texts, prefixes=["", "horse " * 60, ""])


def test_explain_says_which_engine_runs_the_model(tmp_path: Path, make_model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is preferred but refuses, one that takes the model, and the one behind it."""
    save_model_folder(tmp_path, make_model(tokenizer.vocab_size), tokenizer, "")
    assert Translator(tmp_path).explain() == [EngineAnswer("native", (), True), EngineAnswer("torch", (), False)]
    monkeypatch.setenv("CVMK_BACKEND", "reference")
    native, torch_engine = Translator(tmp_path).explain()
    assert "CVMK_BACKEND allows only reference" in native.reasons[0] and torch_engine == EngineAnswer("torch", (), True)
    monkeypatch.delenv("CVMK_BACKEND")
    asked = []

    def fake(name: str, *reasons: str) -> None:
        module = types.ModuleType(f"cvmk.inference.{name}_engine")
        module.refusals = lambda manifest, device, compute_type: asked.append((name, manifest.vocab_size, device, compute_type)) or list(reasons)
        module.load = lambda *arguments: Echo()
        monkeypatch.setitem(sys.modules, module.__name__, module)

    fake("small", "small: takes no layernorm", "small: takes no biases")
    fake("swift")
    monkeypatch.setattr(engines, "ENGINES", ("small", "swift", "torch"))
    translator = Translator(tmp_path, compute_type="bfloat16")
    assert isinstance(translator.engine, Echo)
    assert asked == [(name, tokenizer.vocab_size, "cpu", "bfloat16") for name in ("small", "swift")]
    assert translator.explain() == [
        EngineAnswer("small", ("small: takes no layernorm", "small: takes no biases"), False),
        EngineAnswer("swift", (), True),
        EngineAnswer("torch", (), False),
    ]
    forced = Translator(tmp_path, engine="torch")
    assert isinstance(forced.engine, TorchEngine) and [answer.chosen for answer in forced.explain()] == [False, False, True]
    with pytest.raises(ConfigError, match="^small: takes no layernorm; small: takes no biases$"):
        Translator(tmp_path, engine="small")
    with pytest.raises(ConfigError, match="engine is 'warp', and must be one of auto, small, swift, torch"):
        Translator(tmp_path, engine="warp")
    monkeypatch.setattr(engines, "ENGINES", ("small", "torch"))
    with pytest.raises(ConfigError, match="takes no biases; compute_type is 'int9', and the torch engine has"):
        Translator(tmp_path, compute_type="int9")
    assert Translator.from_engine(Echo(), tokenizer).explain() == [EngineAnswer("Echo", (), True)]
    assert Translator.from_model(make_model(30), tokenizer).explain() == [EngineAnswer("TorchEngine", (), True)]
