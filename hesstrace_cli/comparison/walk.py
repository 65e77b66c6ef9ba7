"""Which strength a search tries next: its first, that one's neighbours, then on where it is better.

An Optuna sampler, so that the study asks it as it would ask TPE. What it gives depends on the
study's trials alone: a search that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

_UP = 10**0.25  # a quarter of a decade
_DOWN = 2  # such steps at once


def next_strengths(
    tried: Mapping[float, float], bounds: tuple[float, float], start: float
) -> list[float]:
    """Strengths worth trying next, the first of them most; of three digits, none tried before.

    From the best one outwards where no farther one was tried, down before up; then halfway, in the
    logarithm, between the best and its neighbours, the better of these first. Steps down are half a
    decade, steps up a quarter: a strength too weak costs little, one too strong all.

    Args:
        tried: Losses by strength; infinite where the run diverged.
        bounds: The least and the largest strength.
        start: The first one; of equal losses the nearest to it counts as the best.
    """
    if not tried:
        return [start]
    low, high = bounds
    step = min(_UP, (high / low) ** 0.125)
    order = sorted(tried)
    best = order[0]  # where all diverged, only smaller ones may not
    if min(tried.values()) < math.inf:
        best = min(tried, key=lambda s: (tried[s], distance(s, start)))
    exponent = round(math.log(best / start) / math.log(step), 2)  # best may have been rounded
    outwards = [start * step ** (exponent - _DOWN)] if best == order[0] else []
    if best == order[-1] and tried[best] < math.inf:
        outwards.append(start * step ** (exponent + 1))
    gaps = sorted(pairwise(order), key=lambda gap: sorted(tried[s] for s in gap))
    found = [*outwards, *(math.sqrt(a * b) for a, b in gaps)]
    rounded = [min(max(float(f"{strength:.3g}"), low), high) for strength in found]
    return [strength for strength in dict.fromkeys(rounded) if strength not in tried]


def distance(strength: float, start: float) -> float:
    """Between two strengths, in the logarithm."""
    return abs(math.log(strength / start))


class Walk(BaseSampler):
    """Suggests the next strength that no trial has.

    Args:
        bounds: The least and the largest strength.
        start: The first one.
    """

    def __init__(self, bounds: tuple[float, float], start: float) -> None:
        self._bounds, self._start = bounds, start

    def infer_relative_search_space(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        """Nothing: there is one parameter."""
        return {}

    def sample_relative(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        """Nothing."""
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,  # noqa: ARG002
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> float:
        """The first of the next strengths that no trial is at work on."""
        others = [t for t in study.get_trials(deepcopy=False) if param_name in t.params]
        tried = {t.params[param_name]: _loss(t) for t in others if t.state.is_finished()}
        running = [t.params[param_name] for t in others if not t.state.is_finished()]
        found = next_strengths(tried, self._bounds, self._start)
        # A narrow range may have no more that differ in three digits: one that is known.
        return next((s for s in found if s not in running), next(iter(found or tried), self._start))


def _loss(trial: FrozenTrial) -> float:
    if trial.state != TrialState.COMPLETE or trial.value is None:
        return math.inf
    return trial.value
