"""Regularizers by name: one file each, one signature."""

from __future__ import annotations

from collections.abc import Mapping

from hesstrace_cli.config import TrainConfig
from hesstrace_cli.regularizers.base import Regularizer, Step, Term
from hesstrace_cli.regularizers.trace import CurvatureChoice, TracePenalty, choose_curvature

__all__ = ["CurvatureChoice", "Regularizer", "Step", "Term", "build", "choose_curvature"]


def build(row: Mapping[str, float], config: TrainConfig, curvature: str) -> list[Regularizer]:
    """The regularizers of a row; one with strength 0 is left out, as it changes nothing.

    Args:
        row: Strengths by name, as `config.parse_row` gives them.
        config: Settings that single regularizers have of their own.
        curvature: The resolved `--curvature`.
    """
    built: list[Regularizer] = []
    for name, strength in row.items():
        if strength == 0:
            continue
        if name == "trace":
            built.append(TracePenalty(strength, config, curvature))
    return built
