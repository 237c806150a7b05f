"""Where a study is kept: journals, several machines, a real database."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgresql import PostgreSQL
from scripted_workers import Run, by_rate, events, trial

from cvmk.cli import main
from cvmk.errors import ConfigError, DataError
from cvmk.search import study as studies
from cvmk.search.worker import Ticked


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    pytest.importorskip("psycopg")
    with PostgreSQL() as server:
        yield server


def test_half_a_line_at_the_end_of_a_journal(run: Run, tmp_path: Path):
    """A process was killed, or a disk was full, while it wrote; and the lock of the journal is still there."""
    first = run("search.trials=2")
    journal = tmp_path / "search/study.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker')
    (tmp_path / "search/study.log.lock").write_text("")
    began = time.monotonic()
    assert run("search.trials=3").trials[:2] == first.trials and time.monotonic() - began < 20
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())


def test_a_journal_that_is_none(run: Run, tmp_path: Path):
    (tmp_path / "file").write_text("some\ntext\n")
    with pytest.raises(DataError, match=r"the study search in .*file is damaged or of another Optuna .*: restore it"):
        run(f'search.storage="{tmp_path}/file"')


def test_two_machines_share_a_journal(run: Run, tmp_path: Path):
    """At once, each in a folder of its own: no trial is done twice, and there are no more than the budget says."""
    storage = [f'search.storage="{tmp_path}/shared.log"', "search.name=both", "search.trials=9"]

    def script(values: dict[str, Any]) -> Iterator[Any]:
        if "search" in values["run"]["folder"]:  # the first machine waits until the second has begun
            begun.wait(20)
        else:
            begun.set()
        return by_rate(values)

    begun = threading.Event()
    found: dict[str, Any] = {}
    other = threading.Thread(target=lambda: found.update(other=run(*storage, f'search.folder="{tmp_path}/other"', script=script)))
    other.start()
    found["search"] = run(*storage, script=script)
    other.join(60)
    here, there = ([event["trial"] for event in events(tmp_path / name, "trial_end")] for name in ("search", "other"))
    assert sorted(here + there) == [*range(9)] and here and there
    assert max(len(one.trials) for one in found.values()) == 9
    assert (tmp_path / "search/best.toml").exists()


def test_a_machine_that_has_gone_away(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its trial is done again by another, with the same parameters, and counted once."""
    storage = [f'search.storage="{tmp_path}/shared.log"', "search.name=both", "search.trials=3"]

    def fatal(values: dict[str, Any]) -> Iterator[Any]:
        yield from itertools.islice(by_rate(values), 2)
        raise_in_main.set()
        yield None

    raise_in_main = threading.Event()

    class Gone(BaseException):
        pass

    original = studies.SearchStudy.report

    def report(*arguments: Any) -> bool:
        original(*arguments)
        raise Gone

    monkeypatch.setattr(studies.SearchStudy, "report", report)
    with pytest.raises(Gone):
        run(*storage, f'search.folder="{tmp_path}/gone"', script=fatal)
    monkeypatch.setattr(studies.SearchStudy, "report", original)
    gone = events(tmp_path / "gone", "trial_start")[0]
    patient = run(*storage, "search.trials=2")
    assert [one.state for one in patient.trials] == ["running", "complete"]  # it may come back
    monkeypatch.setattr(studies, "LOST_SECONDS", -1.0)
    result = run(*storage)
    assert result.counts() == {"complete": 3} and result.trials[1].parameters == gone["parameters"] and len(result.trials) == 3


