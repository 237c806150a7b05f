"""The steps of gpu_check.sh: each in processes of its own with a time limit, so that one that fails or hangs loses nothing of the others."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu import contestants

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = {"kd_loss": 75, "attention": 100, "linear": 60, "scan": 40, "host": 30, "training": 45}
"""Modules bench_gpu_<name>.py and the seconds that each may take."""


class Failed(Exception):
    """A step that did not do what it should; the text says what."""


@dataclass
class Check:
    """What the steps share."""

    out: Path
    wheels: Path | None
    dry: bool
    end: float
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def package(self) -> Path:
        """Folder with the package as it is built here, which stands first on every process's path."""
        return self.out / "package"

    def environment(self, **more: str) -> dict[str, str]:
        package = self.package if (self.package / "cvmk").exists() else ROOT
        paths = [str(package), str(self.out / "peers"), str(ROOT / "benchmarks")]
        base = {name: value for name, value in os.environ.items() if name not in ("CVMK_BACKEND", "PYTHONPATH")}
        if self.dry:
            base["TRITON_INTERPRET"] = "1"
        return base | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | more

    def run(self, name: str, command: list[str], limit: float, **more: str) -> str:
        """The output of a command, which also goes to <name>.log. Raises Failed where it fails or runs past the limit."""
        limit = min(limit, self.end - time.monotonic())
        if limit < 5:
            raise Failed("no time left")
        log = self.out / f"{name}.log"
        with log.open("a") as stream:
            stream.write(f"$ {' '.join(command)}\n")
            stream.flush()
            at = stream.tell()
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment(**more), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with log.open(errors="replace") as written:
            written.seek(at)
            output = written.read()
        if code is None:
            raise Failed(f"stopped after {limit:.0f} s; {log.name} has its output")
        if code != 0:
            raise Failed(f"exit code {code}: " + " | ".join(output.strip().splitlines()[-4:])[-600:])
        return output


# -- steps: each returns what goes into the report --------------------------------------------------------------------------------
def machine(check: Check) -> Any:
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for tool, arguments in {
        "nvidia-smi": ["--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"],
        "nvcc": ["--version"],
        "cmake": ["--version"],
        "compute-sanitizer": ["--version"],
    }.items():
        path = shutil.which(tool)
        if path is None:
            found[tool] = None
        else:
            answer = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20).stdout.splitlines()
            found[tool] = next((line for line in answer if re.search(r"\d\.\d", line)), "?")
    if check.wheels is not None:
        peers = check.out / "peers"
        for wheel in sorted(check.wheels.glob("*.whl")):  # unpacked: Triton reads the kernels' sources from files
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(peers)
    names = "torch triton numpy pydantic pytest pybind11 liger_kernel fla torchao bitsandbytes mamba_ssm".split()
    code = (
        "import importlib, json\nfound = {}\n"
        f"for name in {names!r}:\n"
        "    try:\n        found[name] = str(getattr(importlib.import_module(name), '__version__', 'there'))\n"
        "    except BaseException as error:\n        found[name] = f'not here: {type(error).__name__}: {str(error)[:120]}'\n"
        "print(json.dumps(found))"
    )
    found["packages"] = json.loads(check.run("machine", [sys.executable, "-c", code], 60).strip().splitlines()[-1])
    return found


def build(check: Check) -> Any:
    """The package's sources and, beside them, the CUDA library; nothing here needs the CPU library."""
    folder = check.out / "build"
    pybind = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True).stdout.strip()
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", "-DCVMK_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    if pybind:
        configure.append(f"-Dpybind11_DIR={pybind}")
    if shutil.which("ninja"):
        configure.append("-GNinja")
    if check.dry:
        configure.append("-DCVMK_CUDA_ARCHS=80-real;90a-real")
    check.package.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "cvmk", check.package / "cvmk", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_native_build.json"))
    check.run("build", configure, 60)
    begun = time.monotonic()
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    check.run("build", ["cmake", "--build", str(folder), "--target", "_native_cuda", "-j", jobs], 600 if check.dry else 150)
    seconds = time.monotonic() - begun
    for file in (*folder.glob("_native_cuda*.so"), folder / "_native_build.json"):
        shutil.copy2(file, check.package / "cvmk")
    code = "import cvmk, cvmk._native_cuda as n, cvmk.ops as o; print(cvmk.__file__); print(n.device_error() or n.devices()); print(o.backends_report())"
    return {"compile_seconds": round(seconds, 1), "imported": check.run("build", [sys.executable, "-c", code], 60).strip().splitlines()[-3:]}


def ceilings(check: Check) -> Any:
    return json.loads(check.run("ceilings", [sys.executable, "-m", "gpu.timing"], 40).strip().splitlines()[-1])


