"""`cvmk bench mixers`: equal sizes, noise, tables, and a study of a few iterations that goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvmk.cli import _mixer_measures as measures
from cvmk.cli import _mixer_study as study
from cvmk.cli import main
from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.text.phrasebook import phrasebook

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


def test_a_study_goes_on_where_it_stopped(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    arguments = ["bench", "mixers", str(config), str(work), "--iterations", "3", "--streams", "2", "--lengths", "8", "40", "--steps", "2"]
    assert main([*arguments, "--patterns", "A"]) == 0
    first = (work / "A-seed1" / study.RESULT).read_text()
    result = json.loads(first)
    assert result["diverged"] is None and len(result["hypotheses"]) == 9
    assert [*result["noisy"]] == ["as they are", *measures.NOISES, "2 joined", "4 joined", "8 joined"]
    assert 0 <= result["laal"] and result["tokens_per_second"] > 0 and result["costs"]["40"]["bytes"] > result["costs"]["8"]["bytes"]

    measured: list[Path] = []
    original: Callable[..., dict[str, Any]] = study._measured

    def watched(folder: Path, options: Any) -> dict[str, Any]:
        measured.append(folder)
        return original(folder, options)

    monkeypatch.setattr(study, "_measured", watched)
    assert main([*arguments, "--patterns", "A", "A:S"]) == 0
    assert [folder.name for folder in measured] == ["A-S-seed1"] and (work / "A-seed1" / study.RESULT).read_text() == first
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| A:S ")]
    if importlib.util.find_spec("matplotlib") is not None:
        assert {path.name for path in (work / "plots").iterdir()} == {f"{name}.{kind}" for name in ("quality", "step", "state") for kind in ("png", "svg")}
    assert len(rows) == 3 and out.endswith((work / study.TABLE).read_text()) and " to " in rows[0]
    assert main([*arguments, "--patterns", "A", "--set", "model.d_model=32"]) == 2
    assert "another configuration" in capsys.readouterr().err


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
    assert study.tables({"A": [{"diverged": "the loss is nan"}]}).endswith("A: the loss is nan\n")
    with pytest.raises(ConfigError, match="--patterns A: is no pattern"):
        study.sides("A:")