def test_a_machine_that_was_taken_for_lost(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It comes back, finds that its trial is done by another, and goes on with other trials."""
    storage = [f'search.storage="{tmp_path}/shared.log"', "search.name=both", "search.trials=4"]

    def script(values: dict[str, Any]) -> Iterator[Any]:
        messages = by_rate(values)
        if "search" in values["run"]["folder"] and values["run"]["folder"].endswith("0"):
            yield from itertools.islice(messages, 2)
            slow.set()
            done.wait(30)
            yield Ticked(11, 1.0)
        yield from messages

    slow, done = threading.Event(), threading.Event()
    monkeypatch.setattr(studies, "LOST_SECONDS", -1.0)
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(run(*storage, script=script)))
    other.start()
    assert slow.wait(30)
    quick = run(*storage, f'search.folder="{tmp_path}/other"', script=script)
    done.set()
    other.join(60)
    assert quick.counts() == {"complete": 4} == found[0].counts()
    parameters = [tuple(one.parameters.values()) for one in found[0].trials]
    assert len({*parameters}) == 4


def test_parallel_searches_in_a_database(run: Run, tmp_path: Path, server: PostgreSQL):
    storage = [f'search.storage="{server.url}"', "search.name=parallel", "search.trials=8", "search.sampler=tpe"]
    both = threading.Barrier(2)  # they make the tables at once

    def script(values: dict[str, Any]) -> Iterator[Any]:
        if values["run"]["folder"].endswith(("0000", "0001")):
            both.wait(20)
        return by_rate(values)

    other = threading.Thread(target=lambda: run(*storage, f'search.folder="{tmp_path}/other"', script=script))
    other.start()
    run(*storage, script=script)
    other.join(60)
    ends = [event["trial"] for name in ("search", "other") for event in events(tmp_path / name, "trial_end")]
    assert sorted(ends) == [*range(8)]
    with pytest.raises(ConfigError, match=r"the study parallel in postgresql.* was made with another configuration \(model.heads differ"):
        run(*storage, "model.heads=8")


def test_a_database_that_goes_away(run: Run, toml: str, tmp_path: Path, server: PostgreSQL, capsys: pytest.CaptureFixture[str]):
    """One sentence and exit code 5; the same command goes on when it is back, with the trial that ran."""
    storage = [f'search.storage="{server.url}"', "search.name=away", "search.trials=3"]

    def script(values: dict[str, Any]) -> Iterator[Any]:
        yield from itertools.islice(by_rate(values), 2)
        if values["run"]["folder"].endswith("1"):
            server.stop()
        yield Ticked(11, 1.0)
        yield from by_rate(values)

    with pytest.raises(DataError, match=r"the study away in postgresql.* cannot be reached \(.*\): see to that, then the same command goes on") as lost:
        run(*storage, script=script)
    assert lost.value.exit_code == 5 and "\n" not in str(lost.value)
    path = tmp_path / "search.toml"
    path.write_text(toml)
    assert main(["search", str(path), *(word for override in storage for word in ("--set", override))]) == 5
    told = capsys.readouterr().err
    assert told.startswith("cvmk: the study away in postgresql") and told.count("\n") == 1
    server.start()
    result = run(*storage)
    assert result.counts() == {"complete": 3} and [event["trial"] for event in events(tmp_path / "search", "trial_start")] == [0, 1, 1, 2]


def test_a_password_is_not_told(run: Run):
    pytest.importorskip("psycopg")
    with pytest.raises(DataError) as refusal:
        run('search.storage="postgresql+psycopg://user:secret@127.0.0.1:1/base"')
    assert "secret" not in str(refusal.value) and "user:***@127.0.0.1" in str(refusal.value)


@pytest.mark.parametrize(
    ("url", "words"), [("postgres://user@host/base", "is no URL of a database"), ("oracle://user@host/base", "needs a driver that is not installed")]
)
def test_a_url_that_is_none(run: Run, url: str, words: str):
    with pytest.raises(ConfigError, match=words):
        run(f'search.storage="{url}"')


def test_without_optuna(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs Optuna, which is not installed: pip install 'cvmk\[search\]'"):
        run()


def test_without_matplotlib_there_are_no_plots(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run("search.trials=1", plots=True, script=lambda values: trial([1.0]))
    assert not (tmp_path / "search/plots").exists() and "cvmk[search]" in events(tmp_path / "search", "note")[0]["message"]
