"""Questions about backends: which take a call, which can run here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cvmk.ops._backend import PREFERENCE, allowed
from cvmk.ops._op import OPS, Op


@dataclass(frozen=True)
class Explanation:
    """Whether one backend takes one call; `reasons` is empty when it does. `chosen` marks the one that would run."""

    backend: str
    reasons: tuple[str, ...]
    chosen: bool

    def __str__(self) -> str:
        if self.chosen:
            return f"{self.backend}: chosen"
        return f"{self.backend}: able, but another is preferred" if not self.reasons else "; ".join(self.reasons)


def public_ops() -> dict[str, Op]:
    """The ops that have a public function (`kd_loss_scale`, say, is a part of another)."""
    return {name: op for name, op in OPS.items() if op.prepare is not None}


def explain(name: str, *args: Any, **kwargs: Any) -> list[Explanation]:
    """Every backend of the op `name` with the reasons why it does not take this call (the arguments are those of `ops.<name>`).

    Raises ValueError for an unknown op, and whatever the op itself raises for wrong arguments.
    """
    op = OPS.get(name)
    if op is None or op.prepare is None:
        raise ValueError(f"{name!r} is no op that chooses among backends; these are {', '.join(sorted(public_ops()))}")
    call = op.prepare(*args, **kwargs)
    candidates = op.candidates()
    found = {}
    for backend in op.backends:
        found[backend.name] = backend.reasons("forward", call, op.principal)
        if backend not in candidates:
            found[backend.name].append(f"{backend.name}: not among the allowed backends ({', '.join(allowed())})")
    chosen = next((backend.name for backend in candidates if not found[backend.name]), None)
    return [Explanation(backend, tuple(reasons), backend == chosen) for backend, reasons in found.items()]


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run in this process."""

    backend: str
    available: bool
    reasons: tuple[str, ...] = field(default=())


def backends_report() -> dict[str, list[BackendStatus]]:
    """For every op, its backends and whether they can run in this process (a particular call: `explain`)."""
    report = {}
    for name, op in sorted(public_ops().items()):
        rows = []
        for backend in op.backends:
            reasons = tuple(backend.missing())
            rows.append(BackendStatus(backend.name, not reasons, reasons))
        there = {row.backend for row in rows}
        rows += [BackendStatus(other, False, (f"{other}: not written for this op",)) for other in PREFERENCE if other not in there]
        report[name] = rows
    return report
