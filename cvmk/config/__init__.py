"""Configuration: the schema of every key, and reading it from TOML. Imports nothing of cvmk but its errors and files.

A name is imported when it is asked for: a process that translates needs `ModelConfig`, and the whole schema takes longer than its model's weights.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvmk.config.schema import (
        CorpusConfig,
        DataConfig,
        DistillationConfig,
        GuardConfig,
        ModelConfig,
        OptimizerConfig,
        ScheduleConfig,
        SequenceLevelConfig,
        TeacherConfig,
        TokenizerConfig,
        TrainConfig,
        TrainingConfig,
        ValidationConfig,
    )

__all__ = [
    "CorpusConfig",
    "DataConfig",
    "DistillationConfig",
    "GuardConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "SequenceLevelConfig",
    "TeacherConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainingConfig",
    "ValidationConfig",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("cvmk.config.schema"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
