"""A real PostgreSQL server in a folder of its own: `with PostgreSQL() as server: server.url`."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import pytest


def programs() -> Path:
    """Where initdb and postgres are; the test is skipped where they are not, but fails under CVMK_REQUIRE_POSTGRESQL=1."""
    on_path = [Path(found).resolve().parent for name in ("initdb",) if (found := shutil.which(name))]
    for folder in [*on_path, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    assert os.environ.get("CVMK_REQUIRE_POSTGRESQL") != "1", "PostgreSQL is not installed: apt-get install postgresql"
    pytest.skip("PostgreSQL is not installed (Debian's package is postgresql)")


class PostgreSQL:
    """It listens at a socket in its folder, to no network. It refuses to run as root: then it runs as another user."""

    def __enter__(self) -> Self:
        self._programs = programs()
        self._folder = Path(tempfile.mkdtemp(prefix="cvmk-pg-"))
        self._user = None
        if os.getuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            self._user = "postgres" if "postgres" in names else "nobody"
            shutil.chown(self._folder, self._user)
        self._call("initdb", "-D", self._data, "-U", "cvmk", "-A", "trust", "-N", "-E", "UTF8", "--locale=C")
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://cvmk@/postgres?host={self._folder}"

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def start(self) -> None:
        options = ["-k", str(self._folder), "-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=16MB"]
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen([self._programs / "postgres", "-D", self._data, *options], stdout=log, stderr=log, user=self._user)
        until = time.monotonic() + 30
        while subprocess.run([self._programs / "pg_isready", "-q", "-h", self._folder], check=False).returncode:
            assert self._process.poll() is None and time.monotonic() < until, (self._folder / "server.log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """At once: whoever is connected loses the connection."""
        self._process.terminate() if self._process.poll() is not None else self._process.send_signal(3)  # SIGQUIT
        self._process.wait(30)

    def _call(self, program: str, *arguments: str) -> None:
        done = subprocess.run([self._programs / program, *arguments], user=self._user, capture_output=True, text=True, cwd=self._folder)
        assert done.returncode == 0, done.stderr
