"""`cvmk serve` in a process of its own, for tests and measurements from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def toml(tables: dict[str, Any], prefix: str = "") -> str:
    """Nested tables of strings, numbers and booleans as TOML."""
    lines, inner = [], []
    for name, value in tables.items():
        if isinstance(value, dict):
            inner += [f"[{prefix}{name}]", toml(value, f"{prefix}{name}.")]
        else:
            lines.append(f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}")
    return "\n".join([*lines, *inner])


class ServerProcess:
    """A server, ready inside `with`; killed at its end where it still runs.

    tables  those of serve.toml; a port is chosen where `server` has none.
    before  Python code that runs before the server in its process: faults, for tests.
    authority  of its certificate (PEM), where it has one.
    """

    def __init__(self, tables: dict[str, Any], before: str = "", authority: bytes | None = None, **environment: str) -> None:
        self._credentials = None if authority is None else grpc.ssl_channel_credentials(authority)
        self.port = free_port()
        self.tables: dict[str, Any] = {**tables, "server": {"port": self.port, **tables.get("server", {})}}
        self.address = f"127.0.0.1:{self.tables['server']['port']}"
        self._folder = tempfile.TemporaryDirectory()
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder), **environment}
        self._code = f"{before}\nimport sys\nfrom cvmk.cli import main\nsys.exit(main(sys.argv[1:]))"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What it has written."""
        return (Path(self._folder.name) / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, seconds: float = 60.0) -> float:
        """Start it, again where it has ended; the seconds until it was ready."""
        folder, begun = Path(self._folder.name), time.monotonic()
        (folder / "serve.toml").write_text(toml(self.tables))
        with (folder / "log").open("ab") as log:
            command = [sys.executable, "-c", self._code, "serve", str(folder / "serve.toml")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() - begun > seconds:
                self.process.kill()
                raise RuntimeError(f"the server was not ready after {time.monotonic() - begun:.1f} s:\n{self.log}")
            time.sleep(0.01)
        return time.monotonic() - begun

    def healthy(self, name: str = "", wait: float = 1.0) -> bool:
        """Whether it says that it serves."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        safe = self._credentials
        with grpc.insecure_channel(self.address, options) if safe is None else grpc.secure_channel(self.address, safe, options) as channel:
            try:
                return bool(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=wait).status == SERVING)
            except grpc.RpcError:
                return False

    def tell(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def ended(self, seconds: float) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired where it still runs after so many seconds."""
        assert self.process is not None
        return self.process.wait(seconds)

    def own_bytes(self) -> int:
        """Of its memory, what is its own (RssAnon)."""
        return next(int(line.split()[1]) << 10 for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("RssAnon"))

    def descriptors(self) -> int:
        """How many files and connections it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def cpu_seconds(self) -> float:
        """Processor time that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()
