"""`cvmk bench mixers`: equal sizes, noise, streams, costs, tables, plots, and a study of a few iterations that goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvmk.cli import _mixer_costs as costs
from cvmk.cli import _mixer_measures as measures
from cvmk.cli import _mixer_plots as plots
from cvmk.cli import _mixer_streams as streams
from cvmk.cli import _mixer_study as study
from cvmk.cli import _mixer_tables as tables
from cvmk.cli import main
from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.inference import Translator
from cvmk.streaming import LocalAgreement, Policy, Retranslation, Stream, WaitK
from cvmk.text.phrasebook import phrasebook
from cvmk.training import pipeline
from cvmk.validation.metrics import score
from cvmk.validation.streaming import Shown, normalized_erasure

TOML = """
[run]
device = "cpu"
threads = 1

[data]
folder = "{folder}"
train = {{ tsv = "train.tsv" }}
valid = {{ tsv = "valid.tsv" }}

[tokenizer]
vocabulary = 350

[model]
d_model = 16
ffn = 64
heads = 2
encoder_layers = 1
decoder_layers = 1

[training]
max_tokens = 300

[validation]
max_sentences = 4
bootstrap = 50
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    book = phrasebook(1000)
    pairs = [f"{source}\t{target}\n" for source, target in zip(book.train.sources, book.train.targets, strict=True)]
    (tmp_path / "train.tsv").write_text("".join(pairs[:100]), encoding="utf-8")
    (tmp_path / "valid.tsv").write_text("".join(pairs[100:109]), encoding="utf-8")
    path = tmp_path / "config.toml"
    path.write_text(TOML.format(folder=tmp_path), encoding="utf-8")
    return path


def test_models_have_equal_sizes() -> None:
    base = ModelConfig(d_model=128, ffn=256, heads=4)
    wanted = study.parameters_of(base, 8000)
    for mixer in ("mamba", "ssru", "retnet"):
        mixed = base.model_copy(update={"encoder_mixers": [mixer], "decoder_mixers": [mixer]})
        found = study.of_equal_size(mixed, wanted, 8000)
        assert found.ffn != base.ffn and abs(study.parameters_of(found, 8000) - wanted) < 0.01 * wanted, mixer
    assert study.of_equal_size(base, wanted, 8000).ffn == base.ffn
    assert study.of_equal_size(base, 1000, 8000).ffn == 8


def test_noise_is_the_same_every_time_and_of_its_kind() -> None:
    text = 'Two dogs, "Rex" and Bo, play in the snow near a lake today.'
    for noise in measures.NOISES.values():
        assert noise(text, 3) == noise(text, 3) != text
        assert noise("", 0) == ""
    assert sorted(measures.swapped(text, 1).split()) == sorted(text.split())
    dropped = measures.without_some_words(text, 5).split()
    assert {*dropped} < {*text.split()} and measures.without_some_words("One", 2) == "One"
    assert measures.as_recognised(text, 0) == "two dogs rex and bo play in the snow near a lake today"
    assert measures.joined(["a", "b", "c", "d", "e"], 2) == ["a b", "c d"] and measures.joined(["a"], 2) == ["a"]


def test_what_is_said_of_a_cut_source_is_judged_whatever_is_missing() -> None:
    assert measures.cut("a b c d e", (1, 2)) == "a b c" and measures.cut("One", (1, 2)) == "One" and measures.cut("", (1, 2)) == ""
    references = ["ein Hund spielt im Schnee am See .", "zwei Kinder essen ein Eis im Park ."]
    begun = [measures.cut(text, (1, 2)) for text in references]
    assert score("bleu", begun, references).value < 50
    assert measures.said_of(begun, references) == {"bleu": pytest.approx(100), "length": pytest.approx(0.5)}
    assert measures.said_of(references, references) == {"bleu": pytest.approx(100), "length": 1}
    assert measures.said_of(["ein Hund singt laut im See am Schnee .", begun[1]], references)["bleu"] < 80
    assert measures.kept(["Ein Hund.", "Zwei alte"], ["Ein Hund spielt.", "Zwei Kinder essen."]) == 0.75
    assert measures.kept([""], ["Ein"]) == 1


