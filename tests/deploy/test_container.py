"""The steps of docs/deploy/Containerfile, run on this machine in folders in the place of the image's: what they make starts, is well, ends, writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from containerfile import ROOT, instructions
from served import serve_config
from small_models import make_model, tokenizer

__all__ = ["make_model", "serve_config", "tokenizer"]

if not (ROOT / "docs").is_dir():
    pytest.skip("a source distribution has no documents", allow_module_level=True)


class Image:
    """Its folders are folders under `root`; what the distribution's packages would bring is this machine's."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("SKBUILD_")}  # CI's own build is elsewhere
        self.environment["CMAKE_ARGS"] = "-DCVMK_KERNEL_OPTIMISATION=-Og"  # half the time to compile kernels whose speed is not looked at
        for name in ("src", "wheels", "opt", "etc"):
            (root / name).mkdir()

    def path(self, text: str) -> str:
        for name in ("/src", "/wheels", "/opt/cvmk", "/etc/cvmk"):
            text = text.replace(name, f"{self.root}{name}")
        return text

    def build(self) -> dict[str, Any]:
        """Run the steps; ENTRYPOINT, CMD and HEALTHCHECK."""
        kept: dict[str, Any] = {}
        for name, value in instructions():
            match name:
                case "WORKDIR":
                    self.folder = Path(self.path(value))
                case "COPY" if not value.startswith("--from"):
                    *sources, target = value.split()
                    for source in sources:
                        self._copy(ROOT / source, self.folder / target)
                case "ENV":
                    for pair in value.split():
                        key, _, setting = pair.partition("=")
                        self.environment[key] = self.path(setting).replace("$PATH", self.environment["PATH"])
                case "RUN" if not value.startswith("apt-get"):
                    subprocess.run(["sh", "-ec", self.path(value)], cwd=self.folder, env=self.environment, check=True, timeout=1500)
                case "ENTRYPOINT" | "CMD":
                    kept[name] = [self.path(part) for part in json.loads(value)]
                case "HEALTHCHECK":
                    kept[name] = [self.path(part) for part in json.loads(value.partition(" CMD ")[2])]
        return kept

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(source, target)

    def files(self) -> set[tuple[str, int]]:
        return {(str(path), path.stat().st_mtime_ns) for path in self.root.rglob("*") if path.is_file()}


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_the_container_s_steps(serve_config: Callable[..., Any], tmp_path: Path) -> None:
    image = Image(tmp_path)
    kept = image.build()
    python = str(tmp_path / "opt" / "cvmk" / "bin" / "python")
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    config = tmp_path / "etc" / "cvmk" / "serve.toml"
    config.parent.mkdir()
    model = serve_config().models["en-de"].path
    config.write_text(f'[server]\nhost = "0.0.0.0"\nport = {port}\nmetrics_port = 0\n[models.en-de]\npath = "{model}"\n', encoding="utf-8")
    environment = {key: value for key, value in image.environment.items() if key not in ("HOME", "PYTHONPATH")}
    before = image.files()
    server = subprocess.Popen([*kept["ENTRYPOINT"], *kept["CMD"]], env=environment, cwd="/", stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while (check := subprocess.run(kept["HEALTHCHECK"], env=environment, cwd="/", capture_output=True, text=True)).returncode:
            assert server.poll() is None and time.monotonic() < until, check.stderr
            time.sleep(0.2)
    finally:
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=30)
    assert server.returncode == 0 and "serving en-de" in said
    assert subprocess.run(kept["HEALTHCHECK"], env=environment, cwd="/", capture_output=True).returncode == 5
    assert image.files() == before
