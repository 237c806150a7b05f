"""`cvmk bench`: the ops on this machine, backend beside backend; `--tune` finds block sizes for this GPU; `mixers` trains models that differ in them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cvmk.cli._arguments import positive
from cvmk.cli._streams import need_open
from cvmk.cli._terminal import show, show_json
from cvmk.errors import ConfigError

MAX_SECONDS = 3600
HELP = "time every backend of every op on this machine, tune the GPU kernels for it, or compare mixers by training with each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study",
        nargs="*",
        metavar="mixers CONFIG.toml WORK",
        help="train a configuration of cvmk train with each pattern of mixers, in the folder WORK, and compare the models; after Ctrl-C it goes on there",
    )
    study = parser.add_argument_group("mixers")
    study.add_argument(
        "--patterns",
        nargs="+",
        help="letters, or ENCODER:DECODER, or causal- and these, for an encoder that reads from left to right; others are compared with the first "
        "(default: each mixer, and three hybrids)",
    )
    study.add_argument("--iterations", type=positive, default=2000, help="of each training (default 2000)")
    study.add_argument("--seeds", type=positive, nargs="+", default=[1], help="one training of each pattern with each (default 1)")
    study.add_argument("--streams", type=positive, default=100, help="sentences that are translated word by word (default 100)")
    study.add_argument("--lengths", type=positive, nargs="+", default=[16, 64, 256, 1024, 4096], help="source tokens at which steps are timed")
    study.add_argument("--steps", type=positive, default=20, help="steps of decoding at each length in each of three turns (default 20)")
    study.add_argument("--costs-again", action="store_true", help="measure training steps and steps of decoding anew, as on a machine that is quiet now")
    study.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="another value for the configuration")
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op; may be given several times")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seconds", type=float, help="measuring time a row (default 0.5), or of the training steps of each pattern (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--tune", action="store_true", help="find the fastest block sizes of the Triton kernels on this GPU and keep them in your own table (minutes)"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.study:
        return _study(arguments)
    flags = {"--patterns": arguments.patterns, "--set": arguments.overrides, "--costs-again": arguments.costs_again}
    if given := [name for name, value in flags.items() if value]:
        raise ConfigError(f"{given[0]} is of cvmk bench mixers CONFIG.toml WORK: name these, or leave it out")
    import torch

    from cvmk import hardware
    from cvmk.ops import _bench as bench

    need_open(sys.stdout, "output")
    if hardware.cpu().emulated:
        raise ConfigError("the native library is a build for tests that emulates AMX (CVMK_EMULATE_AMX=ON), whose times mean nothing: install one without")
    seconds = _seconds(arguments, 0.5)
    if arguments.tune:
        return _tune(arguments)
    unknown = set(arguments.op or ()) - set(bench.CASES)
    if unknown:
        raise ConfigError(f"--op {sorted(unknown)[0]} is no op: the ops are {', '.join(bench.CASES)}")
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        raise ConfigError(f"--device {arguments.device} is no device: use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {arguments.device} is not supported: use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device that PyTorch can use; cvmk doctor tells more")
    rows = bench.rows(arguments.op or list(bench.CASES), device, seconds)
    _print(rows, as_json=arguments.json)
    return 0


def _seconds(arguments: argparse.Namespace, default: float) -> float:
    seconds: float = default if arguments.seconds is None else arguments.seconds
    if not 0 < seconds <= MAX_SECONDS:
        raise ConfigError(f"--seconds is {seconds}: give a positive number of seconds, at most {MAX_SECONDS}")
    return seconds


def _study(arguments: argparse.Namespace) -> int:
    if len(arguments.study) != 3 or arguments.study[0] != "mixers":
        raise ConfigError(f"cvmk bench {' '.join(arguments.study)} is no study: say cvmk bench mixers CONFIG.toml WORK")
    from cvmk.cli import _mixer_study
    from cvmk.hardware import keep_freed_memory

    need_open(sys.stdout, "output")
    keep_freed_memory()
    _, config, work = arguments.study
    options = {"streams": arguments.streams, "lengths": arguments.lengths, "steps": arguments.steps, "seconds": _seconds(arguments, 3.0)}
    patterns = arguments.patterns or _mixer_study.PATTERNS
    text = _mixer_study.run(
        config, Path(work), arguments.overrides, patterns, arguments.iterations, arguments.seeds, options, costs_again=arguments.costs_again
    )
    show(text.rstrip())
    return 0


def _print(rows: Iterable[Any], *, as_json: bool) -> None:
    from cvmk.telemetry import environment

    if as_json:
        show_json({"machine": environment(), "rows": [asdict(row) for row in rows]})
        return
    op = ""
    for row in rows:
        if row.op != op:
            op = row.op
            print(f"{row.op}: {row.case}", flush=True)
        value = "; ".join(row.reasons) if row.seconds is None else f"{row.seconds * 1e3:.3f} ms"
        print(f"  {row.backend:<10} {value}", flush=True)


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    from cvmk.ops import triton as backend

    if (reason := backend.reason()) is not None or not torch.cuda.is_available():
        raise ConfigError(f"--tune needs a GPU: {reason or 'Triton is only interpreted here'}")
    from triton.testing import do_bench

    from cvmk import files
    from cvmk.ops.triton import _launch, _tuner, _tuning

    modules = _tuner.modules()
    unknown = set(arguments.op or ()) - set(modules)
    if unknown:
        raise ConfigError(f"--op {sorted(unknown)[0]} has nothing to tune: these have {', '.join(modules)}")
    chosen = {name: module for name, module in modules.items() if not arguments.op or name in arguments.op}
    device = torch.device("cuda")
    path = _tuning.user_table(_launch.capability(device))
    before = files.read_json(path) if path.exists() else {}
    found = _tuner.tune(chosen, device, lambda call: do_bench(call, return_mode="median"), print)
    files.write_json(path, _tuning.merged(before, found))
    print(f"written to {path}")
    return 0