def test_stability_is_of_the_words_that_translations_of_prefixes_said() -> None:
    shown = [Shown(at, text.split()) for at, text in enumerate(["", "Ein", "Der Hund", "Der Hund spielt", "Der Hund spielt."])]
    assert streams.stability([shown]) == {"next": pytest.approx(2 / 3), "whole": pytest.approx(2 / 3)}
    back = [Shown(at, text.split()) for at, text in enumerate(["", "Ein Hund", "Der Hund", "Ein Hund", "Ein Hund."])]
    assert streams.stability([back]) == {"next": 0, "whole": 0.5}
    assert streams.stability([shown, back]) == {"next": pytest.approx(2 / 7), "whole": pytest.approx(4 / 7)}
    assert streams.stability([[Shown(0, []), Shown(0, [])], [Shown(0, []), Shown(1, ["Ja"]), Shown(1, ["Ja."])]]) == {"next": 1, "whole": 1}


def test_patterns_of_causal_encoders(config: Path, tmp_path: Path) -> None:
    assert study.sides("causal-MA:S") == ("MA", "S", True) and study.sides("M") == ("M", "M", False)
    made = study.Study(str(config), ["model.d_model=64", "model.ffn=256"], tmp_path / "work", 3)
    assert "encoder_direction" not in made.configuration("M", 1)["model"] and made.folder("causal-M:S", 2).name == "causal-M-S-seed2"
    models = {pattern: made.checked(pattern).model for pattern in ("A", "causal-A", "causal-M")}
    assert [model.encoder_direction for model in models.values()] == ["bidirectional", "causal", "causal"]
    assert models["causal-A"].ffn == models["A"].ffn
    sizes = [study.parameters_of(model, 350) for model in models.values()]
    assert max(sizes) < 1.02 * min(sizes)


def _one_by_one(translator: Translator, policy: Policy, text: str) -> list[Shown]:
    """What `streams.watched` gives, by the stream that readers have."""
    kept: dict[int, tuple[str, str]] = {}
    shown, words = [Shown(0, [])], text.split()
    with Stream(translator, policy) as stream:
        for at in range(len(words) + 1):
            for update in stream.append(words[at] + " ") if at < len(words) else stream.close():
                kept[update.segment] = kept.get(update.segment, ("", ""))[0] + update.committed, update.tentative
            shown.append(Shown(min(at + 1, len(words)), " ".join("".join(kept[segment]) for segment in sorted(kept)).split()))
    return shown


