"""The course of a search, with workers that follow a script."""

from __future__ import annotations

import itertools
import signal
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_workers import LOST, Run, ScriptedWorker, by_rate, events, trial

from cvmk.config.loading import load_train_config
from cvmk.errors import ConfigError, DataError, DivergedError
from cvmk.files import read_json
from cvmk.report.search import read_search
from cvmk.search.run import SearchInterrupted
from cvmk.search.worker import Done, Failed, Scored, Ticked
from cvmk.telemetry import read_events


@pytest.mark.parametrize("workers", [1, 3])
def test_a_search_from_start_to_end(run: Run, tmp_path: Path, workers: int):
    result = run(workers=workers, plots=workers == 1)
    folder = tmp_path / "search"
    assert [one.number for one in result.trials] == [*range(6)] and result.counts() == {"complete": 6}
    assert result.best == max(result.trials, key=lambda one: one.value or 0)
    assert len({one.parameters["optimizer.learning_rate"] for one in result.trials}) == 6
    assert all(one.scores.keys() == {10, 20, 30, 40} and one.iterations == 40 for one in result.trials)
    best = load_train_config(folder / "best.toml")
    assert best.optimizer.learning_rate == result.best.parameters["optimizer.learning_rate"] and best.model.ffn == result.best.parameters["model.ffn"]
    assert "# kept" in (folder / "best.toml").read_text() and best.run.folder == str(folder / "best")
    report = read_json(folder / "search_report.json")
    assert len(report["trials"]) == 6 and report["direction"] == "maximize" and abs(sum(report["importances"].values()) - 1) < 1e-6
    records, problems = read_events(folder / "events.jsonl")
    assert not problems and len(events(folder, "trial_start")) == len(events(folder, "trial_end")) == 6 and len(records) == 1 + 6 * 6 + 1
    drawn = [f"{name}.{kind}" for name in ("history", "importances", "parameters") for kind in ("png", "svg")]
    assert sorted(path.name for path in folder.glob("plots/*")) == (drawn if workers == 1 else [])


def test_what_a_trial_is_given(run: Run, tmp_path: Path):
    seen: list[dict[str, Any]] = []

    def script(values: dict[str, Any]) -> Iterator[Any]:
        seen.append(values)
        return by_rate(values)

    run("search.trials=1", script=script, workers=2)
    folder = str(tmp_path / "search")
    assert seen[0]["run"]["folder"] == f"{folder}/trials/0000" and seen[0]["data"]["cache"] == f"{folder}/cache" and seen[0]["run"]["threads"] >= 1
    assert seen[0]["tokenizer"] == {"path": f"{folder}/tokenizer"} and "search" not in seen[0]
    assert len(ScriptedWorker.prepared) == 1 and ScriptedWorker.prepared[0].tokenizer == f"{folder}/tokenizer"


def test_the_teacher_is_shared_unless_it_is_searched(run: Run, toml: str, tmp_path: Path):
    taught = toml + '"distillation.alpha" = { low = 0, high = 1 }\n[teacher.model]\nd_model = 64\n[teacher.training]\niterations = 7\n'
    run("search.trials=1", text=taught)
    recipe = tomllib.loads(ScriptedWorker.prepared[0].teacher or "")
    assert recipe["model"] == {"d_model": 64} and recipe["training"] == {"iterations": 7} and recipe["run"]["folder"] == str(tmp_path / "search/teacher")
    assert recipe["tokenizer"] == {"path": str(tmp_path / "search/tokenizer")} and not {"teacher", "distillation"} & recipe.keys()
    best = load_train_config(tmp_path / "search/best.toml")
    assert best.teacher is not None and best.teacher.path == str(tmp_path / "search/teacher")
    searched = taught.replace("[teacher.model]", '"teacher.optimizer.learning_rate" = { low = 1e-4, high = 1e-3 }\n[teacher.model]')
    run("search.trials=1", f'search.folder="{tmp_path}/other"', text=searched)
    assert ScriptedWorker.prepared[0].teacher is None and ScriptedWorker.prepared[0].tokenizer is not None


