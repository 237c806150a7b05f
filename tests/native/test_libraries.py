"""The loader: what it says when a library is missing, broken or old, and the cap of the instruction-set level."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cvmk
from cvmk import libraries
from cvmk.ops import native

needs_native = pytest.mark.skipif(native.library() is None, reason=f"no native library: {native.reason()}")


def python(code: str, **environment: str) -> str:
    """Run code in a fresh process that sees this checkout's cvmk, and return what it printed."""
    path = os.pathsep.join([str(Path(cvmk.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": path, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_loader_needs_no_torch():
    assert python("import sys, cvmk.libraries, cvmk.hardware; cvmk.hardware.cpu(); cvmk.hardware.gpus(); print('torch' in sys.modules)") == "False"


def test_either_a_library_or_a_reason():
    assert (native.library() is None) == (native.reason() is not None)


@needs_native
def test_level_is_capped_by_the_environment():
    code = "from cvmk.libraries import isa_level; print(isa_level())"
    order = libraries.LEVELS
    detected = native.library().detected_level()  # type: ignore[union-attr]
    assert python(code, CVMK_CPU_ISA="") == detected
    assert python(code, CVMK_CPU_ISA="base") == "base"
    assert python(code, CVMK_CPU_ISA="avx2") == order[min(order.index("avx2"), order.index(detected))]


@needs_native
def test_features_are_taken_away():
    code = "from cvmk.libraries import isa_level; print(isa_level())"
    assert python(code, CVMK_CPU_ISA="amx-fma") == "base"
    assert python(code, CVMK_CPU_ISA="base-avx512_vnni-amx_int8") == "base"
    order = libraries.LEVELS
    detected = native.library().detected_level()  # type: ignore[union-attr]
    assert python(code, CVMK_CPU_ISA="amx-amx_int8") == order[min(order.index("avx512"), order.index(detected))]
    assert "'vnni' is no feature" in python("from cvmk.hardware import cpu; print(cpu().error)", CVMK_CPU_ISA="avx512-vnni")


@needs_native
def test_wrong_cap_names_the_accepted_values():
    code = "from cvmk.errors import ConfigError\nfrom cvmk.libraries import isa_level\ntry:\n    isa_level()\nexcept ConfigError as e:\n    print(e)"
    said = python(code, CVMK_CPU_ISA="sse9")
    assert "CVMK_CPU_ISA" in said and "sse9" in said and "base, avx2, avx512 or amx" in said


@needs_native
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64") or not Path("/proc/cpuinfo").exists(), reason="needs Linux on x86-64")
def test_features_are_those_of_linux():
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":")[1].split())
    features = native.library().cpu_features()  # type: ignore[union-attr]
    plain = {name: there for name, there in features.items() if not name.startswith("amx")}  # AMX needs a permission besides
    assert plain == {name: name in flags for name in plain}


def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front on cvmk.__path__, as an editable install has one."""
    monkeypatch.setattr(cvmk, "__path__", [str(tmp_path), *cvmk.__path__])
    for module in ("_native", "_native_cuda", "_fake"):
        monkeypatch.delitem(sys.modules, f"cvmk.{module}", raising=False)
    libraries.load.cache_clear()
    monkeypatch.setattr(libraries, "load", libraries.load.__wrapped__)
    return tmp_path


def test_missing_library_gives_the_reason_of_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = overlay(tmp_path, monkeypatch)
    (folder / "_native_build.json").write_text(json.dumps({"native": {"reason": "no C++ compiler was found"}}))
    assert libraries.load("_fake", "native") == (None, "no C++ compiler was found")
    (folder / "_native_build.json").write_text("{")
    found, why = libraries.load("_fake", "native")
    assert found is None and why is not None and "not built" in why


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise ImportError('libfoo.so.1: cannot open shared object file')", "does not load: libfoo.so.1"),
        ("raise SystemError('bad magic')", "does not load: bad magic"),
        ("version = '0.0.1'", "built for cvmk 0.0.1.*install the package again"),
    ],
)
def test_broken_or_old_library_gives_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str):
    (overlay(tmp_path, monkeypatch) / "_fake.py").write_text(source)
    found, why = libraries.load("_fake", "native")
    assert found is None and why is not None
    assert re.search(words, why), why


def test_library_is_found_on_the_package_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (overlay(tmp_path, monkeypatch) / "_fake.py").write_text(f"version = {cvmk.__version__!r}")
    found, why = libraries.load("_fake", "native")
    assert found is not None and why is None


def test_ops_work_where_the_native_library_is_broken(tmp_path: Path):
    """A whole process whose cvmk._native raises at import."""
    code = (
        "import sys, importlib.machinery, cvmk; sys.meta_path.insert(0, importlib.machinery.PathFinder)\n"  # before that of an editable install
        f"cvmk.__path__.insert(0, {str(tmp_path)!r})\n"
        "from cvmk.ops.sketch import CVMSketch\nfrom cvmk.ops import native\n"
        "s = CVMSketch(4); s.add([1, 2, 2]); print(s.backend, s.estimate(), native.reason(), native.isa_level())"
    )
    (tmp_path / "_native.py").write_text("raise ImportError('no such symbol')")
    assert python(code) == "reference 2.0 cvmk._native is there but does not load: no such symbol base"
