"""Compile every Triton kernel of a module for GPUs that are not there, and read what the compiler made of it.

`python compile_gate.py MODULE [--write TABLE]` runs the CASES of cvmk.ops.triton.MODULE on the device "meta" while launches are
recorded, compiles each different launch for compute capability 8.0 and 9.0, and prints one JSON object: "<case> <kernel> <number of the launch> sm_90"
-> registers, shared memory, bytes of stack and spills, and whether the tensor cores' instructions are there. In a process without
TRITON_INTERPRET. With --write the object goes to TABLE, the committed one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CAPABILITIES = {(8, 0): 108, (9, 0): 132}  # and their multiprocessors
TENSOR_CORES = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA")
SHARED_LIMIT = {(8, 0): 163 * 1024, (9, 0): 227 * 1024}  # bytes a block
_DTYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


def specialised(value: Any) -> tuple[str, bool, bool]:
    """(Triton's type, whether divisible by 16, whether the value itself is compiled in) of a run-time argument, as the launcher does it."""
    if isinstance(value, torch.Tensor):
        return "*" + _DTYPES[value.dtype], value.data_ptr() % 16 == 0, False
    if value is None or value is True or value is False:
        return ("constexpr", False, True) if value is None else ("u1", False, False)
    if isinstance(value, int):
        if value == 1:
            return "constexpr", False, True
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0, False
    if isinstance(value, float):
        return "fp32", False, False
    raise TypeError(f"a kernel got an argument of type {type(value).__name__}")


def compiled(launch: Any, capability: tuple[int, int]) -> dict[str, Any]:
    """Registers, shared bytes, stack and spill bytes, and tensor-core instructions of one launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    constants = {name: launch.constants[name] for name in names if name in launch.constants}
    by_position = iter(launch.arguments)
    types = {name: specialised(next(by_position)) for name in names if name not in constants}
    given = dict(zip([name for name in names if name not in constants], launch.arguments, strict=True))
    constants |= {name: given[name] for name, (_, _, fixed) in types.items() if fixed}
    source = ASTSource(
        fn=launch.kernel,
        signature={name: "constexpr" if name in constants else types[name][0] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, (_, divisible, fixed) in types.items() if divisible and not fixed},
    )
    options = launch.options | {name: value for name, value in launch.constants.items() if name not in names}  # such as enable_fp_fusion
    result = triton.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(result.asm["ptx"])
        cubin.write_bytes(result.asm["cubin"])
        architecture = re.search(r"\.target (\w+)", result.asm["ptx"]).group(1)  # type: ignore[union-attr]
        report = subprocess.run([tools / "ptxas", "-v", f"-arch={architecture}", ptx, "-o", f"{folder}/again.cubin"], capture_output=True, text=True).stderr
        listing = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
    stack = [int(number) for number in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)]
    return {
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),  # type: ignore[union-attr]
        "shared": result.metadata.shared,
        "spills": max(stack, default=0),
        "tensor_cores": [name for name in TENSOR_CORES if name in listing],
    }


def launches(module: Any, capability: tuple[int, int]) -> Iterator[tuple[str, Any]]:
    """Every different launch of the module's cases, with its name."""
    from cvmk.ops.triton import _launch

    seen = set()
    for case in module.CASES:
        with _launch.recording(capability, CAPABILITIES[capability]) as recorder:
            case.run(torch.device("meta"))
        assert recorder.launches, f"the case {case.name!r} launches nothing"
        for number, launch in enumerate(recorder.launches):
            same = (launch.kernel, tuple(map(_compiled_in, launch.arguments)), *sorted(launch.constants.items()), *sorted(launch.options.items()))
            if same not in seen:
                seen.add(same)
                yield f"{case.name}: {launch.kernel.__name__} {number}", launch


def _compiled_in(value: Any) -> Any:
    type_, divisible, fixed = specialised(value)
    return type_, divisible, value if fixed else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    assert os.environ.get("TRITON_INTERPRET") != "1"
    module = importlib.import_module(f"cvmk.ops.triton.{arguments.module}")
    found = {}
    for capability in CAPABILITIES:
        for name, launch in launches(module, capability):
            key = f"{name} sm_{capability[0]}{capability[1]}"
            try:
                found[key] = compiled(launch, capability)
            except Exception as error:  # a kernel that does not compile is a finding, the others are still looked at
                found[key] = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
    text = "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()) + "\n}\n"
    if arguments.write:
        arguments.write.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