def test_a_search_goes_on_with_a_larger_budget(run: Run, tmp_path: Path):
    first, whole = run("search.trials=2"), run("search.trials=5")
    assert first.trials == whole.trials[:2] and len(whole.trials) == 5
    again = run("search.trials=5")
    assert again.trials == whole.trials and len(events(tmp_path / "search", "trial_end")) == 5
    at_once = run("search.trials=5", f'search.folder="{tmp_path}/other"')
    assert [one.parameters for one in at_once.trials] == [one.parameters for one in whole.trials]  # whenever it was interrupted


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_samplers_and_pruners(run: Run, sampler: str, pruner: str):
    """What is better from the start on is not pruned; of the others some are, unless nothing prunes."""

    def script(values: dict[str, Any]) -> Iterator[Any]:
        worth = -abs(values["optimizer"]["learning_rate"] - 2e-3)
        return trial([worth + place * 1e-6 for place in range(4)])

    options = [f"search.sampler={sampler}", f"search.pruner={pruner}", "search.trials=16", "search.startup_trials=4", "search.pruner_startup_trials=3"]
    result = run(*options, script=script)
    pruned = [one for one in result.trials if one.state == "pruned"]
    assert bool(pruned) == (pruner != "none") and len(result.trials) == 16
    assert all(one.reason in {f"{pruner} pruning at iteration {step}" for step in (10, 20, 30)} for one in pruned)
    assert result.best.value == max(one.value for one in result.trials if one.value is not None)


def test_a_crashed_trial_is_a_failed_trial(run: Run, tmp_path: Path):
    fates = itertools.cycle([Failed("training diverged at iteration 3", 4, False), LOST, Failed("not enough memory", 5, False), None, Ticked(3, 1.0)])

    def script(values: dict[str, Any]) -> Iterator[Any]:
        yield Scored(10, 1.0)
        fate = next(fates)
        if isinstance(fate, Failed) or fate is LOST:
            yield fate
        else:
            yield from trial([1.0, 2.0])

    result = run("search.trials=5", script=script)
    assert [one.state for one in result.trials] == ["failed"] * 3 + ["complete"] * 2
    assert [one.reason for one in result.trials[:3]] == [
        "training diverged at iteration 3", "its process was ended by SIGKILL, as where the machine runs out of memory", "not enough memory",
    ]  # fmt: skip
    assert all(event["reason"] for event in events(tmp_path / "search", "trial_end")[:3])


def test_where_all_fail_the_search_does(run: Run):
    def script(values: dict[str, Any]) -> Iterator[Any]:
        yield Failed("training diverged", 4, False)

    with pytest.raises(DivergedError, match="none of the 10 trials was completed, 10 failed; the last failure: training diverged"):
        run("search.trials=100", script=script)


def test_a_score_that_is_no_number_fails(run: Run):
    result = run("search.trials=2", script=lambda values: trial([1.0, float("nan")] if values["run"]["folder"].endswith("0") else [1.0, 2.0]))
    assert [one.state for one in result.trials] == ["failed", "complete"] and "no number" in result.trials[0].reason


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (Failed("cannot read train.tsv: No such file or directory", 5, True), DataError, "^cannot read train.tsv"),
        (Failed("training diverged at iteration 7", 4, False), DivergedError, "what all trials share could not be made: training diverged"),
    ],
)
def test_where_nothing_can_be_prepared(run: Run, monkeypatch: pytest.MonkeyPatch, failure: Failed, kind: type[Exception], words: str):
    monkeypatch.setattr(ScriptedWorker, "preparation", failure)
    began = time.monotonic()
    with pytest.raises(kind, match=words):
        run()
    assert time.monotonic() - began < 60


def test_other_text_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch):
    run("search.trials=1")
    monkeypatch.setattr(ScriptedWorker, "preparation", Done({"data.train.source": "another text"}))
    with pytest.raises(ConfigError, match=r"was made on other text \(the content of data.train.source has changed\)"):
        run("search.trials=2")


def test_scores_that_tell_nothing(run: Run, tmp_path: Path):
    run("search.trials=2", script=lambda values: trial([0.0, 0.0]))
    (note,) = events(tmp_path / "search", "note")
    assert note["message"].startswith("all 2 complete trials have the same bleu, 0, so the search chose nothing")


