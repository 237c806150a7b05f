"""Every CUDA kernel compiled for sm_80 and sm_90a without a GPU: no spill, no kernel lost, not many more registers than when committed.

`python test_cuda_compiles.py` writes resources/cuda_kernels.json, the committed table, again. Bindings hold no kernel: that they compile is
seen where the CUDA library is built.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).parent / "resources" / "cuda_kernels.json"
SOURCES = sorted(path for path in (ROOT / "csrc").glob("*/cuda_*.cu") if path.parent.name != "bindings")
ARCHITECTURES = ("80", "90a")
FLAGS = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra"]
FLAGS += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
Resources = dict[str, dict[str, int]]


def compiled(source: Path) -> Resources:
    """What ptxas says of every kernel of a file: registers, and the bytes of stack or spills, whichever is most."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["nvcc", *FLAGS, "-c", str(source), "-o", f"{folder}/kernels.o"], capture_output=True, text=True)
    if done.returncode or "warning" in done.stderr:
        return {f"{source.stem}: {done.stderr}": {"registers": 0, "spills": -1}}
    return dict(kernels(done.stderr))


def kernels(said: str) -> Iterator[tuple[str, dict[str, int]]]:
    for mangled, architecture, text in re.findall(r"Compiling entry function '(\w+)' for '(\w+)'(.*?Used \d+ registers)", said, re.DOTALL):
        stack = [int(number) for number in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", text)]
        yield f"{readable(mangled)} {architecture}", {"registers": int(re.findall(r"Used (\d+)", text)[0]), "spills": max(stack)}


def readable(mangled: str) -> str:
    """cvmk::scan::forward_channels<8, true> of an Itanium name of such a kernel: a nested name, then template arguments that are numbers or types."""
    names, rest, types = [], mangled.removeprefix("_ZN"), {"f": "float", "d": "double"}
    while (length := re.match(r"\d+", rest)) is not None:
        end = length.end() + int(length[0])
        names.append(rest[length.end() : end])
        rest = rest[end:]
    arguments = []
    rest = rest.removeprefix("I") if rest.startswith("I") else ""
    while rest and not rest.startswith("E"):
        if (number := re.match(r"L[a-z](n?)(\d+)E", rest)) is not None:
            arguments.append(number[1].replace("n", "-") + number[2])
            rest = rest[number.end() :]
        elif (length := re.match(r"\d+", rest)) is not None:
            end = length.end() + int(length[0])
            arguments.append(rest[length.end() : end])
            rest = rest[end:]
        else:
            arguments.append(types[rest[0]])
            rest = rest[1:]
    path = "::".join(name for name in names if not name.startswith("_GLOBAL__N_"))
    return path + (f"<{', '.join(arguments)}>" if arguments else "")


def problems(measured: Resources, committed: Resources) -> list[str]:
    """What is worse than in the committed table, a sentence each."""
    found = [f"{name} is in the table and is no kernel any more" for name in committed.keys() - measured.keys()]
    for name, now in measured.items():
        then = committed.get(name)
        if now["spills"] < 0:
            found.append(f"{name} (does not compile without a warning)")
        elif then is None:
            found.append(f"{name} is not in the table: {now}")
        elif now["spills"] > then["spills"]:
            found.append(f"{name} spills {now['spills']} bytes, {then['spills']} before")
        elif now["registers"] > then["registers"] * 1.1:
            found.append(f"{name} uses {now['registers']} registers, {then['registers']} before")
    return found


def everything() -> Resources:
    with ThreadPoolExecutor(2) as pool:
        return {name: numbers for file in pool.map(compiled, SOURCES) for name, numbers in file.items()}


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_compiles_as_committed() -> None:
    committed = json.loads(TABLE.read_text())
    assert len({name.rpartition(" ")[2] for name in committed}) == len(ARCHITECTURES)
    assert not problems(everything(), committed)


def test_no_kernel_is_known_to_spill() -> None:
    assert SOURCES and all(numbers["spills"] == 0 for numbers in json.loads(TABLE.read_text()).values())


def test_the_gate_sees_what_is_worse() -> None:
    good = {"k<1> sm_80": {"registers": 100, "spills": 0}}
    assert problems(good, good) == []
    assert len(problems({"k<1> sm_80": {"registers": 111, "spills": 0}}, good)) == 1
    assert len(problems({"k<1> sm_80": {"registers": 90, "spills": 8}}, good)) == 1
    assert len(problems({"other": {"registers": 1, "spills": 0}}, good)) == 2
    assert len(problems({}, good)) == 1
    assert len(problems(good | {"x.cu: error": {"registers": 0, "spills": -1}}, good)) == 1


def test_what_ptxas_says_is_read() -> None:
    said = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function "
        "'_ZN4cvmk7distill48_GLOBAL__N__3189d472_15_cuda_kd_loss_cu_6e7498c410row_lossesI6__halfLi3ELb1EEEvNS0_10CudaKdLossE'"
        " for 'sm_90a'\nptxas info    : Function properties for _ZN4cvmk\n    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function '_ZN4cvmk4scan54_GLOBAL__N__5862f832_21_cuda_scan_backward_cu_35852cea9sum_partsENS1_7PartSumE' for 'sm_80'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info    : Used 28 registers, used 0 barriers\n"
        "ptxas info    : Compiling entry function '_ZN1a3rowIfLin1EEEvi' for 'sm_80'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info    : Used 9 registers, used 0 barriers\n"
    )
    assert dict(kernels(said)) == {
        "cvmk::distill::row_losses<__half, 3, 1> sm_90a": {"registers": 40, "spills": 12},
        "cvmk::scan::sum_parts sm_80": {"registers": 28, "spills": 0},
        "a::row<float, -1> sm_80": {"registers": 9, "spills": 0},
    }


if __name__ == "__main__":
    lines = (f" {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in sorted(everything().items()))
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
