"""`cvmk doctor`: versions, devices, instruction sets, native libraries, and the backends of each op with the reasons why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import sys
from dataclasses import asdict
from typing import Any

from cvmk.cli._check import as_json, check, judge
from cvmk.cli._streams import need_open
from cvmk.cli._terminal import show, show_json
from cvmk.errors import ConfigError

CHECK_ENVIRONMENT = False  # the report says what is wrong with it
HELP = "show versions, devices, instruction sets, and which backends each op has and why not the others"

_BYTES_PER_GIB = 2**30
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--check", action="store_true", help="run a small contract of every backend of every op here against the float64 reference; exit 3 where one is wrong"
    )


def run(arguments: argparse.Namespace) -> int:
    need_open(sys.stdout, "output")
    if getattr(arguments, "check", False):
        return _check(arguments)
    report = collect()
    if arguments.json:
        show_json(report)
    elif sys.stdout.isatty():
        _print_tables(report)
    else:
        show(_lines(report))
    if report["wrong_settings"]:
        raise ConfigError("; ".join(report["wrong_settings"]))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    rows = check(quiet=arguments.json)
    if arguments.json:
        show_json({**collect(), "checks": as_json(rows)})
    judge(rows, quiet=arguments.json)
    return 0


def collect() -> dict[str, Any]:
    """Everything that doctor shows, of JSON types. Never raises for what is missing or wrong: that is the answer."""
    from cvmk import hardware, libraries
    from cvmk.telemetry.environment import environment

    cpu, gpus = hardware.cpu(), hardware.gpus()
    record = libraries.build_record()
    states = {}
    for part, module in (("native", "_native"), ("cuda", "_native_cuda")):
        reason = libraries.load(module, part)[1]
        built = record.get(part, {})
        states[part] = {"available": reason is None, "reason": reason, "compiler": built.get("compiler") or None, "emulated": built.get("emulated") or None}
    devices, backends, error = _torch_side()
    settings = [cpu.error, str(error) if isinstance(error, ConfigError) else None]
    return {
        **environment(),
        "extras": extras(),
        "cpu": {**asdict(cpu), "name": environment()["processor"]},
        "gpus": asdict(gpus),
        "torch_devices": devices,
        "libraries": states,
        "ops": backends,
        "error": None if error is None else str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}",
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("CVMK_")},
        "wrong_settings": sorted({text for text in settings if text is not None}),
    }


def extras() -> dict[str, list[dict[str, Any]]]:
    """The optional packages by extra: name, version or None, and the command that installs what is missing."""
    try:
        requirements = importlib.metadata.requires("cvmk") or []
    except importlib.metadata.PackageNotFoundError:  # used from its source folder
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for requirement in requirements:
        extra, name = _EXTRA.search(requirement), _REQUIREMENT.match(requirement)
        if extra is None or name is None:
            continue
        row: dict[str, Any] = {"package": name.group(1), "version": None, "install": None}
        try:
            row["version"] = importlib.metadata.version(name.group(1))
        except importlib.metadata.PackageNotFoundError:
            row["install"] = f"pip install 'cvmk[{extra.group(1)}]'"
        found.setdefault(extra.group(1), []).append(row)
    return found


def _torch_side() -> tuple[list[str], dict[str, list[dict[str, Any]]], Exception | None]:
    """Devices of torch, the backends of each op, and why these cannot be told."""
    try:
        import torch

        from cvmk import ops
        from cvmk.ops.sketch import sketch_backends

        devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
        report = {**ops.backends_report(), "CVMSketch": sketch_backends()}
        return devices, {op: [asdict(row) for row in rows] for op, rows in report.items()}, None
    except Exception as error:  # doctor is asked when something is broken; a broken torch is an answer
        return [], {}, error


def _rows(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The report as titled rows of (what, value)."""
    cpu = report["cpu"]
    versions = [("cvmk", report["cvmk"]), ("python", report["python"])]
    versions += [(name, version or "missing") for name, version in report["packages"].items()]
    if not report["extras"]:
        versions.append(("extras", "not known, because cvmk is used from its source folder: pip install ."))
    for extra, packages in report["extras"].items():
        versions += [(f"[{extra}] {row['package']}", row["version"] or f"missing: {row['install']}") for row in packages]

    machine = [("system", report["system"]), ("processor", f"{cpu['name']}, {cpu['threads']} for this process")]
    if cpu["features"]:
        machine.append(("instruction sets", " ".join(name for name, there in cpu["features"].items() if there) or "none beyond the base"))
    else:
        machine.append(("instruction sets", "not known without the native library"))
    if cpu["emulated"]:
        machine.append(("emulated", f"{' '.join(cpu['emulated'])}: a build for tests, whose times mean nothing"))
    cap = f", capped by CVMK_CPU_ISA={cpu['cap']}" if cpu["cap"] else ""
    machine.append(("level of kernels", cpu["error"] or f"{cpu['level']} (detected: {cpu['detected'] or 'not known'}{cap})"))
    machine += [(f"gpu {gpu['index']}", _gpu(gpu)) for gpu in report["gpus"]["devices"]]
    if not report["gpus"]["devices"]:
        machine.append(("gpus", f"none: {report['gpus']['reason']}"))
    machine += [(name, value) for name, value in report["settings"].items()]
    machine.append(("torch devices", ", ".join(report["torch_devices"]) or "none"))

    libraries = []
    for part, state in report["libraries"].items():
        notes = [state["compiler"], f"emulates {state['emulated']}, for tests only" if state["emulated"] else None]
        there = "available" + (f" ({'; '.join(filter(None, notes))})" if any(notes) else "")
        libraries.append((part, there if state["available"] else f"not available: {state['reason']}"))

    sections = [("versions", versions), ("machine", machine), ("libraries", libraries), ("ops", _op_rows(report["ops"]))]
    if report["error"]:
        sections.append(("error", [("torch or cvmk.ops", report["error"])]))
    return sections


def _gpu(gpu: dict[str, Any]) -> str:
    if "error" in gpu:
        return f"cannot be asked: {gpu['error']}"
    memory = f", {gpu['memory_bytes'] / _BYTES_PER_GIB:.0f} GiB" if gpu["memory_bytes"] else ""
    return f"{gpu['name']}, capability {gpu['capability']}{memory}"


def _op_rows(ops: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    rows = []
    for op, backends in ops.items():
        there = [row["backend"] for row in backends if row["available"]]
        refusals = [reason for row in backends if not row["available"] for reason in row["reasons"]]
        rows.append((op, ", ".join(there) or "none"))
        rows += [("", reason) for reason in refusals]
    return rows


def _lines(report: dict[str, Any]) -> str:
    lines = []
    for title, rows in _rows(report):
        lines += [title, *(f"  {what}: {value}" if what else f"    not {value}" for what, value in rows)]
    return "\n".join(lines)


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, rows in _rows(report):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for what, value in rows:
            # Text, because "[extra]" in a plain string would be read as markup
            table.add_row(Text(what, style="bold"), Text(value if what else f"not {value}", style="" if what else "dim"))
        console.print(table)
        console.print()
