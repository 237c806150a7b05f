"""What the build promises: versions that agree, pins for everything, no torch in native code, choices that fail clearly."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import cvmk

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="the source folder is not here")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = {canonicalize_name(line.partition("==")[0]): Version(line.partition("==")[2]) for line in lines}
    assert len(found) == len(lines)
    return found


def test_versions_agree(project: dict[str, Any]):
    cmake = re.search(r"project\(cvmk VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert cmake is not None and project["project"]["version"] == cvmk.__version__ == cmake.group(1)


def test_every_dependency_is_pinned_to_a_version_that_its_range_allows(project: dict[str, Any]):
    pinned = pins()
    assert pinned["torch"] == Version("2.13.0")
    groups = [project["build-system"]["requires"], project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    for requirement in map(Requirement, [entry for group in groups for entry in group]):
        name = canonicalize_name(requirement.name)
        if name == "cvmk":  # its own extras
            continue
        assert name in pinned, f"{name} is not in constraints.txt"
        assert pinned[name] in requirement.specifier, f"{name}=={pinned[name]} is outside {requirement}"
        assert not any(s.operator in ("==", "<", "<=", "~=") for s in requirement.specifier), f"{requirement}: keep the range open"


def test_checks_before_a_commit_use_the_pinned_linter():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    found = re.findall(r'"(ruff|mypy)==([^"]+)"', text)
    assert found and all(pins()[name] == Version(version) for name, version in found)


def test_torch_is_not_needed_to_build(project: dict[str, Any]):
    assert not any(entry.startswith("torch") for entry in project["build-system"]["requires"])
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        *[(path, True) for path in ("checkpoints/step-1/x", "runs/a/log.txt", "artifacts/x", "logs/a", "telemetry.json", "a/b.pt", "m/model.safetensors")],
        *[(path, True) for path in ("x.bin", "x.onnx", "training_report.json", "runs/report.png", "build/x", "cvmk/_native.so", "cvmk/serving/x_pb2.py")],
        *[(path, True) for path in ("__pycache__/x.pyc", ".hypothesis/x", "benchmarks/out.json", "benchmarks/plots/a.png", ".benchmarks/x")],
        *[(path, False) for path in ("benchmarks/bench_attention.py", "benchmarks/results/h200.json", "cvmk/training/report.py", "examples/quickstart.toml")],
        *[(path, False) for path in ("cvmk/training/checkpoint.py", "cvmk/telemetry/events.py", "tests/training/test_checkpoint.py", "docs/x.png")],
    ],
)
def test_produced_files_are_ignored_and_sources_are_not(path: str, ignored: bool):
    code = subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT, check=False).returncode
    assert code == (0 if ignored else 1)


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def configure(build: Path, *options: str, **environment: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, all output in one line, and the build record."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CVMK_", "CUDACXX"))}
    command = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}", *options]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env={**kept, **environment})
    record = build / "_native_build.json"
    return answer.returncode, " ".join((answer.stdout + answer.stderr).split()), json.loads(record.read_text()) if record.exists() else {}


@needs_cmake
def test_native_off_asks_for_nothing(tmp_path: Path):
    code, _, record = configure(tmp_path, CVMK_NATIVE="OFF", CXX="/no/compiler")
    assert code == 0
    assert record["native"] == {"choice": "OFF", "reason": "the package was built with CVMK_NATIVE=OFF", "compiler": "", "emulated": ""}
    assert "native library" in record["cuda"]["reason"]


@needs_cmake
def test_no_compiler_is_told_in_the_log_and_the_package_is_built_without(tmp_path: Path):
    code, said, record = configure(tmp_path, CXX="/no/compiler")
    assert code == 0 and "CVMK_NATIVE=AUTO, not built: no C++ compiler was found" in said
    assert record["native"]["reason"].startswith("no C++ compiler was found")


@needs_cmake
@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        (["-DCVMK_NATIVE=ON"], {"CXX": "/no/compiler"}, "CVMK_NATIVE=ON, but no C++ compiler was found"),
        (["-DCVMK_CUDA=perhaps"], {"CVMK_NATIVE": "OFF"}, "CVMK_CUDA is 'perhaps': set it to AUTO, ON or OFF."),
        ([], {"CVMK_NATIVE": "OFF", "CVMK_CUDA": "ON"}, "CVMK_CUDA=ON, but the CUDA library needs the native library"),
        (["-DCVMK_TESTS=ON"], {"CVMK_NATIVE": "OFF"}, "CVMK_TESTS=ON needs the native library"),
    ],
)
def test_wrong_choices_fail_with_one_sentence(tmp_path: Path, options: list[str], environment: dict[str, str], words: str):
    code, said, record = configure(tmp_path, *options, **environment)
    assert code != 0 and words in said and not record


@needs_cmake
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler is installed")
def test_cuda_without_nvcc_or_gpu(tmp_path: Path):
    pytest.importorskip("pybind11")
    code, said, _ = configure(tmp_path / "on", CVMK_CUDA="ON", CUDACXX="/no/nvcc")
    assert code != 0 and "CVMK_CUDA=ON, but nvcc was not found" in said
    code, said, record = configure(tmp_path / "auto", CUDA_VISIBLE_DEVICES="")
    assert code == 0 and "CVMK_CUDA=AUTO, not built: no NVIDIA GPU was visible" in said
    assert record["native"]["reason"] == "" and "CVMK_CUDA=ON" in record["cuda"]["reason"]
