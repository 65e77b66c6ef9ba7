"""Bits for every weight under a budget: the integer program, solved whole by a library.

minimize sum_l cost[l, b_l]   subject to   sum_l size[l, b_l] <= budget
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from hesstrace_cli.errors import ConfigError, NumericsError

Table = NDArray[np.float64]


def allocate(costs: Table, sizes: Table, budget: float) -> list[int]:
    """The choice for every row whose costs sum to the least within the budget.

    Args:
        costs: Of each choice, shape (L, B); negative ones count as 0.
        sizes: Of each choice, shape (L, B).
        budget: Of all sizes together.

    Returns:
        The index of the choice for each of the L rows.

    Raises:
        ConfigError: If the smallest choices together are over the budget.
        NumericsError: If the solver finds no answer.
    """
    least = sizes.min(1).sum()
    if least > budget * (1 + 1e-12):
        raise ConfigError(
            f"the budget of {budget:.6g} bits is below {least:.6g}, the least that these weights "
            "take; give a larger one, or fewer --bits"
        )
    rows, choices = costs.shape
    costs = np.maximum(costs, 0.0)
    scale = costs.max() or 1.0
    one_each = np.kron(np.eye(rows), np.ones(choices))
    found = milp(
        (costs / scale).ravel(),
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes.ravel()[None] / budget, -np.inf, 1 + 1e-12),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise NumericsError(f"no allocation was found: {found.message}")
    return [int(k) for k in found.x.reshape(rows, choices).argmax(1)]


def flips(
    costs: Table, sizes: Table, budget: float, low: Sequence[float], high: Sequence[float]
) -> list[list[int]]:
    """The other choices that a row gets where its own costs alone are at an end of their interval.

    Args:
        costs: As for `allocate`.
        sizes: As for `allocate`.
        budget: As for `allocate`.
        low: By what each row's costs are multiplied at the lower end, from 0.
        high: The same at the upper end.

    Returns:
        For each row the choices that differ from that of `allocate`.
    """
    chosen = allocate(costs, sizes, budget)
    found = []
    for row, own in enumerate(chosen):
        others = []
        for factor in (low[row], high[row]):
            if factor == 1:
                continue
            moved = costs.copy()
            moved[row] *= max(0.0, factor)
            others.append(allocate(moved, sizes, budget)[row])
        found.append(sorted({other for other in others if other != own}))
    return found
