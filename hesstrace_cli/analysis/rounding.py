"""Losses measured with rounded weights, beside what was predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from hesstrace_cli import records
from hesstrace_cli.analysis.budget import Budget, Weight
from hesstrace_cli.analysis.evaluation import evaluate
from hesstrace_cli.analysis.quantization import Groups, Scaling, quantize
from hesstrace_cli.config import SensitivityConfig
from hesstrace_cli.data import Split
from hesstrace_cli.randomness import stream_generator

_RANDOM = 10

Say = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """Measures losses with rounded weights."""

    model: nn.Module
    split: Split
    config: SensitivityConfig
    groups: Groups
    weights: Sequence[Weight]
    loss: float
    say: Say

    def measured(self, budget: Budget | None) -> records.Measured:
        """The rise with each weight alone, and with whole allocations by several rules."""
        alone: list[records.Alone] = []
        for weight in self.weights:
            self.say(f"measuring {weight.name}")
            for b in sorted(self.config.bits):
                rise = weight.rises[b]
                alone.append({
                    "name": weight.name, "bits": b, "rise": self._rise({weight.name: b}),
                    "predicted": rise.value, "stderr": rise.stderr, "slope": weight.slopes[b],
                    "large": weight.is_large(b),
                })  # fmt: skip
        return {
            "alone": alone,
            "by_bits": [self._by_bits(alone, b) for b in sorted(self.config.bits)],
            "allocations": [] if budget is None else list(self._allocations(budget)),
        }

    @staticmethod
    def _by_bits(alone: Sequence[records.Alone], bits: int) -> records.ByBits:
        """How prediction and measurement go together over the weights."""
        own = [row for row in alone if row["bits"] == bits]
        pairs = [(r, rise) for r in own if (rise := r["rise"]) is not None]
        measured = [rise for _, rise in pairs]
        inside = [
            abs(rise - r["predicted"]) <= 1.96 * error
            for r, rise in pairs
            if (error := r["stderr"]) is not None
        ]
        return {
            "bits": bits,
            "rank_correlation": _correlation([r["predicted"] for r, _ in pairs], measured),
            "rank_correlation_with_slope": _correlation(
                [r["predicted"] + r["slope"] for r, _ in pairs], measured
            ),
            "within_interval": sum(inside) / len(inside) if inside else None,
            "num_large": sum(r["large"] for r in own),
        }

    def _allocations(self, budget: Budget) -> Iterator[records.Allocation]:
        """By traces, and of the same size by other rules."""
        uniform = budget.uniform()
        rules: list[tuple[str, dict[str, int] | None]] = [
            ("trace", budget.allocated(budget.costs(lambda w, b: w.rises[b].value))),
            (
                "trace and slope",
                budget.allocated(budget.costs(lambda w, b: w.rises[b].value + w.slopes[b])),
            ),
            ("uniform", uniform),
            ("size", budget.allocated(budget.costs(lambda _, b: 4.0**-b))),
            ("magnitude", budget.allocated(budget.costs(lambda w, b: w.errors[b]))),
        ]
        for rule, allocation in rules:
            if allocation is not None:
                self.say(f"measuring the allocation by {rule}")
                described = budget.described(allocation)
                yield cast(
                    records.Allocation,
                    {"rule": rule, **described, "rise": self._rise(allocation), "spread": None},
                )
        generator = stream_generator(self.config.seed, torch.device("cpu"), "quantization", 1)
        rises = [self._rise(budget.by_chance(generator)) for _ in range(_RANDOM)]
        known = [rise for rise in rises if rise is not None]
        yield {
            "rule": f"random, mean of {_RANDOM}", "allocation": None, "average_bits": None,
            "size_mb": None, "predicted_rise": None,
            "rise": float(np.mean(known)) if len(known) == len(rises) else None,
            "spread": [min(known), max(known)] if known else None,
        }  # fmt: skip

    def _rise(self, bits: Mapping[str, int]) -> float | None:
        """L with these weights rounded, less L; None where it is not finite."""
        scaling = cast(Scaling, self.config.scale)
        values = {w.name: w.value for w in self.weights}
        rounded = {n: quantize(values[n], b, self.groups, scaling) for n, b in bits.items()}
        with replaced(self.model, rounded):
            rise = evaluate(self.model, self.split, self.config.batch_size).loss - self.loss
        return rise if math.isfinite(rise) else None


def _correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's; None of fewer than three, or where all are alike."""
    if len(measured) < 3 or len(set(predicted)) == 1 or len(set(measured)) == 1:
        return None
    return float(spearmanr(predicted, measured).statistic)


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in some parameters, and in all that share their memory; back afterwards."""
    params = dict(model.named_parameters())
    before = {name: params[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            params[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                params[name].copy_(value)
