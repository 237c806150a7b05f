"""`cvmk report`: what it writes where, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from event_logs import write
from run_folders import sentences, validation, worse, write_run

from cvmk import cli
from cvmk.report import write_report
from cvmk.telemetry.schema import ServingEnded, ServingStarted

_, REFERENCES = sentences(40)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, every in (("a", 2), ("b", 4)):
        write_run(tmp_path / "runs" / name, [validation(10, 50.0)], hypotheses=worse(REFERENCES, every), config={"validation.metrics": ["bleu"]})
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.*") if path.suffix in (".html", ".md")}


def test_the_report_of_a_run_is_written_into_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "runs/a", "--bootstrap", "50"]) == 0
    assert names(runs / "runs" / "a") == {"report.html", "report.md"}
    assert capsys.readouterr().out.splitlines()[-1] == "runs/a/report.html (and report.md, report.json)"


def test_the_report_of_several_is_written_here_or_where_it_is_told(runs: Path) -> None:
    assert cli.main(["report", "runs/a", "runs/b", "--bootstrap", "50"]) == 0 and names(runs) == {"report.html", "report.md"}
    for out in ("out/one", "out/two.html", "out/v1.2"):
        assert cli.main(["report", "runs/b", "--baseline", "runs/a", "-o", out, "--bootstrap", "50"]) == 0
    assert names(runs / "out") == {f"{name}.{ending}" for name in ("one", "two", "v1.2") for ending in ("html", "md")}


def test_json_is_all_that_is_printed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "runs/b", "runs/a", "--baseline", "runs/a", "--bootstrap", "50", "--confidence", "0.9", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["baseline"] == "a" and figures["confidence"] == 0.9 and [run["name"] for run in figures["runs"]] == ["a", "b"]
    found = next(one for one in figures["scores"] if one["system"] == "b")
    assert found["baseline"]["pairs"][0]["samples"] == 50


def test_runs_of_the_same_name_are_told_apart(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs / "other" / "a", hypotheses=REFERENCES)
    assert cli.main(["report", "runs/a", "other/a", "./runs/a", "--bootstrap", "50", "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["runs/a", "other/a"]


def test_a_run_that_is_named_twice_is_one(runs: Path) -> None:
    assert cli.main(["report", "runs/a", "runs/a/", "./runs/a", "--bootstrap", "50"]) == 0
    assert not names(runs) and (runs / "runs" / "a" / "report.md").read_text(encoding="utf-8").startswith("# a\n")


def test_timings_are_shown(runs: Path) -> None:
    rows = [{"op": "quantize_int8", "case": "rows 64", "backend": "native", "seconds": 0.0012, "reasons": []}]
    rows.append({"case": "step", "seconds": {"cvmk": 0.5, "peer": None}})
    Path("bench.json").write_text(json.dumps({"machine": {"processor": "Z9", "cpus": 2}, "rows": rows}))
    assert cli.main(["report", "runs/a", "--benchmarks", "bench.json", "--bootstrap", "50"]) == 0
    text = (runs / "runs" / "a" / "report.md").read_text(encoding="utf-8")
    assert "| quantize_int8 rows 64 | native | 1.200 |" in text and "Z9" in text and "| step | cvmk | 500.000 |" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere"], 5, "nowhere does not exist: name the folder of a run"),
        (["bench.json"], 5, "bench.json is a file"),
        (["empty"], 5, "empty holds no run of cvmk train and no model of cvmk quantize"),
        (["runs/a", "--baseline", "empty"], 2, "--baseline empty is no run"),
        (["runs/a", "-o", "empty"], 2, "empty is a folder: name the report in it"),
        (["runs/a", "-o", "x.pdf"], 2, "a browser prints the page as PDF"),
        (["runs/a", "-o", "bench.json/x"], 5, "bench.json/x"),
        (["runs/a", "--benchmarks", "bench.json"], 5, "bench.json holds no benchmarks"),
        (["runs/a", "--benchmarks", "nowhere.json"], 5, "nowhere.json"),
        ([f"many/{at}" for at in range(101)], 2, "101 runs are too many"),
        (["service"], 5, "service is the log of something else than a training (its first event is 'serving_start'): cvmk dashboard service shows it"),
    ],
)
def test_what_is_refused(runs: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bench.json").write_text("{}")
    Path("empty").mkdir()
    write(Path("service"), ServingStarted({}), ServingEnded())
    assert cli.main(["report", *words]) == code
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not names(runs) and not names(runs / "runs" / "a")


def test_a_report_that_cannot_be_made_leaves_the_old_one(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["report", "runs/a", "--bootstrap", "50"]) == 0
    before = (runs / "runs" / "a" / "report.html").read_bytes()

    def fail(document: object) -> str:
        raise MemoryError

    monkeypatch.setattr("cvmk.report.markdown.markdown", fail)
    (runs / "runs" / "a" / "training_report.json").unlink()
    assert cli.main(["report", "runs/a", "--bootstrap", "50"]) == 5
    assert (runs / "runs" / "a" / "report.html").read_bytes() == before and write_report is not None
    assert not list((runs / "runs" / "a").glob(".report*"))
