"""The settings of every command, by flags and YAML. Nothing here imports torch."""

from hesstrace_cli.config.checkpoints import (
    CheckpointConfig,
    EstimateConfig,
    SensitivityConfig,
    SpectrumConfig,
    VerifyConfig,
)
from hesstrace_cli.config.data import SEQ_LEN, TASK_NAMES, TEXT, WIKITEXT, WORD, DataConfig, is_text
from hesstrace_cli.config.fields import LARGEST, LARGEST_SHIFT, SMALLEST_SCALE, key_of, whole_number
from hesstrace_cli.config.files import read_yaml, resolve, to_yaml
from hesstrace_cli.config.many_runs import CompareConfig, TuneConfig
from hesstrace_cli.config.regularizers import (
    REGULARIZERS,
    is_late,
    parse_regularizers,
    parse_terms,
    regularizers_name,
    scale_of,
    settings_used,
    usual_strength,
)
from hesstrace_cli.config.rows import Row, open_names
from hesstrace_cli.config.scales import SCALES, Scale
from hesstrace_cli.config.train import TrainConfig
from hesstrace_cli.config.yaml_text import shortened
from hesstrace_cli.hints import did_you_mean, likely

__all__ = [
    "LARGEST",
    "LARGEST_SHIFT",
    "REGULARIZERS",
    "SCALES",
    "SEQ_LEN",
    "SMALLEST_SCALE",
    "TASK_NAMES",
    "TEXT",
    "WIKITEXT",
    "WORD",
    "CheckpointConfig",
    "CompareConfig",
    "DataConfig",
    "EstimateConfig",
    "Row",
    "Scale",
    "SensitivityConfig",
    "SpectrumConfig",
    "TrainConfig",
    "TuneConfig",
    "VerifyConfig",
    "did_you_mean",
    "is_late",
    "is_text",
    "key_of",
    "likely",
    "open_names",
    "parse_regularizers",
    "parse_terms",
    "read_yaml",
    "regularizers_name",
    "resolve",
    "scale_of",
    "settings_used",
    "shortened",
    "to_yaml",
    "usual_strength",
    "whole_number",
]  # fmt: skip
