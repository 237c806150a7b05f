"""The comparison of optimisers (benchmarks/optimizer_study.py), at toy size."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import optimizer_study
import pytest
from optimizer_study import Study, next_rate, peak, pooled, score_rows
from runs import last_step

from cvmk.errors import ConfigError
from cvmk.training.trainer import Trainer
from cvmk.validation import metrics


def climbed(score: Any, start: float, trials: int) -> list[float]:
    tried: dict[float, float] = {}
    while len(tried) < trials:
        rate = next_rate(tried, start)
        assert rate not in tried
        tried[rate] = score(rate)
    return list(tried)


def test_the_search_goes_to_the_better_side_and_then_between() -> None:
    def bump(middle: float) -> Any:
        return lambda rate: -abs(math.log2(rate / middle))

    assert climbed(bump(1.0), 1.0, 4) in ([1, 0.5, 2, 1.41], [1, 0.5, 2, 0.707])
    assert climbed(bump(16.0), 1.0, 6) == [1, 0.5, 2, 4, 8, 16]
    assert climbed(bump(0.1), 1.0, 6)[:5] == [1, 0.5, 2, 0.25, 0.125]
    assert climbed(lambda rate: math.nan if rate > 1 else rate, 1.0, 4) == [1, 0.5, 2, 0.707], "what diverged is worse than any"
    assert peak("adamw") == peak("sam") == peak("asam:adamw") and peak("sam:lion") == peak("lion")


def test_scores_of_several_seeds_are_pooled_by_sentence() -> None:
    references = ["a man rides a brown horse", "two dogs run through the deep snow", "a girl reads a thick book"]
    outputs = [["a man rides a horse", *references[1:]], [references[0], "dogs run in the deep snow", references[2]]]
    results = [{"hypotheses": output, "references": references} for output in outputs]
    whole = pooled("bleu", results)
    assert whole.score.value == pytest.approx(metrics.score("bleu", [*outputs[0], *outputs[1]], references * 2).value) and whole.sentences == 3
    facts = {
        "diverged": None, "validation": 50.0, "loss": 1.0, "throughput": {"target_tokens_per_second": 9.0}, "state_bytes_per_parameter": 8.0, "peak_bytes": 5e6
    }  # fmt: skip
    right = [{**facts, "hypotheses": references, "references": references}] * 2
    rows = score_rows({"adamw": (0.1, [{**facts, **found} for found in results]), "lion": (0.2, right), "sam": (0.3, [{**facts, "diverged": "at 3"}])})
    assert len({len(row) for row in rows}) == 1
    assert rows[3][3].startswith("100.00") and rows[3][4] == "100.00, 100.00" and rows[3][5].startswith(f"+{100 - whole.score.value:.2f} (")
    assert rows[4][2] == "diverged"


def test_a_study_that_was_interrupted_goes_on(
    corpora: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainings are processes of their own, here this one; Ctrl-C falls into the second."""
    for name, text in corpora.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    config = tmp_path / "config.toml"
    config.write_text(f"""
        [run]\ndevice = "cpu"\nthreads = 1
        [data]\nfolder = "{tmp_path}"\ntrain = {{ tsv = "train.tsv" }}\nvalid = {{ tsv = "valid.tsv" }}\ntest = {{ tsv = "valid.tsv" }}
        [tokenizer]\nvocabulary = 400
        [model]\nd_model = 16\nffn = 16\nheads = 2\nencoder_layers = 1\ndecoder_layers = 1
        [teacher]\npath = "nowhere"
        [schedule]\nkind = "cosine"\nwarmup = 2
        [training]\nmax_tokens = 300\nsave_every = 1
        [validation]\nmax_sentences = 3
    """)
    started: list[str] = []
    stop = {"study"}

    def here(folder: Path) -> int:
        started.append(folder.name)
        try:
            optimizer_study.train(folder)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    original = Trainer._step

    def step(trainer: Trainer) -> Any:
        found = original(trainer)
        if len(started) == 2 and trainer.progress.step == 2 and stop:
            stop.clear()
            trainer._stop.request()
        return found

    monkeypatch.setattr(optimizer_study, "in_a_process", here)
    monkeypatch.setattr(Trainer, "_step", step)
    work = tmp_path / "work"
    command = [str(config), str(work), "--iterations", "3", "--rates", "1", "--seeds", "2", "--optimizers", "adamw", "sam:schedule_free_adamw"]
    monkeypatch.setattr(sys, "argv", ["optimizer_study.py", *command])
    with pytest.raises(KeyboardInterrupt):
        optimizer_study.main()
    assert started == ["adamw-0.004-seed1-3", "adamw-0.004-seed2-3"] and last_step(work / started[1] / "run") == 2
    optimizer_study.main()
    assert started[2:] == ["adamw-0.004-seed2-3", "sam-schedule_free_adamw-0.008-seed1-3", "sam-schedule_free_adamw-0.008-seed2-3"]
    optimizer_study.main()
    assert len(started) == 5, "nothing is done twice"
    told = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told if line.startswith("| ")]
    assert [row[0] for row in rows[:4]] == ["optimiser", "---", "adamw", "sam:schedule_free_adamw"] and rows[:4] == rows[4:]
    assert float(rows[2][-2]) == float(rows[3][-2]) == 8.0
    study = Study({"training": {"max_tokens": 300}}, tmp_path / "other")
    with pytest.raises(ConfigError, match="trainings of another configuration"):
        Study({"training": {"max_tokens": 301}}, study.work)
    with pytest.raises(ConfigError, match="did you mean 'lion'"):
        Study({"data": {"embedded": "phrasebook"}}, tmp_path / "third").check("Lion", "config.toml")
