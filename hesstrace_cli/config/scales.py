"""On which scale a regularizer's strengths are evenly apart, for a search among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


def _three(value: float) -> float:
    return float(f"{value:.3g}")


@dataclass(frozen=True)
class Scale:
    """Places of strengths, which are apart as their logarithms are.

    Attributes:
        place: Of a strength.
        strength: At about a place, of few digits.
    """

    place: Callable[[float], float]
    strength: Callable[[float], float]

    def distance(self, strength: float, other: float) -> float:
        """Between two strengths."""
        return abs(math.log(self.place(strength) / self.place(other)))

    def middle(self, low: float, high: float) -> float:
        """The strength halfway between two."""
        return self.strength(math.sqrt(self.place(low) * self.place(high)))


def _decay(steps: float) -> float:
    """The decay a step of a mean that is of about so many steps."""
    return 1 - float(f"{1 / max(_three(steps), 1.25):.5g}")


SCALES = {
    "log": Scale(float, _three),
    "whole": Scale(float, lambda place: float(max(1, round(place)))),
    "decay": Scale(lambda decay: _three(1 / (1 - decay)), _decay),
}