def test_an_error_of_configuration_ends_the_search_at_once_and_it_goes_on(run: Run):
    def script(values: dict[str, Any]) -> Iterator[Any]:
        if values["run"]["folder"].endswith("2"):
            yield Failed("distillation.layers names a layer that is not there", 2, True)
        else:
            yield from by_rate(values)

    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"distillation\.layers"):
        run(script=script)
    assert time.monotonic() - began < 60  # it does not wait for a worker that has nothing more to say
    result = run()
    assert result.counts() == {"complete": 6} and [one.number for one in result.trials] == [*range(6)]


def test_the_budget_of_iterations(run: Run):
    def script(values: dict[str, Any]) -> Iterator[Any]:
        yield from itertools.islice(by_rate(values), 4)  # 2 scores
        yield Ticked(25, 1.0)
        if not values["run"]["folder"].endswith("0"):
            yield None  # goes on until it is told to stop
        yield from itertools.islice(by_rate(values), 4, None)

    result = run("search.trials=0", "search.iterations=62", script=script)
    assert [one.state for one in result.trials] == ["complete", "pruned"] and result.reason == "the budget of 62 iterations is used up"
    assert [one.iterations for one in result.trials] == [40, 25] and result.trials[1].reason == result.reason


def test_the_budget_of_minutes_counts_no_pauses(run: Run, tmp_path: Path):
    run("search.trials=1")
    spent = read_json(tmp_path / "search/clock.json")["seconds"]
    assert 0 < spent < 30
    (tmp_path / "search/clock.json").write_text('{"seconds": 600}')
    result = run("search.trials=0", "search.minutes=9")
    assert len(result.trials) == 1 and result.reason == "the budget of 9 minutes is used up"


def test_a_trial_for_which_no_budget_is_left_has_ended(run: Run, tmp_path: Path):
    def script(values: dict[str, Any]) -> Iterator[Any]:
        if values["run"]["folder"].endswith("0"):
            yield from by_rate(values)
            return
        yield from itertools.islice(by_rate(values), 2)
        signal.raise_signal(signal.SIGINT)
        yield None

    with pytest.raises(SearchInterrupted):
        run("search.trials=2", script=script)
    (tmp_path / "search/clock.json").write_text('{"seconds": 600}')
    left = run("search.trials=0", "search.minutes=9").trials[1]
    ends = {event["trial"]: event for event in events(tmp_path / "search", "trial_end")}
    assert (ends[1]["state"], ends[1]["step"], ends[1]["value"]) == ("pruned", left.iterations, left.value) and "minutes" in ends[1]["reason"]
    assert read_search(tmp_path / "search").counts() == {"complete": 1, "pruned": 1}


def test_an_interrupted_search_goes_on_with_its_trials(run: Run, tmp_path: Path):
    """Ctrl-C: trials that run stop, stay unfinished in the study, and are the first to go on."""

    def script(values: dict[str, Any]) -> Iterator[Any]:
        messages = by_rate(values)
        if int(values["run"]["folder"][-4:]) >= 2:
            yield from itertools.islice(messages, 2)
            if values["run"]["folder"].endswith("3"):
                threading.Timer(0.1, lambda: signal.raise_signal(signal.SIGINT)).start()
            yield None
        yield from messages

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SearchInterrupted):
        run(workers=2, script=script)
    assert signal.getsignal(signal.SIGINT) is before
    ended = {event["trial"] for event in events(tmp_path / "search", "trial_end")}
    result = run()
    started = [event["trial"] for event in events(tmp_path / "search", "trial_start")]
    assert ended <= {0, 1} and sorted(started[:4]) == [0, 1, 2, 3] and {2, 3} <= {*started[4:]} == {*range(6)} - ended
    assert sorted(event["trial"] for event in events(tmp_path / "search", "trial_end")) == [*range(6)] and result.counts() == {"complete": 6}
    assert all(one.scores.keys() == {10, 20, 30, 40} for one in result.trials)


