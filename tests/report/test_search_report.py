"""A search in a report: its trials in order, the best of them as runs, whatever is missing or damaged."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from chromium import Chromium
from run_folders import write_run, write_search

from cvmk.errors import ConfigError
from cvmk.report import figures_of, write_report
from cvmk.report.contents import document
from cvmk.report.html import html
from cvmk.report.markdown import markdown
from cvmk.report.search import read_search

SEVERAL = [("complete", 20.0), ("pruned", 30.0), ("failed", None), ("complete", 25.0), ("running", 5.0), ("complete", 22.0), ("failed", None)]


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading."""
    lines = text[text.index(heading) :].splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("|"))
    rows = lines[first:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in rows[: rows.index("")]]


def test_the_best_trials_stand_for_a_search(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", SEVERAL)
    figures = figures_of([folder, folder, folder / "trials" / "0003"], bootstrap=50)
    assert [run.name for run in figures.runs] == ["0003", "0005", "0000"] and figures.baseline is figures.runs[0]
    text = markdown(document(figures))
    assert text.startswith("# search\n")
    assert "7 trials (3 complete, 1 pruned, 2 failed, 1 running); the best is 0003 with BLEU 25.00" in text and "the budget of trials is used up." in text
    rows = table(text, "### Trials, the best first")
    assert rows[0] == ["trial", "state", "BLEU", "iterations", "seconds", "learning_rate", "dropout", "norm"]
    assert [(row[0], row[1]) for row in rows[2:]] == [
        ("0003", "complete"), ("0005", "complete"), ("0000", "complete"), ("0001", "pruned"), ("0004", "running"), ("0002", "failed"), ("0006", "failed"),
    ]  # fmt: skip
    assert ["model.norm", "layernorm, rmsnorm", "rmsnorm", "–"] in table(text, "## Search: search")
    assert "- **0002**: it diverged" in text
    assert {(advice.rule, advice.about) for advice in figures.advice} >= {("trials-failed", "search")}
    assert {advice.rule for advice in figures.advice if advice.about in ("0005", "0000")} <= {"no-better-than-baseline"}, "of rivals only how they compare"
    assert [one["number"] for one in figures.to_json()["searches"][0]["trials"]] == [*range(7)]


def test_a_search_that_goes_on(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", [("pruned", 3.0), ("running", 5.0)], ended=False)
    figures = figures_of([folder], bootstrap=50)
    assert [run.name for run in figures.runs] == ["0001", "0000"], "what has a score, as long as nothing is complete"
    assert "no trial is complete; it goes on, or was interrupted." in markdown(document(figures))
    (folder / "trials" / "0001" / "config.resolved.json").unlink()
    assert [run.name for run in figures_of([folder], bootstrap=50).runs] == ["0000"]


def test_a_search_before_its_first_trial(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", [], ended=False)
    text = markdown(document(figures_of([folder], bootstrap=10)))
    assert "it goes on, or was interrupted" in text


def test_what_a_search_left_at_its_end(tmp_path: Path) -> None:
    """Trials of other machines and importances are in its report alone; events that came after it count."""
    folder = write_search(tmp_path / "search", [("complete", 20.0), ("complete", 21.0)], ended=False)
    elsewhere = {"number": 9, "state": "complete", "parameters": {"model.dropout": 0.1}, "value": 40.0, "iterations": 7, "seconds": 3.0, "reason": ""}
    trials = [elsewhere, {**elsewhere, "number": 1, "state": "running", "value": None}]
    left = {"metric": "bleu", "direction": "maximize", "space": {}, "importances": {"model.dropout": 0.75}, "trials": trials, "reason": "it had to"}
    (folder / "search_report.json").write_text(json.dumps(left))
    search = read_search(folder)
    assert [trial.number for trial in search.ranked()] == [9, 1, 0] and search.importances == {"model.dropout": 0.75} and search.ended is None
    assert [path.name for path in search.rivals()] == ["0001", "0000"]
    others = [{**left, "trials": [7]}, {**left, "trials": [{**elsewhere, "iterations": float("inf")}]}, {**left, "space": {"a": 7}}]
    for damaged in ("{", "[]", '{"metric": "bleu"}', *map(json.dumps, others)):
        (folder / "search_report.json").write_text(damaged)
        figures = figures_of([folder], bootstrap=50)
        assert [run.name for run in figures.runs] == ["0001", "0000"] and any("search_report.json" in problem for problem in figures.problems)
        assert html(document(figures))


def test_a_search_is_no_baseline(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", [("complete", 20.0)])
    with pytest.raises(ConfigError, match="--baseline .*search is no run of cvmk train"):
        figures_of([write_run(tmp_path / "run")], baseline=folder)


EDGES = [(9.9e-3, 5, "a larger search.space.optimizer.learning_rate.high"), (1.01e-4, 5, "a smaller search.space.optimizer.learning_rate.low")]


@pytest.mark.parametrize(("rate", "trials", "told"), [*EDGES, (1e-3, 5, ""), (9.9e-3, 4, "")])
def test_the_best_at_the_edge_of_a_range(tmp_path: Path, rate: float, trials: int, told: str) -> None:
    """Its dropout is at 0 throughout, beyond which there is nothing."""
    found = figures_of([write_search(tmp_path / "search", [("complete", 20.0 + at) for at in range(trials)], rate=rate)], bootstrap=10).advice
    texts = [advice.text for advice in found if advice.rule == "at-the-edge"]
    assert [told in text for text in texts] == ([True] if told else [])


def test_a_search_is_read_in_any_light_and_on_paper(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", [*SEVERAL, *[("complete", 20.0 + at) for at in range(9)]], more=12)
    page_of = write_report(figures_of([folder], bootstrap=10), tmp_path / "out")[0]
    with Chromium() as browser:
        page = browser.open(page_of.as_uri(), prefers_color_scheme="light")
        for scheme in ("light", "dark"):
            page.emulate(prefers_color_scheme=scheme)
            assert page.errors == [] and page.run((Path(__file__).parents[1] / "helpers" / "contrast.js").read_text()) == []
        assert page.run("document.querySelectorAll('#section-2 figure > svg .dot').length") == 14, "a dot for whatever has a score"
        page.call("Emulation.setDeviceMetricsOverride", width=320, height=800, deviceScaleFactor=1, mobile=True)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        page.call("Emulation.setDeviceMetricsOverride", width=700, height=1000, deviceScaleFactor=1, mobile=False)
        page.call("Emulation.setEmulatedMedia", media="print")
        assert page.run("[...document.querySelectorAll('table')].every(table => table.getBoundingClientRect().right <= innerWidth)")
        assert base64.b64decode(page.call("Page.printToPDF", printBackground=True)["data"]).startswith(b"%PDF")
