"""Every Triton kernel compiled for sm_80 and sm_90 without a GPU: no spill that is not known, no tensor-core instruction lost.

resources/<module>.json is what the compiler made of each launch when it was committed (tests/helpers/compile_gate.py --write makes it
again). Registers may grow by a tenth with another version of Triton; spills, shared memory beyond the device's and a lost instruction fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import compile_gate
import pytest

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in (Path(compile_gate.__file__).parents[2] / "cvmk" / "ops" / "triton").glob("[!_]*.py"))


def problems(measured: dict[str, dict[str, Any]], committed: dict[str, dict[str, Any]]) -> list[str]:
    """What is worse than in the committed table, a sentence each."""
    found = [f"{key} is in the table and is not launched any more" for key in committed.keys() - measured.keys()]
    for key, now in measured.items():
        then = committed.get(key)
        limit = compile_gate.SHARED_LIMIT[8 if key.endswith("80") else 9, 0]
        if "error" in now:
            found.append(f"{key} does not compile: {now['error']}")
        elif then is None:
            found.append(f"{key} is not in the table: {now}")
        else:
            if now["spills"] > then["spills"]:
                found.append(f"{key} spills {now['spills']} bytes, {then['spills']} before")
            if now["shared"] > limit:
                found.append(f"{key} asks for {now['shared']} bytes of shared memory, {limit} are there")
            if now["registers"] > then["registers"] * 1.1:
                found.append(f"{key} uses {now['registers']} registers, {then['registers']} before")
            if lost := set(then["tensor_cores"]) - set(now["tensor_cores"]):
                found.append(f"{key} lost {', '.join(sorted(lost))}")
    return found


def compile_all(module: str) -> dict[str, dict[str, Any]]:
    """What the compiler makes of a module's launches, in a process of its own: this one may be interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, compile_gate.__file__, module], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def compiling() -> Iterator[dict[str, Future[dict[str, dict[str, Any]]]]]:
    """Every module's results to come; as many compile at once as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {module: pool.submit(compile_all, module) for module in MODULES}


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_as_committed(module: str, compiling: dict[str, Future[dict[str, dict[str, Any]]]]) -> None:
    committed = json.loads((HERE / "resources" / f"{module}.json").read_text())
    assert committed
    assert not problems(compiling[module].result(), committed)


def test_the_gate_sees_what_is_worse() -> None:
    good = {"a sm_90": {"registers": 100, "shared": 1000, "spills": 0, "tensor_cores": ["HGMMA"]}}
    assert problems(good, good) == []
    for change in ({"registers": 111}, {"shared": 300_000}, {"spills": 8}, {"tensor_cores": ["HMMA"]}):
        assert len(problems({"a sm_90": good["a sm_90"] | change}, good)) == 1
    assert len(problems({"a sm_90": {"error": "no"}}, good)) == 1
    assert len(problems({}, good)) == 1
    assert len(problems(good, {})) == 1
