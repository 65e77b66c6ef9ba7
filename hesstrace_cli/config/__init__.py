"""The settings of every command, by flags and YAML. Nothing here imports torch."""

from hesstrace_cli.config.commands import (
    TASK_NAMES,
    CheckpointConfig,
    CompareConfig,
    DataConfig,
    EstimateConfig,
    SpectrumConfig,
    TrainConfig,
    VerifyConfig,
)
from hesstrace_cli.config.fields import LARGEST, LARGEST_SHIFT, SMALLEST_SCALE, key_of
from hesstrace_cli.config.files import read_yaml, resolve, to_yaml
from hesstrace_cli.config.rows import REGULARIZERS, parse_row, row_name
from hesstrace_cli.config.yaml_text import shortened
from hesstrace_cli.hints import did_you_mean, likely

__all__ = [
    "LARGEST", "LARGEST_SHIFT", "REGULARIZERS", "SMALLEST_SCALE", "TASK_NAMES",
    "CheckpointConfig", "CompareConfig", "DataConfig", "EstimateConfig", "SpectrumConfig",
    "TrainConfig", "VerifyConfig", "did_you_mean", "key_of", "likely", "parse_row", "read_yaml",
    "resolve", "row_name", "shortened", "to_yaml",
]  # fmt: skip
