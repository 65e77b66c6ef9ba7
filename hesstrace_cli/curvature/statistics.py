"""Means over strata with honest errors: every batch is a stratum with its own trace."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from scipy.special import stdtrit
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error.

    Attributes:
        value: The estimate.
        stderr: Its standard error; 0 where it is exact, None where it is not known.
        degrees: Degrees of freedom of the standard error (Welch and Satterthwaite).
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


@dataclass
class Stratum:
    """Running count, mean and sum of squared deviations of vector samples (Welford)."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, sample: Tensor) -> None:
        """Add one sample of shape (K,)."""
        self.count += 1
        delta = sample - self.mean
        self.mean = self.mean + delta / self.count
        self.squares = self.squares + delta * (sample - self.mean)


@dataclass
class StratifiedMean:
    """The sum of weighted stratum means, sum_b w_b mean_b, for vectors of K quantities.

    Its variance is sum_b w_b^2 s_b^2 / n_b, with s_b^2 the variance *within* stratum b: the
    differences between the strata are no error, as every stratum is in every pass.
    """

    strata: dict[int, Stratum] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)

    def add(self, stratum: int, weight: float, samples: Tensor) -> None:
        """Add samples of one stratum.

        Args:
            stratum: Its number.
            weight: w_b, its share of the whole.
            samples: Shape (n, K).
        """
        self.weights[stratum] = weight
        running = self.strata.setdefault(stratum, Stratum())
        for sample in samples.detach().to("cpu", torch.float64):
            running.add(sample)

    def means(self) -> list[Mean]:
        """The K means; their errors are unknown while a stratum has a single sample."""
        values: Tensor | float = 0.0
        variance: Tensor | float = 0.0
        quartic: Tensor | float = 0.0
        known = all(s.count > 1 for s in self.strata.values())
        for number, s in self.strata.items():
            values = values + self.weights[number] * s.mean
            if known:
                part = self.weights[number] ** 2 * s.squares / (s.count * (s.count - 1))
                variance = variance + part
                quartic = quartic + part * part / (s.count - 1)
        value_list = torch.as_tensor(values).tolist()
        if not known:
            return [Mean(value, None) for value in value_list]
        variance, quartic = torch.as_tensor(variance), torch.as_tensor(quartic)
        degrees = torch.where(quartic > 0, variance.square() / quartic, math.inf)
        return [
            Mean(value, math.sqrt(var), df)
            for value, var, df in zip(value_list, variance.tolist(), degrees.tolist(), strict=True)
        ]
