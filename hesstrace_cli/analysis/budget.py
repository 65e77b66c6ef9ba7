"""Weights that are to be rounded, and the choice of their bits under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn

from hesstrace_cli import records
from hesstrace_cli.analysis.allocation import Table, allocate, flips
from hesstrace_cli.analysis.quantization import SCALE_BITS, megabytes
from hesstrace_cli.config import SensitivityConfig
from hesstrace_cli.curvature.statistics import Mean, t_quantile
from hesstrace_cli.errors import ConfigError

LARGE = 0.05
"""Of the weights' squared norm: an error above it is no small step, and the model a guess."""

_PLAIN_BITS = 32


@dataclass(frozen=True)
class Weight:
    """A weight that is to be rounded.

    Attributes:
        name: Of the parameter.
        value: w, of n entries.
        trace: tr of its block.
        errors: ||Q(w) - w||^2 by bits.
        rises: The predicted rise by bits, with its standard deviation.
        slopes: g^T d by bits.
        num_scales: That rounding it takes.
    """

    name: str
    value: Tensor
    trace: Mean
    errors: dict[int, float]
    rises: dict[int, Mean]
    slopes: dict[int, float]
    num_scales: int

    @property
    def size(self) -> int:
        """N."""
        return self.value.numel()

    def is_large(self, bits: int) -> bool:
        """Whether its error is no small step at this width."""
        return self.errors[bits] > LARGE * self.value.double().square().sum().item()


@dataclass(frozen=True)
class Budget:
    """What all choices of bits cost and take, and what they may take.

    Attributes:
        weights: To choose for.
        bits: To choose from.
        limit: Of the sum of sizes, in bits.
        per_scale: What a scale counts, in bits.
        rest: The bits of what is not rounded; for the size in megabytes.
    """

    weights: Sequence[Weight]
    bits: list[int]
    limit: float
    per_scale: int
    rest: float

    @classmethod
    def of(
        cls, config: SensitivityConfig, weights: Sequence[Weight], model: nn.Module
    ) -> Budget | None:
        """As the flags say; None where they say none."""
        number = sum(w.size for w in weights)
        rest = float(_PLAIN_BITS * (sum(p.numel() for p in model.parameters()) - number))
        bits = sorted(config.bits)
        if config.average_bits is not None:
            return cls(weights, bits, config.average_bits * number, 0, rest)
        if config.size_mb is not None:
            limit = config.size_mb * 8e6 - rest
            if limit <= 0:
                raise ConfigError(
                    f"--size-mb is {config.size_mb:g}, but what is not quantized takes "
                    f"{megabytes(rest):.4g} already"
                )
            return cls(weights, bits, limit, SCALE_BITS, rest)
        return None

    @property
    def sizes(self) -> Table:
        """In bits, shape (L, B)."""
        return np.array([[w.size * b + self.per_scale * w.num_scales for b in self.bits]
                         for w in self.weights], dtype=float)  # fmt: skip

    def costs(self, of: Callable[[Weight, int], float]) -> Table:
        """Of every choice, shape (L, B)."""
        return np.array([[of(w, b) for b in self.bits] for w in self.weights])

    def allocated(self, costs: Table) -> dict[str, int]:
        """The bits by name that cost least."""
        chosen = allocate(costs, self.sizes, self.limit)
        return {w.name: self.bits[k] for w, k in zip(self.weights, chosen, strict=True)}

    def by_chance(self, generator: Generator) -> dict[str, int]:
        """An allocation for weights whose worth is drawn, over two orders of magnitude or so."""
        worth = torch.randn(len(self.weights), generator=generator).mul(2).exp().tolist()
        by_name = {w.name: x * w.size for w, x in zip(self.weights, worth, strict=True)}
        return self.allocated(self.costs(lambda w, b: by_name[w.name] * 4.0**-b))

    def uniform(self) -> dict[str, int] | None:
        """The most bits that all may have alike; None where even the fewest are too many."""
        fitting = [b for k, b in enumerate(self.bits) if self.sizes[:, k].sum() <= self.limit]
        return {w.name: fitting[-1] for w in self.weights} if fitting else None

    def described(self, allocation: Mapping[str, int]) -> records.Figured:
        """The figures of an allocation."""
        number = sum(w.size for w in self.weights)
        bits = sum(w.size * allocation[w.name] for w in self.weights)
        scales = SCALE_BITS * sum(w.num_scales for w in self.weights)
        rises = [w.rises[allocation[w.name]] for w in self.weights]
        errors = [rise.stderr for rise in rises]
        known = [error for error in errors if error is not None]
        return {
            "allocation": dict(allocation),
            "average_bits": bits / number,
            "size_mb": megabytes(bits + scales + self.rest),
            "predicted_rise": {
                "value": sum(rise.value for rise in rises),
                "stderr": math.hypot(*known) if len(known) == len(errors) else None,
            },
        }

    def chosen(self) -> records.Chosen:
        """The allocation by traces, and which of its decisions hang on their errors."""
        costs = self.costs(lambda w, b: w.rises[b].value)
        allocation = self.allocated(costs)
        ends = [self._ends(w) for w in self.weights]
        others = flips(costs, self.sizes, self.limit, *zip(*ends, strict=True))
        return {
            **self.described(allocation),
            "flips": {
                w.name: [self.bits[k] for k in own]
                for w, own in zip(self.weights, others, strict=True)
                if own
            },
        }

    @staticmethod
    def _ends(weight: Weight) -> tuple[float, float]:
        """The ends of the trace's 95 % interval over the trace."""
        trace = weight.trace
        if not trace.stderr or trace.value <= 0:
            return 1.0, 1.0
        half = t_quantile(0.975, trace.degrees) * trace.stderr / trace.value
        return 1 - half, 1 + half
