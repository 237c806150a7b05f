from __future__ import annotations

from pathlib import Path

import pytest
from scripted_workers import Run, Script, ScriptedWorker, by_rate

from cvmk.search import workers
from cvmk.search.result import SearchResult
from cvmk.search.run import Search
from cvmk.search.setup import parse_search
from cvmk.telemetry import EventStream, RunLog

TOML = """
[data]
embedded = "phrasebook"  # kept

[training]
iterations = 40

[validation]
validate_every = 10

[search]
folder = "{folder}"
trials = 6
sampler = "random"
pruner = "none"

[search.space]
optimizer.learning_rate = {{ low = 1e-4, high = 1e-2, log = true }}
model.ffn = {{ low = 64, high = 256, step = 64 }}
"""

@pytest.fixture
def toml(tmp_path: Path) -> str:
    return TOML.format(folder=tmp_path / "search")


@pytest.fixture
def run(toml: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the search with scripted workers."""
    monkeypatch.setattr(workers, "Worker", ScriptedWorker)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)

    def search(*overrides: str, script: Script = by_rate, workers: int = 1, text: str = toml, plots: bool = False) -> SearchResult:
        if not plots:
            monkeypatch.setattr("cvmk.search.plots.write_plots", lambda result: None)
        monkeypatch.setattr(ScriptedWorker, "script", staticmethod(script), raising=False)
        monkeypatch.setattr(ScriptedWorker, "prepared", [])
        return Search(parse_search(text, "search.toml", overrides), lambda folder: EventStream(RunLog(folder)), workers=workers).run()

    return search
