"""Reports of runs: one page, Markdown and JSON of the same figures. Imports no torch, and little before a report is made: trainings read `names` only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvmk.report.figures import Figures, figures_of
    from cvmk.report.write import outputs, write_report

__all__ = ["Figures", "figures_of", "outputs", "write_report"]

_HOMES = {"Figures": "figures", "figures_of": "figures", "outputs": "write", "write_report": "write"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"cvmk.report.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