def test_a_study_goes_on_where_it_stopped(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    arguments = ["bench", "mixers", str(config), str(work), "--iterations", "3", "--streams", "2", "--lengths", "8", "40", "--steps", "2", "--seconds", "0.001"]
    with monkeypatch.context() as patched:
        patched.setattr(study, "write_plots", lambda *arguments: "no plots")
        assert main([*arguments, "--patterns", "A"]) == 0
    assert "no plots" in capsys.readouterr().err
    first = (work / "A-seed1" / study.RESULT).read_text()
    result, cost = json.loads(first), json.loads((work / study.COSTS).read_text())
    assert result["diverged"] is None and len(result["hypotheses"]) == 9
    assert [*result["noisy"]] == ["as they are", *measures.NOISES, "2 joined", "4 joined", "8 joined"]
    assert [*result["cuts"]] == ["whole", *measures.CUTS] and all(0 <= one["kept"] <= 1 for one in result["cuts"].values())
    assert 0 <= result["laal"] and 0 <= result["stability"]["whole"] <= 1
    assert cost["decoding"]["A"]["40"]["bytes"] > cost["decoding"]["A"]["8"]["bytes"]
    assert len(cost["training"]["seconds"]["A"]) == len(cost["training"]["tokens"]) == 3 and cost["environment"]["threads"] == 1

    measured: list[Path] = []
    original: Callable[..., dict[str, Any]] = study._measured

    def watched(folder: Path, options: Any) -> dict[str, Any]:
        measured.append(folder)
        return original(folder, options)

    monkeypatch.setattr(study, "_measured", watched)
    assert main([*arguments, "--patterns", "A", "causal-A:S"]) == 0
    assert [folder.name for folder in measured] == ["causal-A-S-seed1"] and (work / "A-seed1" / study.RESULT).read_text() == first
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| causal-A:S ")]
    assert len(rows) == 6 and out.endswith((work / study.TABLE).read_text()) and " to " in rows[0]
    if importlib.util.find_spec("matplotlib") is not None:
        assert {path.name for path in (work / "plots").iterdir()} == {f"{name}.{kind}" for name in plots.NAMES for kind in ("png", "svg")}

    monkeypatch.setattr(study, "write_plots", lambda *arguments: None)  # once is enough

    # The costs were measured for both beside each other, and are measured again by themselves.
    both = json.loads((work / study.COSTS).read_text())
    assert [*both["decoding"]] == [*both["training"]["seconds"]] == ["A", "causal-A:S"]
    monkeypatch.setattr(pipeline, "train", _no_training)
    assert main([*arguments, "--patterns", "A"]) == 0 and json.loads((work / study.COSTS).read_text()) == both
    assert main([*arguments, "--patterns", "A", "--costs-again"]) == 0 and len(measured) == 1
    again = json.loads((work / study.COSTS).read_text())
    assert [*again["decoding"]] == ["A", "causal-A:S"] and again["training"]["seconds"] != both["training"]["seconds"]
    other = ["24" if argument == "40" else argument for argument in arguments]
    assert main([*other, "--patterns", "A", "A", "--seeds", "1", "1"]) == 0 and len(measured) == 1, "a pattern that is named twice is one"
    assert [*json.loads((work / study.COSTS).read_text())["decoding"]["A"]] == ["8", "24"], "other options are not passed over"
    assert main([*arguments, "--patterns", "A"]) == 0

    # A training that is finished is only measured, as is one that an older cvmk measured less of.
    (work / "A-seed1" / study.RESULT).unlink()
    shortened = json.loads((work / "causal-A-S-seed1" / study.RESULT).read_text())
    (work / "causal-A-S-seed1" / study.RESULT).write_text(json.dumps({name: value for name, value in shortened.items() if name not in ("cuts", "stability")}))
    assert main([*arguments, "--patterns", "A", "causal-A:S"]) == 0 and len(measured) == 3
    assert (work / "A-seed1" / study.RESULT).read_text() == first and json.loads((work / "causal-A-S-seed1" / study.RESULT).read_text()) == shortened
    shutil.rmtree(work / "A-seed1" / study.RUN)
    (work / "A-seed1" / study.RESULT).unlink()
    with pytest.raises(AssertionError, match="trained"):
        main([*arguments, "--patterns", "A"])

    # Streams in one batch see what each sees by itself, with an encoder that keeps what it has read too.
    translator, texts = Translator(work / "causal-A-S-seed1" / "run" / "model"), [*result["references"][:3], "Where is it? I do not know. Here", "Yes", ""]
    for policy in (WaitK(3), Retranslation(), LocalAgreement()):
        assert streams.watched(streams.Batched(translator), policy, texts) == [_one_by_one(translator, policy, text) for text in texts], policy
    few = list(phrasebook(1000).train.sources[100:102])
    assert normalized_erasure([_one_by_one(translator, Retranslation(), text) for text in few]) == shortened["erasure"]

    assert main([*arguments, "--patterns", "A", "--set", "model.d_model=32"]) == 2
    assert "another configuration" in capsys.readouterr().err


def _no_training(*arguments: Any, **options: Any) -> None:
    raise AssertionError("it was trained")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["mixers"], "CONFIG.toml"),
        (["mixer", "a", "b"], "mixer"),
        (["mixers", "{config}", "{work}", "--patterns", "AX"], "--patterns AX"),
        (["--patterns", "A"], "--patterns"),
    ],
)
def test_what_is_no_study_is_named(arguments: list[str], named: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *(argument.format(config=config, work=tmp_path / "work") for argument in arguments)]) == 2
    assert named in capsys.readouterr().err


