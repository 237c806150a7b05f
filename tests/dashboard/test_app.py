"""The dashboard over HTTP, for those who are meant to see it; and its command line."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from event_logs import start, steps, validation, write

from cvmk.cli import main

Served = Callable[..., AbstractContextManager[str]]


def ask(url: str, **query: Any) -> dict[str, Any]:
    """What /data says once the runs are read."""
    for _ in range(200):
        found = httpx.get(f"{url}/data", params=query).raise_for_status().json()
        if "runs" not in found or all(run["progress"] == 1 for run in found["runs"].values()):
            return dict(found)
        time.sleep(0.02)
    raise AssertionError(f"{url} does not come to an end")


def test_a_window_of_runs(tmp_path: Path, served: Served) -> None:
    write(tmp_path / "a", start(), *steps(range(1, 101)), validation(100, 30.0))
    write(tmp_path / "b/teacher", start(), *steps(range(1, 11)))
    write(tmp_path / "b", start(), *steps(range(1, 51)))
    with served(tmp_path) as url:
        found = ask(url)
        assert [(run["name"], run["nested"]) for run in found["runs"].values()] == [("a", False), ("b", False), ("b/teacher", True)]
        assert list(found["shown"]) == ["0", "1"] and found["shown"]["1"]["iteration"]["x"] == list(range(1, 51))
        loss = found["shown"]["0"]["iteration"]["fields"]["loss"]
        assert loss["mean"][:3] == [100, 50, 33.3333] and "least" not in loss
        assert [chart["title"] for chart in found["charts"]] == ["Loss", "Cross-entropy", "BLEU", "chrF", "Learning rate", "Gradient norm", "Throughput"]
        assert ask(url, runs="2", axis="time")["shown"]["2"]["iteration"]["x"] == list(range(1, 11))
        assert ask(url, runs="0", **{"from": 10, "to": 12})["shown"]["0"]["iteration"]["x"] == [9, 10, 11, 12, 13]
        coarse = ask(url, runs="0", points=16)["shown"]["0"]["iteration"]
        assert len(coarse["x"]) <= 18 and coarse["fields"]["loss"]["greatest"][0] == 100
        assert ask(url, runs="")["shown"] == {}


def test_what_is_new_is_told_and_nothing_else(tmp_path: Path, served: Served) -> None:
    write(tmp_path / "a", start(), *steps(range(1, 11)))
    with served(tmp_path) as url:
        first = ask(url)
        assert ask(url, since=first["version"]).keys() == {"version", "now"}
        write(tmp_path / "a", *steps((11,)))
        until = time.monotonic() + 10
        while "runs" not in (found := ask(url, since=first["version"])) and time.monotonic() < until:
            time.sleep(0.02)
        assert found["shown"]["0"]["iteration"]["x"][-1] == 11
        assert "runs" in ask(url, since="another server's.1")


def test_strangers_are_kept_out(tmp_path: Path, served: Served) -> None:
    """A page whose name leads to this machine reads nothing (DNS rebinding); nothing but events is served, nothing can be written."""
    write(tmp_path / "a", start())
    (tmp_path / "a/secret.txt").write_text("secret")
    with served(tmp_path / "a") as url:
        port = url.rpartition(":")[2]
        for host, status in (
            (f"127.0.0.1:{port}", 200),
            (f"localhost:{port}", 200),
            (f"[::1]:{port}", 200),
            ("rebound.example", 421),
            (f"a.localhost.example:{port}", 421),
            ("[", 421),
            ("[localhost]", 421),
            (f":{port}", 421),
        ):
            assert httpx.get(f"{url}/data", headers={"Host": host}).status_code == status, host
        for path in ("/", "/data", "/page.js", "/base.css", "/icon.svg"):
            headers = httpx.get(url + path).headers
            assert "default-src 'none'" in headers["content-security-policy"] and headers["cross-origin-resource-policy"] == "same-origin"
            assert "access-control-allow-origin" not in headers and headers["x-content-type-options"] == "nosniff"
        for path in ("/secret.txt", "/../secret.txt", "/%2e%2e/a/secret.txt", "/a/secret.txt", "/app.py", "/page/page.js"):
            request = urllib.request.Request(url + path)
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(request)
        assert httpx.post(f"{url}/data").status_code == 405
        for query in ("axis=loss", "from=x", "to=nan", "points=inf"):
            answer = httpx.get(f"{url}/data?{query}")
            assert answer.status_code == 400 and answer.text.count("\n") == 1


def test_wrong_folders_and_ports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", start())
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, code, words in (
            ([tmp_path / "nowhere"], 5, "No such file"),
            ([tmp_path / "a", tmp_path / "empty"], 5, "empty holds no run"),
            ([tmp_path / "a", "--port", port], 2, f"--port: cannot listen at 127.0.0.1:{port} (Address already in use); give another port"),
            ([tmp_path / "a", "--host", "nowhere.invalid"], 2, "--host: 'nowhere.invalid' is no address of this machine"),
        ):
            assert main(["dashboard", *map(str, arguments)]) == code
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1
    for port in ("-1", "65536", "x"):
        with pytest.raises(SystemExit, match="2"):
            main(["dashboard", str(tmp_path / "a"), "--port", port])


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "starlette" or name.startswith(("cvmk.dashboard", "cvmk.web")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert main(["dashboard", str(write(tmp_path / "a", start()))]) == 2
    assert "pip install 'cvmk[serve]'" in capsys.readouterr().err


def test_two_beside_each_other_end_by_a_signal(tmp_path: Path) -> None:
    """Each finds a port of its own where none is asked for, and reads without torch."""
    write(tmp_path / "a", start(), *steps(range(1, 11)))
    code = "import sys; from cvmk.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", code, "dashboard", str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        told = [process.stderr.readline() for process in processes if process.stderr]
        urls = [line.split(" at ")[1].split(" ")[0] for line in told]
        assert all("a dashboard of 1 run at http://127.0.0.1:" in line for line in told) and len(set(urls)) == 2, told
        assert [len(ask(url)["shown"]["0"]["iteration"]["x"]) for url in urls] == [10, 10]
    finally:
        for process, number in zip(processes, (signal.SIGINT, signal.SIGTERM), strict=True):
            process.send_signal(number)
        ended = [(process.communicate(timeout=20), process.returncode) for process in processes]
    assert [(out, code) for (out, _), code in ended] == [("False\n", 0)] * 2, ended
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "events.jsonl"]
    json.loads((tmp_path / "a/events.jsonl").read_text().splitlines()[-1])
