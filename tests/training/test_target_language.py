"""The languages of a run: what they choose, and what is said where they are not given."""

from __future__ import annotations

import json
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import runs

from cvmk.errors import ConfigError

PLACES, VERBS = ("朝に", "夜に", "今日", "明日"), ("買います", "売ります", "見ます", "見つけます")
PAIRS = [
    (f"{place} {thing} {verb}", f"{there}私は{chr(0x6C34 + thing)}を{does}。")
    for place, there in enumerate(PLACES)
    for thing in range(20)
    for verb, does in enumerate(VERBS)
]


@pytest.fixture
def japanese(config: Path) -> Path:
    for name in ("train.tsv", "valid.tsv"):
        (config.parent / name).write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS), encoding="utf-8")
    return config


OVERRIDES = ("data.source_language=en", "tokenizer.vocabulary=330", "training.iterations=20", "training.average=1")


def test_the_target_language_reaches_scores_history_and_report(japanese: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = runs.train(japanese, *OVERRIDES, "data.target_language=th")
    assert "characters" in capsys.readouterr().err
    history = json.loads((tmp_path / "run" / "validation_history.json").read_text(encoding="utf-8"))
    for result in (history[-1], report["validation"], report["test"]):
        assert "tok:char" in result["scores"][0]["signature"]
    assert "tok:char" in (tmp_path / "run" / "model" / "card.md").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="data.target_language"):
        runs.train(japanese, *OVERRIDES, "data.target_language=de", resume=True)
    runs.train(japanese, *OVERRIDES[:2], "training.iterations=40", "training.average=1", "data.target_language=th", "validation.bleu_tokenize=zh", resume=True)
    assert "not comparable" in capsys.readouterr().err
    history = json.loads((tmp_path / "run" / "validation_history.json").read_text(encoding="utf-8"))
    assert ["tok:char" in result["scores"][0]["signature"] for result in history] == [True, False]


def test_a_blind_metric_is_refused_before_training(japanese: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='validation.metric = "bleu" cannot choose'):
        runs.train(japanese, *OVERRIDES, "data.target_language=ja", "validation.bleu_tokenize=13a")
    assert not (tmp_path / "run" / "validation_history.json").exists()


@pytest.mark.parametrize(
    ("overrides", "title", "languages", "unknown"),
    [
        ([], "# Translation model\n", None, "data.source_language and data.target_language"),
        (["data.target_language=FRA"], "# Translation model into fr\n", {"source": None, "target": "fr"}, "does not give data.source_language."),
        (["data.source_language=pt_br", "data.target_language=hsb"], "# pt-BR to hsb translation model\n", {"source": "pt-BR", "target": "hsb"}, None),
    ],
)
def test_a_model_is_called_what_its_data_was_called(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], title: str, languages: object, unknown: str | None
) -> None:
    report = runs.train(config, *overrides, "training.iterations=2", "validation.max_sentences=2")
    card = (tmp_path / "run" / "model" / "card.md").read_text(encoding="utf-8")
    assert card.startswith(title) and "None" not in card
    for folder in ("model", "checkpoints/step-2"):
        assert json.loads((tmp_path / "run" / folder / "config.json").read_text(encoding="utf-8"))["languages"] == languages
    assert report["languages"] == [(languages or {}).get(side) for side in ("source", "target")]  # type: ignore[attr-defined]
    told = capsys.readouterr().err
    assert (unknown in card and unknown.rstrip(".") in told) if unknown else "unknown" not in card + told


def test_decomposed_text_is_read_like_composed_text(config: Path, tmp_path: Path, cvmk: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """The same run from decomposed files, and the same translation of decomposed input, by default; as it is where that is asked for."""
    accents = str.maketrans({"a": "á", "e": "ê", "o": "ö", "u": "ũ"})
    for form in ("NFC", "NFD"):
        for name in ("train.tsv", "valid.tsv"):
            text = (tmp_path / name).read_text(encoding="utf-8").translate(accents)
            (tmp_path / name).write_text(unicodedata.normalize(form, text), encoding="utf-8")
        runs.train(config, "training.iterations=40", "training.average=1", f"run.folder={tmp_path}/{form}")
    weights = [(tmp_path / form / "model" / "model.safetensors").read_bytes() for form in ("NFC", "NFD")]
    scores = [json.loads((tmp_path / form / "training_report.json").read_text())["validation"]["scores"] for form in ("NFC", "NFD")]
    assert weights[0] == weights[1] and scores[0] == scores[1]
    source = text.split("\t")[0]
    found = [cvmk("translate", tmp_path / "NFC", input=unicodedata.normalize(form, source)).stdout for form in ("NFC", "NFD")]
    assert found[0] == found[1] == unicodedata.normalize("NFC", found[0]) != ""
    stored = json.loads((tmp_path / "NFC" / "model" / "tokenizer.json").read_text())
    assert stored["normalization"] == "nfc"
    runs.train(config, "training.iterations=2", "tokenizer.normalization=identity", f"run.folder={tmp_path}/identity")
    assert json.loads((tmp_path / "identity" / "model" / "tokenizer.json").read_text())["normalization"] == "identity"