def test_a_training_that_diverged_is_told() -> None:
    assert tables.tables({"A": [{"diverged": "the loss is nan"}]}, None).endswith("A: the loss is nan\n")
    with pytest.raises(ConfigError, match="--patterns A: is no pattern"):
        study.sides("A:")


def _fabricated(count: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Results and costs of patterns with numbers that differ."""
    patterns = ["A", "M", "2", "S", "R", "W", "H", "MMMA", "MA", "A:S", "causal-A", "causal-M:S"][:count]
    references = [text for text in phrasebook(1000).valid.targets[:20] if len(text.split()) > 4]
    found, decoding, seconds = {}, {}, {}
    for at, pattern in enumerate(patterns):
        hypotheses = [text if (i + at) % 3 else text[::-1] for i, text in enumerate(references)]
        noisy = {name: 38.0 - 1.3 * at - 2 * i for i, name in enumerate(["as they are", *measures.NOISES, "2 joined", "4 joined", "8 joined"])}
        cuts = {name: {"bleu": 30.0 + at, "length": 0.5 + 0.01 * at, "kept": 0.6 + 0.02 * at + 0.1 * i} for i, name in enumerate(["whole", *measures.CUTS])}
        found[pattern] = [{
            "diverged": None, "ffn": 8 * at, "parameters": 2_600_000, "references": references, "hypotheses": hypotheses, "noisy": noisy, "cuts": cuts,
            "laal": 3.5, "wait_bleu": 20.0, "erasure": 0.3, "stability": {"next": 0.7 + 0.01 * at, "whole": 0.5 + 0.02 * at},
        }]  # fmt: skip
        grows = at % 3 == 0
        decoding[pattern] = {
            str(length): {"milliseconds": 2.0 + 0.1 * at + length / 4000 * grows, "bytes": 1000 * (at + 1) * (length if grows else 100)}
            for length in (16, 64, 256, 1024, 4096)
        }
        seconds[pattern] = [0.1 * (1 + at / 3), 0.2 * (1 + at / 3), 9.0]
    return found, {"training": {"tokens": [1000, 2000, 1500], "seconds": seconds}, "decoding": decoding}


def test_tables_compare_training_steps_by_rounds() -> None:
    found, cost = _fabricated(4)
    rows = [line for line in tables.tables(found, cost).splitlines() if line.startswith("| S |")]
    assert len(rows) == 6 and rows[4] == "| S | 5000 | 2.00 |", "ten thousand tokens a second in two of three rounds, and half as many"
    assert rows[2].startswith("| S | 33.00 | 0.53 | 33.00 | 0.53 | 76.0% |") and rows[3] == "| S | 3.50 | 20.00 | 0.300 | 73.0% | 56.0% |"


def test_plots_are_text_and_the_same_whenever_they_are_made(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found, cost = _fabricated(12)
    made = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert plots.write_plots(found, cost, tmp_path / name) is None
        made.append({path.name: path.read_bytes() for path in (tmp_path / name / plots.FOLDER).iterdir()})
    assert made[0] == made[1] and len(made[0]) == 2 * len(plots.NAMES)
    for name in plots.NAMES:
        picture = made[0][f"{name}.svg"].decode()
        assert all(f">{pattern}</text>" in picture for pattern in found), name
        assert len(picture) < 60_000, name
    looks = [(style["color"], style["marker"], style["linestyle"]) for style in map(plots._style, range(100))]
    assert len({*looks}) == len(looks)


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long one takes, each takes its steps beside the others'."""
    taken: list[str] = []
    original = costs._timed

    def timed(model: Any, *rest: Any) -> list[float]:
        taken.append(model.config.decoder_mixers[0])
        return original(model, *rest)

    monkeypatch.setattr(costs, "_timed", timed)
    base = ModelConfig(d_model=16, ffn=16, heads=2, encoder_layers=1, decoder_layers=1)
    found = costs.decoding({name: base.model_copy(update={"decoder_mixers": [name]}) for name in ("attention", "ssru")}, [4, 9], 2)
    assert taken == ["attention", "ssru"] * 6
    assert found["ssru"]["9"]["milliseconds"] > 0 and found["ssru"]["9"]["bytes"] < found["attention"]["9"]["bytes"]
