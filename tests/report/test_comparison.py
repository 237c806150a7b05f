"""Scores with intervals, and what is significant: against the baseline, against the teacher, and where it cannot be told."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import sentences, validation, worse, write_run

from cvmk.report import figures_of
from cvmk.report.comparison import SetScores, verdict
from cvmk.validation.bootstrap import interval, paired
from cvmk.validation.metrics import score

SOURCES, REFERENCES = sentences(60)
CONFIG = {"validation.metrics": ["bleu", "chrf"]}
DIFFERENT = "different validation sets"


def scores(found: list[SetScores], system: str, name: str = "validation") -> SetScores:
    return next(one for one in found if (one.system, one.set) == (system, name))


def test_a_run_against_its_baseline_is_what_the_paired_bootstrap_says(tmp_path: Path) -> None:
    good, bad = worse(REFERENCES, 5), worse(REFERENCES, 2)
    write_run(tmp_path / "base", hypotheses=bad, config=CONFIG)
    write_run(tmp_path / "ours", hypotheses=good, config=CONFIG)
    figures = figures_of([tmp_path / "ours"], baseline=tmp_path / "base", bootstrap=200)
    assert [run.name for run in figures.runs] == ["base", "ours"] and figures.baseline is figures.runs[0]
    ours = scores(figures.scores, "ours", "test")
    assert [one.metric for one in ours.scores] == ["bleu", "chrf"]
    assert ours.scores[0].value == score("bleu", good, REFERENCES).value
    assert (ours.scores[0].low, ours.scores[0].high) == interval("bleu", good, REFERENCES, 200)
    assert ours.baseline is not None and ours.baseline.other == "base"
    expected = paired("bleu", good, bad, REFERENCES, 200)
    assert ours.baseline.pair("bleu") == expected and verdict(expected) == "better"
    assert scores(figures.scores, "base").baseline is None
    reverse = figures_of([tmp_path / "base"], baseline=tmp_path / "ours", bootstrap=200)
    pair = scores(reverse.scores, "base").baseline
    assert pair is not None and verdict(pair.pairs[0]) == "worse"


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, hypotheses=worse(REFERENCES, 3), config=CONFIG)
    figures = figures_of([tmp_path / "a", tmp_path / "b"], bootstrap=50)
    found = scores(figures.scores, "b").baseline
    assert found is not None and [(pair.difference, pair.p_value, verdict(pair)) for pair in found.pairs] == [(0.0, 1.0, "no significant difference")] * 2
    assert "no-better-than-baseline" in [advice.rule for advice in figures.advice]


def test_a_student_against_its_teacher(tmp_path: Path) -> None:
    student, teacher = worse(REFERENCES, 2), worse(REFERENCES, 10)
    write_run(tmp_path / "run", hypotheses=student, teacher=teacher, config=CONFIG)
    figures = figures_of([tmp_path / "run"], bootstrap=200)
    ours, theirs = scores(figures.scores, "run"), scores(figures.scores, "teacher of run")
    assert theirs.is_teacher and theirs.scores[0].value == score("bleu", teacher, REFERENCES).value
    assert ours.teacher is not None and ours.teacher.pair("bleu") == paired("bleu", student, teacher, REFERENCES, 200)
    assert "far-from-teacher" in [advice.rule for advice in figures.advice]
    assert [one.system for one in figures.samples[0].translations] == ["run", "teacher of run"]


def test_a_teacher_that_is_one_of_the_runs_stands_there_once(tmp_path: Path) -> None:
    teacher = worse(REFERENCES, 10)
    write_run(tmp_path / "student", hypotheses=worse(REFERENCES, 2), teacher=teacher, config=CONFIG)
    write_run(tmp_path / "master", hypotheses=teacher, config=CONFIG)
    figures = figures_of([tmp_path / "student", tmp_path / "master"], bootstrap=50)
    assert {one.system for one in figures.scores} == {"student", "master"}
    ours = scores(figures.scores, "student").teacher
    assert ours is not None and ours.other == "master"


@pytest.mark.parametrize("same_size", [True, False])
def test_runs_over_different_sets_are_not_compared(tmp_path: Path, same_size: bool) -> None:
    write_run(tmp_path / "base", hypotheses=REFERENCES, config=CONFIG)
    if same_size:
        write_run(tmp_path / "ours", hypotheses=REFERENCES, references=[f"{text} x" for text in REFERENCES], config=CONFIG)
    else:
        write_run(tmp_path / "ours", hypotheses=REFERENCES[:40], config=CONFIG)
    found = scores(figures_of([tmp_path / "base", tmp_path / "ours"], bootstrap=50).scores, "ours").baseline
    assert found is not None and not found.pairs and DIFFERENT in found.reason and "not comparable" in found.reason
    assert ("(40 and 60 sentences)" in found.reason) is not same_size


def test_a_run_of_before_that_kept_no_sentences_has_the_scores_that_it_recorded(tmp_path: Path) -> None:
    result = validation(100, 50.0).values()
    write_run(tmp_path / "old", [validation(100, 50.0)], report={"iterations": 100, "weights": "an average", "validation": result, "test": result})
    write_run(tmp_path / "new", hypotheses=REFERENCES, config=CONFIG)
    figures = figures_of([tmp_path / "new", tmp_path / "old"], bootstrap=50)
    old = scores(figures.scores, "old", "test")
    assert [(one.value, one.low, one.high) for one in old.scores] == [(50.0, 49.0, 51.0)]
    assert old.baseline is not None and "older cvmk" in old.baseline.reason and "older cvmk" in old.notes[0]


def test_a_score_that_comes_out_otherwise_than_recorded_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "run", hypotheses=worse(REFERENCES, 2), config=CONFIG)
    notes = scores(figures_of([tmp_path / "run"], bootstrap=50).scores, "run").notes
    assert len(notes) == 1 and "recorded BLEU 50.00 (by recorded; now " in notes[0]


def test_the_sentences_of_an_unfinished_run_are_found_by_its_configuration(tmp_path: Path) -> None:
    import json

    from cvmk.text.phrasebook import phrasebook

    valid = phrasebook(1000).valid
    texts = worse(valid.targets, 3)
    run = write_run(tmp_path / "run", [validation(20, 50.0)], config={"data.phrasebook_pairs": 1000, "validation.metrics": ["bleu"]})
    (run / "hypotheses").mkdir()
    (run / "hypotheses" / "step-20.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    contents = {f"{valid.name}.{side}": {"sha256": sha} for side, sha in zip(("source", "target"), valid.fingerprints, strict=True)}
    (run / "contents.json").write_text(json.dumps(contents))
    found = scores(figures_of([run], bootstrap=50).scores, "run")
    assert found.sentences == len(valid) and found.scores[0].value == score("bleu", texts, valid.targets).value
    contents[f"{valid.name}.source"]["sha256"] = "0" * 64  # the text is another one now
    (run / "contents.json").write_text(json.dumps(contents))
    other = scores(figures_of([run], bootstrap=50).scores, "run")
    assert other.scores[0].value == 50.0 and "no longer what" in other.notes[0]


def test_metrics_that_are_left_as_recorded(tmp_path: Path) -> None:
    """As at the end of `cvmk train`, where nobody waits minutes for TER."""
    write_run(tmp_path / "run", hypotheses=worse(REFERENCES, 3), teacher=worse(REFERENCES, 9), config=CONFIG)
    whole = figures_of([tmp_path / "run"], bootstrap=50)
    quick = figures_of([tmp_path / "run"], bootstrap=50, as_recorded={"bleu"})
    ours = scores(quick.scores, "run")
    assert {one.metric for one in ours.scores} == {"bleu", "chrf"} and f"cvmk report {tmp_path / 'run'} does" in ours.notes[-1]
    assert next(one for one in ours.scores if one.metric == "bleu").value == 50.0  # what the run wrote down
    assert ours.teacher is not None and [pair.metric for pair in ours.teacher.pairs] == ["chrf"]
    assert not any("does" in note for note in scores(whole.scores, "run").notes)
