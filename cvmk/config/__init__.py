"""Configuration: the schema of every key, and reading it from TOML. Imports nothing of cvmk but its errors and files."""

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
