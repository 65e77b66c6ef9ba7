"""Regularizers by name: one file each, one signature."""

from __future__ import annotations

from collections.abc import Mapping

from hesstrace_cli.config import REGULARIZERS, TrainConfig
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.plugins import call_factory, load_factory
from hesstrace_cli.regularizers.base import Coupled, Part, Regularizer, Setting, Step, Term
from hesstrace_cli.regularizers.weight_averages import WeightAverage

__all__ = [
    "Coupled", "Part", "Regularizer", "Setting", "Step", "Term", "WeightAverage", "build",
]  # fmt: skip


def build(strengths: Mapping[str, float], config: TrainConfig) -> list[Regularizer]:
    """The regularizers by name; one with strength 0 is left out, as it changes nothing.

    Args:
        strengths: By name, as `config.parse_regularizers` gives them; a name may be a user's
            `FILE.py:Class`.
        config: The run's settings.

    Raises:
        ConfigError: If a user's file or class is not there, or is no regularizer.
    """
    built: list[Regularizer] = []
    for name, strength in strengths.items():
        if strength == 0:
            continue
        factory = load_factory(REGULARIZERS[name].made_by if name in REGULARIZERS else name,
                               ConfigError)  # fmt: skip
        regularizer = call_factory(factory, {}, name, ConfigError, strength, config)
        if not isinstance(regularizer, Regularizer):
            raise ConfigError(
                f"{name!r} gave a {type(regularizer).__name__}, expected a "
                "hesstrace_cli.regularizers.Regularizer"
            )
        regularizer.name = name
        built.append(regularizer)
    return built
