"""Derivatives along a direction by finite differences, as a truth to check others by.

Steps of several sizes are tried: a large one may cross a kink of the network, a small one drowns
in rounding. A right value agrees with one of them, a wrong one with none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

STEPS = (1e-3, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)


def slopes(along: Callable[[float], float], steps: Sequence[float] = STEPS) -> list[float]:
    """df/dt at 0 by central differences, for every step; f in float64."""
    return [(along(h) - along(-h)) / (2 * h) for h in steps]


def mixed(along: Callable[[float, float], float], steps: Sequence[float] = STEPS) -> list[float]:
    """d2f/dt ds at 0 by central differences, for every step."""
    return [
        (along(h, h) - along(-h, h) - along(h, -h) + along(-h, -h)) / (4 * h * h) for h in steps
    ]
