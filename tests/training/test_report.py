"""What a report and a model's card say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import events, train

from cvmk.config.loading import load_train_config
from cvmk.report.evaluations import read_evaluation
from cvmk.training.report import model_card, score_lines
from cvmk.validation import Score, score


def test_a_report_says_what_was_done(config: Path, tmp_path: Path) -> None:
    report = train(config, "data.source_language=en", "data.target_language=de", "run.report=true")
    run = tmp_path / "run"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"{report['validation']['value']:.2f} [" in page and (run / "report.md").exists() and (run / "report.json").exists()
    kept = {name: read_evaluation(run / "evaluations" / f"{name}.jsonl") for name in ("validation", "test")}
    assert (kept["validation"].sentences, kept["test"].sentences) == (20, 30) and kept["test"].teacher is None
    assert score("bleu", kept["test"].hypotheses, kept["test"].references).value == report["test"]["value"]
    assert json.loads((run / "training_report.json").read_text()) == report
    history = json.loads((run / "validation_history.json").read_text())
    assert report["title"] == "model" and report["languages"] == ["en", "de"] and report["teacher"] is None and report["distillation"] is None
    assert (report["iterations"], report["stopped_early"], report["rollbacks"], report["diverged"]) == (40, False, 0, None)
    assert report["pairs"] == {"trained_on": 400, "skipped": 0} and report["vocabulary"] == 400
    assert report["model"] == load_train_config(config).model.model_dump()
    assert report["validation"]["value"] == max(result["value"] for result in history) and report["test"]["sentences"] == 30
    speed = report["throughput"]
    assert speed["target_tokens"] > 0 and speed["target_tokens_per_second"] == pytest.approx(speed["target_tokens"] / speed["seconds"], rel=0.05)
    assert speed["iterations_per_second"] == pytest.approx(40 / speed["seconds"], rel=0.05)
    assert report["environment"]["device"] == "cpu" and report["environment"]["packages"]["torch"]
    assert set(report["losses"]["last"]) == {"loss", "cross_entropy", "logits", "hidden", "attention"}
    assert (run / "model" / "card.md").read_text() == model_card(report)


def test_a_run_does_not_fail_for_its_report(with_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("cvmk.report.write_report", fail)
    report = train(with_teacher, "run.report=true", "training.iterations=4")
    for folder in (tmp_path / "run", tmp_path / "run" / "teacher"):
        (note,) = (event["message"] for event in events(folder, "note") if "report" in event["message"])
        assert "RuntimeError: no ink" in note and f"cvmk report {folder}" in note and not (folder / "report.html").exists()
    kept = read_evaluation(tmp_path / "run" / "evaluations" / "test.jsonl")
    assert kept.teacher is not None and score("bleu", kept.teacher, kept.references).value == report["teacher"]["test"][0]["value"]


def report_of(**changes: object) -> dict[str, object]:
    score = Score("bleu", 12.345, "nrefs:1|tok:13a", False).to_dict()
    result = {"sentences": 7, "scores": [score], "agreement": []}
    return {
        "languages": ["en", "de"], "parameters": 2_500_000, "vocabulary": 400, "iterations": 40, "pairs": {"trained_on": 400, "skipped": 0},
        "weights": "checkpoint at iteration 20", "teacher": None, "validation": result, "test": None, "environment": {"cvmk": "1.2"},
    } | changes  # fmt: skip


def test_a_card_of_a_model_without_teacher_or_test() -> None:
    card = model_card(report_of())
    assert card.startswith("# en to de translation model\n")
    assert "cvmk 1.2: 2.50 M parameters, vocabulary 400, 40 iterations on 400 pairs; checkpoint at iteration 20." in card
    assert "## Scores, validation (7 sentences)\n\n- bleu 12.35  `nrefs:1|tok:13a`\n" in card
    assert "Distilled" not in card and "test" not in card
    assert card.endswith("Use: `cvmk translate MODEL < text.en > text.de`\n")


def test_a_card_of_a_student() -> None:
    card = model_card(report_of(teacher={"parameters": 9_000_000}, test={"sentences": 9, "scores": [], "agreement": []}))
    assert "Distilled from a teacher of 9.00 M parameters." in card and "## Scores, test (9 sentences)" in card


def test_scores_say_against_what_and_by_which_implementation() -> None:
    own, fallback = Score("chrf", 50.0, "a", False), Score("ter", 20.0, "b", True)
    lines = score_lines({"scores": [own.to_dict(), fallback.to_dict()], "agreement": [own.to_dict()]})
    assert lines == ["- chrf 50.00  `a`", "- ter 20.00 (built-in fallback)  `b`", "- chrf 50.00  `a` (against the teacher's output)"]
