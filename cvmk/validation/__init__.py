"""Scores with signatures, their significance, and the validator that training uses. Imports no torch."""

from __future__ import annotations

from cvmk.validation.bootstrap import PairedResult, interval, paired
from cvmk.validation.metrics import Score, available, score
from cvmk.validation.validator import DistillationValidator, ValidationResult

__all__ = ["DistillationValidator", "PairedResult", "Score", "ValidationResult", "available", "interval", "paired", "score"]
