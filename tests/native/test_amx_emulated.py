"""The AMX kernels on a processor without AMX: a build that emulates the tiles with AVX-512 passes the unit tests and the ops' own tests at this level."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from native_tests import ROOT, build_tests, run, unit_tests_pass

from cvmk import hardware

FEATURES = hardware.cpu().features
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(1800),  # it compiles
    pytest.mark.skipif(not (FEATURES.get("avx512_vnni") and FEATURES.get("avx512_bf16")), reason="the emulation needs AVX-512 with VNNI and BF16"),
    pytest.mark.skipif(bool(FEATURES.get("amx_tile")) and not hardware.cpu().emulated, reason="the processor has AMX, which every other test uses"),
    pytest.mark.skipif(shutil.which("ctest") is None, reason="ctest is not installed"),
]


@pytest.fixture(scope="session")
def emulated_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder that CVMK_TEST_EMULATED_BUILD names (with CVMK_TESTS=ON and CVMK_EMULATE_AMX=ON), else a new one."""
    if given := os.environ.get("CVMK_TEST_EMULATED_BUILD"):
        return Path(given)
    return build_tests(tmp_path_factory.mktemp("emulated"), "-DCVMK_WERROR=ON", "-DCVMK_EMULATE_AMX=ON", targets=("native_tests", "_native"))


def python(build: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    clean = {name: value for name, value in os.environ.items() if name not in ("CVMK_CPU_ISA", "CVMK_BACKEND", "PYTEST_ADDOPTS")}
    clean |= {"PYTHONPATH": path, "CVMK_EMULATED_BUILD": str(build), "OMP_WAIT_POLICY": "passive"}  # threads share the processors with other tests
    return run(sys.executable, *arguments, seconds=1500, environment=clean)


def test_unit_tests(emulated_build: Path):
    unit_tests_pass(emulated_build)
    assert run(emulated_build / "csrc" / "tests" / "test_cpu_features") == "level amx\n"


def test_ops(emulated_build: Path):
    """The tests that run at one level, and the property tests, which take every level.

    float32 beside the reference is left out: its arithmetic has no tiles and is that of the level below.
    """
    chosen = "test_properties or (amx and not (test_two_baselines and (dtype0 or dtypes0)))"
    options = ["-p", "emulated_amx", "-p", "no:cacheprovider", "-q", "-m", "", "-k", chosen, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    said = python(emulated_build, "-m", "pytest", *options, str(ROOT / "tests" / "ops" / "native"))
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None and int(passed[1]) > 500 and "failed" not in said


def test_doctor_tells_it(emulated_build: Path):
    doctor = "import emulated_amx; from cvmk.cli import main; raise SystemExit(main({}))"
    report = json.loads(python(emulated_build, "-c", doctor.format(["doctor", "--json"])))
    assert report["cpu"]["emulated"] == ["amx_tile", "amx_int8", "amx_bf16"] and report["cpu"]["level"] == "amx"
    assert report["libraries"]["native"]["emulated"] == "AMX"
    said = python(emulated_build, "-c", doctor.format(["doctor"]))
    assert "  emulated: amx_tile amx_int8 amx_bf16: a build for tests" in said and "emulates AMX, for tests only" in said


def test_no_figures_are_made_with_it(emulated_build: Path):
    code = "import emulated_amx, pytest; from cvmk.cli import main; print(main(['bench', '--seconds', '0.01']), int(pytest.main(['-q', '--co', {!r}])))"
    assert python(emulated_build, "-c", code.format(str(ROOT / "benchmarks"))).split()[-2:] == ["2", "4"]