def tests(check: Check) -> Any:
    """The backends' own tests: on the device, or a few of them under the interpreter and on the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-x" if check.dry else "--maxfail=30"]
    command += ["-o", f"cache_dir={check.out / 'pytest'}"]
    if check.dry:
        command += ["tests/ops/triton", "-k", "parts or empty or declined"]
    else:
        command += ["tests/ops/triton", "tests/ops/cuda", "-m", "", "-k", "not compiles_as_committed"]
        if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode == 0:
            command += ["-n", "8"]
    output = check.run("tests", command, 400 if check.dry else 150)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    if not counts.get("passed"):
        raise Failed("no test ran: " + output.strip().splitlines()[-1])
    return counts


def sanitizer(check: Check) -> Any:
    """compute-sanitizer over a small case of every CUDA kernel."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Failed("compute-sanitizer is not on PATH")
    found: dict[str, Any] = {}
    for name in ("memcheck", "racecheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "gpu.contestants", "kd_loss,scan,linear,attention"]
        output = check.run("sanitizer", [*command, "--small", "--once", "cuda"], 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found[name] = [line for line in output.splitlines() if "ran on cuda" in line or "SUMMARY" in line]
        if not any("ran on cuda" in line for line in found[name]):
            raise Failed("no CUDA kernel ran")
    return found


def benchmark(module: str) -> Callable[[Check], Any]:
    def step(check: Check) -> Any:
        path, limit = check.out / f"bench_{module}.json", BENCHMARKS[module]
        command = [sys.executable, "-m", "gpu.contestants", module, "--out", str(path), "--limit", str(limit * 0.8), "--seconds", "0.1"]
        problem = None
        try:
            check.run(f"bench_{module}", command + (["--small"] if check.dry else []), 200 if check.dry else limit)
        except Failed as error:
            problem = str(error)
        if path.exists():
            check.report.setdefault("benchmarks", {})[module] = json.loads(path.read_text())
        if problem is not None:
            raise Failed(problem)
        rows = check.report["benchmarks"][module]
        return {"rows": len(rows["rows"]), "complete": rows["complete"]}

    return step


# -- all of them --------------------------------------------------------------------------------------------------------------------
STEPS: dict[str, Callable[[Check], Any]] = {
    "machine": machine,
    "build": build,
    "ceilings": ceilings,
    "tests": tests,
    **{f"bench_{module}": benchmark(module) for module in BENCHMARKS},
    "sanitizer": sanitizer,
}
NEEDS_GPU = ("ceilings", "sanitizer")


def perform(check: Check, names: list[str]) -> bool:
    """Whether every step passed; the report is written after each."""
    steps = check.report["steps"] = {}
    for name in names:
        begun = time.monotonic()
        if check.dry and name in NEEDS_GPU:
            steps[name] = {"status": "skipped", "detail": "there is no GPU"}
        else:
            try:
                steps[name] = {"status": "passed", "detail": STEPS[name](check)}
            except Exception as error:  # whatever went wrong, the next step is still done
                steps[name] = {"status": "failed", "detail": str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"}
        steps[name]["seconds"] = round(time.monotonic() - begun, 1)
        print(f"{name:<16} {steps[name]['status']:<8} {steps[name]['seconds']:6.1f} s  {str(steps[name]['detail'])[:400]}", flush=True)
        (check.out / "gpu_check.json").write_text(json.dumps(check.report, indent=1) + "\n")
    return all(step["status"] != "failed" for step in steps.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of peers (and of pydantic), unpacked onto the path")
    parser.add_argument("--minutes", type=float, default=9.0, help="all steps together")
    parser.add_argument("--only", default=",".join(STEPS), help=f"steps, of {', '.join(STEPS)}")
    parser.add_argument("--dry-run", action="store_true", help="as on a machine without a GPU")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"there is no step {unknown[0]}")
    dry = arguments.dry_run or not any(Path("/dev").glob("nvidia[0-9]*"))
    minutes = max(arguments.minutes, 60.0) if dry else arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    for log in arguments.out.glob("*.log"):
        log.unlink()
    out = arguments.out.resolve()
    check = Check(out, arguments.wheels, dry, time.monotonic() + 60 * minutes - 10, {"dry_run": dry, "command": " ".join(sys.argv)})
    passed = perform(check, names)
    lines = [line for module in check.report.get("benchmarks", {}).values() for line in contestants.table(module["rows"])]
    (out / "gpu_check.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"{'a dry run: the figures mean nothing; ' if dry else ''}{out / 'gpu_check.json'}: {'all steps passed' if passed else 'some steps FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