def test_a_killed_search_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch):
    """Between any two words that it says to the study."""
    from cvmk.search.study import SearchStudy

    calls = itertools.count()

    class Killed(BaseException):
        pass

    def deadly(name: str, after: bool) -> None:
        original = getattr(SearchStudy, name)

        def call(self: SearchStudy, *arguments: Any, **named: Any) -> Any:
            if not after and next(calls) % 9 == 8:
                raise Killed
            found = original(self, *arguments, **named)
            if after and next(calls) % 9 == 8:
                raise Killed
            return found

        monkeypatch.setattr(SearchStudy, name, call)

    deadly("ask", after=True)
    deadly("report", after=False)
    deadly("finish", after=True)
    deadly("finish", after=False)
    for _ in range(60):
        try:
            result = run()
            break
        except Killed:
            continue
    assert [one.number for one in result.trials] == [*range(6)] and result.counts() == {"complete": 6}
    assert next(calls) > 20


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.heads=8", "model.heads differ"),
        ("run.seed=7", "run.seed differ"),
        ("search.space.model.ffn={ low = 64, high = 128, step = 64 }", "search.space.model.ffn differ"),
        ("search.space.model.dropout={ low = 0.1, high = 0.2 }", "search.space.model.dropout"),
    ],
)
def test_a_study_of_another_configuration_is_refused(run: Run, override: str, named: str):
    run("search.trials=1")
    with pytest.raises(ConfigError, match=rf"was made with another configuration \({named}.*choose another search.folder"):
        run(override)
    assert len(run("search.trials=2", "run.threads=3", "search.sampler=tpe", "run.folder=elsewhere", "training.log_every=7").trials) == 2  # no other trials


@pytest.mark.parametrize(("made", "metric"), [("", "bleu"), ("tokenizer", "bleu"), ("teacher", "bleu"), ("", "ter")])
def test_a_search_that_failed_before_it_made_anything_takes_another_configuration(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, metric: str
):
    """As where tokenizer.vocabulary is too small for the text. What trials share may be of the configuration before."""
    with monkeypatch.context() as broken, pytest.raises(ConfigError, match="too small"):
        broken.setattr(ScriptedWorker, "preparation", Failed("tokenizer.vocabulary = 300 is too small", ConfigError.exit_code, final=False))
        run()
    (tmp_path / "search" / made).mkdir(exist_ok=True)
    changed = ["tokenizer.vocabulary=3000", f'validation.metric="{metric}"']
    if made or metric == "ter":
        with pytest.raises(ConfigError, match="was made with another configuration"):
            run(*changed)
    else:
        assert run(*changed).counts() == {"complete": 6}


def test_a_study_of_an_older_cvmk(run: Run, tmp_path: Path):
    """It knew fewer keys: one that was not there was left at its default."""
    run("search.trials=1")
    journal = tmp_path / "search/study.log"
    text = journal.read_text()
    older = text.replace('"label_smoothing":0.1,', "").replace('"norm":"layernorm",', "")
    assert older != text
    journal.write_text(older)
    assert len(run("search.trials=2").trials) == 2
    with pytest.raises(ConfigError, match=r"model.norm differ"):
        run("model.norm=rmsnorm")


def test_one_search_in_a_folder(run: Run):
    def script(values: dict[str, Any]) -> Iterator[Any]:
        with pytest.raises(ConfigError, match="another process is searching in .*more --workers"):
            run()
        refused.append(True)
        return by_rate(values)

    refused: list[bool] = []
    run("search.trials=1", script=script)
    assert refused


def test_weights_of_the_best_alone_stay(run: Run, tmp_path: Path):
    def script(values: dict[str, Any]) -> Iterator[Any]:
        for name in ("checkpoints", "model"):
            (Path(values["run"]["folder"]) / name).mkdir(parents=True)
        return by_rate(values)

    best = run(script=script).best.number
    assert [path.parent.name for path in (tmp_path / "search/trials").glob("*/model")] == [f"{best:04d}"]
    run("search.keep=all", f'search.folder="{tmp_path}/all"', script=script)
    assert len([*(tmp_path / "all/trials").glob("*/model")]) == 6


def test_a_folder_that_cannot_be_made(run: Run, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        run(f'search.folder="{tmp_path}/file/search"')
