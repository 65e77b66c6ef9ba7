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

from hesstrace_cli.config import SCALES, Scale

_UP = 10**0.25  # a quarter of a decade
_DOWN = 2  # such steps at once


def next_strengths(
    tried: Mapping[float, float],
    bounds: tuple[float, float],
    start: float,
    scale: Scale = SCALES["log"],
) -> list[float]:
    """Strengths worth trying next, the first of them most; of few digits, none tried before.

    From the best one outwards where no farther one was tried, down before up; then halfway, in the
    logarithm, between the best and its neighbours, the better of these first. Steps down are half a
    decade, steps up a quarter: a strength too weak costs little, one too strong all.

    Args:
        tried: Losses by strength; infinite where the run diverged.
        bounds: The least and the largest strength.
        start: The first one; of equal losses the nearest to it counts as the best.
        scale: On which they are apart.
    """
    if not tried:
        return [start]
    places = {scale.place(strength): loss for strength, loss in tried.items()}
    low, high = map(scale.place, bounds)
    found = _next_places(places, (low, high), scale.place(start))
    if scale is SCALES["whole"]:  # a step may be less than one
        best = min(places, key=lambda place: places[place])
        found += sorted(range(int(low), int(high) + 1), key=lambda n: abs(n - best))
    strengths = [min(max(scale.strength(place), bounds[0]), bounds[1]) for place in found]
    return [strength for strength in dict.fromkeys(strengths) if strength not in tried]


def _next_places(
    tried: Mapping[float, float], bounds: tuple[float, float], start: float
) -> list[float]:
    low, high = bounds
    step = min(_UP, (high / low) ** 0.125)
    order = sorted(tried)
    best = order[0]  # where all diverged, only smaller ones may not
    if min(tried.values()) < math.inf:
        best = min(tried, key=lambda place: (tried[place], abs(math.log(place / start))))
    exponent = round(math.log(best / start) / math.log(step), 2)  # best may have been rounded
    outwards = [start * step ** (exponent - _DOWN)] if best == order[0] else []
    if best == order[-1] and tried[best] < math.inf:
        outwards.append(start * step ** (exponent + 1))
    gaps = sorted(pairwise(order), key=lambda gap: sorted(tried[s] for s in gap))
    return [*outwards, *(math.sqrt(a * b) for a, b in gaps)]


class Walk(BaseSampler):
    """Suggests the next strength that no trial has.

    Args:
        bounds: The least and the largest strength.
        start: The first one.
        scale: On which they are apart.
    """

    def __init__(
        self, bounds: tuple[float, float], start: float, scale: Scale = SCALES["log"]
    ) -> None:
        self._bounds, self._start, self._scale = bounds, start, scale

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
        found = next_strengths(tried, self._bounds, self._start, self._scale)
        # A narrow range may have no more that differ in a few digits: one that is known.
        return next((s for s in found if s not in running), next(iter(found or tried), self._start))


def _loss(trial: FrozenTrial) -> float:
    if trial.state != TrialState.COMPLETE or trial.value is None:
        return math.inf
    return trial.value
