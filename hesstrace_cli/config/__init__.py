"""The settings of every command, by flags and YAML. Nothing here imports torch."""

from hesstrace_cli.config.commands import (
    CheckpointConfig,
    CompareConfig,
    DataConfig,
    EstimateConfig,
    SpectrumConfig,
    TrainConfig,
    VerifyConfig,
)
from hesstrace_cli.config.fields import key_of
from hesstrace_cli.config.files import read_yaml, resolve, to_yaml
from hesstrace_cli.config.rows import REGULARIZERS, parse_row, row_name

__all__ = [
    "REGULARIZERS", "CheckpointConfig", "CompareConfig", "DataConfig", "EstimateConfig",
    "SpectrumConfig", "TrainConfig", "VerifyConfig", "key_of", "parse_row", "read_yaml",
    "resolve", "row_name", "to_yaml",
]  # fmt: skip
