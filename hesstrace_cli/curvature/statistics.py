"""Means over strata with honest errors: every batch is a stratum with its own trace."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from scipy.special import stdtrit
from torch import Tensor

from hesstrace_cli.curvature.probes import EVERYTHING, Inclusion


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error.

    Attributes:
        value: The estimate.
        stderr: Its standard error; 0 where it is exact, None where it is not known.
        degrees: Degrees of freedom that its interval takes.
    """

    value: float
    stderr: float | None
    degrees: float = math.inf

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """The two-sided t-interval; None where the standard error is not known."""
        if self.stderr is None:
            return None
        half = 0.0 if self.stderr == 0 else self.stderr * t_quantile(0.5 + level / 2, self.degrees)
        return self.value - half, self.value + half


def t_quantile(probability: float, degrees: float) -> float:
    """The quantile of Student's t distribution."""
    return float(stdtrit(degrees, probability))


COUNTED = 0.5
"""Of the degrees of freedom of a spread, those that count.

Quadratic forms in random signs are no normal variables: they are skewed, and low where their
spread is low. With half of the degrees the intervals of few samples hold the truth in 95 of 100
cases, with all of them in 92 (`benchmarks/coverage.py`); of many samples they are the same.
"""


def means(samples: Tensor) -> list[Mean]:
    """The means and standard errors of the columns of independent samples, shape (n, K)."""
    n = len(samples)
    values = samples.mean(0).tolist()
    errors = (samples.std(0) / math.sqrt(n)).tolist() if n > 1 else [None] * len(values)
    return [Mean(v, e, COUNTED * (n - 1)) for v, e in zip(values, errors, strict=True)]


@dataclass
class Stratum:
    """Running count, mean and sum of squared deviations of samples of one shape (Welford)."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, sample: Tensor) -> None:
        """Add one sample."""
        self.count += 1
        delta = sample - self.mean
        self.mean = self.mean + delta / self.count
        self.squares = self.squares + delta * (sample - self.mean)


@dataclass
class StratifiedMean:
    """The sum of weighted stratum means, sum_b w_b mean_b, for vectors of K quantities.

    The first quantity is the whole, the others are its parts.

    Its variance is sum_b w_b^2 s_b^2 / n_b, with s_b^2 the variance *within* stratum b: the
    differences between the strata are no error, as every stratum is in every pass. A batch is
    one stratum, or as many as it has examples, which then share its weight.

    Attributes:
        exact: Whether a sample has no error, so that one a stratum is enough.
        inclusion: With which probability a sample includes each weight. Samples without the
            heaviest ones have little spread, so that no more than this share of the degrees of
            freedom (Welch and Satterthwaite) counts, nor more than `COUNTED`. Where it includes or
            leaves out whole tensors, the spread of one is that of how often it was included: its
            error is known once it was both, and its degrees are those of the fewer of the two.
    """

    exact: bool = False
    inclusion: Inclusion = EVERYTHING
    batches: dict[int, Stratum] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)
    included: Tensor | float = 0.0
    count: int = 0

    def add(self, batch: int, share: float, samples: Tensor) -> None:
        """Add samples of one batch.

        Args:
            batch: Its number.
            share: Of the whole.
            samples: Shape (n, E, K): n samples of the K quantities for each of its E strata.
        """
        self.weights[batch] = share / samples.shape[1]
        self.included = self.included + (samples != 0).sum((0, 1)).cpu()
        self.count += samples.shape[0] * samples.shape[1]
        running = self.batches.setdefault(batch, Stratum())
        for sample in samples.detach().to("cpu", torch.float64):
            running.add(sample)

    def means(self) -> list[Mean]:
        """The K means; their errors are unknown while a stratum has a single sample."""
        parts = [(self.weights[b], s) for b, s in self.batches.items()]
        values = torch.stack([w * torch.as_tensor(s.mean).sum(0) for w, s in parts]).sum(0)
        if self.exact:
            return [Mean(value, 0.0) for value in values.tolist()]
        if any(s.count < 2 for _, s in parts):
            return [Mean(value, None) for value in values.tolist()]
        variance, quartic = torch.zeros_like(values), torch.zeros_like(values)
        for w, s in parts:
            part = w**2 * torch.as_tensor(s.squares) / (s.count * (s.count - 1))
            variance += part.sum(0)
            quartic += part.square().sum(0) / (s.count - 1)
        degrees = torch.where(quartic > 0, variance.square() / quartic, math.inf)
        degrees *= min(COUNTED, self.inclusion.probability)
        errors: list[float | None] = variance.sqrt().tolist()
        if self.inclusion.of_tensors:
            included = torch.as_tensor(self.included)
            fewer = torch.minimum(included, self.count - included)[1:] - 1
            degrees[1:] = torch.minimum(degrees[1:], COUNTED * fewer)
            errors = errors[:1] + [
                error if known else None
                for error, known in zip(errors[1:], (fewer > 0).tolist(), strict=True)
            ]
        return [
            Mean(value, error, df)
            for value, error, df in zip(values.tolist(), errors, degrees.tolist(), strict=True)
        ]

    def subset_stderr(self, population: int, size: int) -> float | None:
        """The error of the first mean as that of a population, its strata a random subset of it.

        It comes from the spread between the strata, less what their own errors add to that.

        Args:
            population: The number of examples in the population.
            size: The number of examples in all strata together.

        Returns:
            The standard error; 0 where the subset is the whole; None where it cannot be told.
        """
        if size >= population:
            return 0.0
        means = [torch.as_tensor(s.mean)[:, 0] for s in self.batches.values()]
        w = torch.cat([
            torch.full_like(m, self.weights[b]) for b, m in zip(self.batches, means, strict=True)
        ])  # fmt: skip
        m = torch.cat(means)
        if len(m) < 2 or not (self.exact or all(s.count > 1 for s in self.batches.values())):
            return None
        concentration = w.square().sum() / w.sum() ** 2  # 1 / (number of strata) where equal
        spread = (w * (m - (w * m).sum() / w.sum()).square()).sum() / w.sum()
        between = spread / (1 - concentration)
        if not self.exact:
            own = torch.cat([
                torch.as_tensor(s.squares)[:, 0] / (s.count * (s.count - 1))
                for s in self.batches.values()
            ])  # fmt: skip
            between = between - (w * own).sum() / w.sum()
        if between <= 0:  # lost in the noise of the strata, which does not make it 0
            return None
        return math.sqrt(between * concentration * (1 - size / population))
