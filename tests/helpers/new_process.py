"""Code in a Python process of its own, which takes the modules and the native library that this one has."""

from __future__ import annotations

import os
import subprocess
import sys


def python(code: str, *arguments: str, seconds: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    """`code` with `arguments` (sys.argv) after it has ended, in this process's environment and `environment`.

    Where this process runs on emulated tiles (`emulated_amx`), so does the new one.
    """
    path = os.pathsep.join(folder for folder in sys.path if folder)  # an empty one would be the working directory
    first = "import emulated_amx\n" if "emulated_amx" in sys.modules else ""
    whole = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", first + code, *arguments], env=whole, capture_output=True, text=True, timeout=seconds, check=False)


def said(code: str, *arguments: str, seconds: float = 100, **environment: str) -> str:
    """What the code prints; it must succeed."""
    done = python(code, *arguments, seconds=seconds, **environment)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
