"""Linear stability of training near a minimum, from the eigenvalues of the Hessian.

Gradient descent with step size eta multiplies the distance along an eigenvector by 1 - eta lambda
each step, and contracts where 0 < lambda < 2 / eta. With heavy-ball momentum beta the bound is

    lambda < 2 (1 + beta) / eta,   with Nesterov's 2 (1 + beta) / (eta (1 + 2 beta)).

Weight decay adds to every eigenvalue. Gradient flow, dw/dt = -H w, is unstable where lambda < 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def threshold(lr: float, momentum: float = 0.0, *, nesterov: bool = False) -> float:
    """The eigenvalue above which a step of SGD no longer contracts.

    Args:
        lr: eta > 0.
        momentum: beta in [0, 1).
        nesterov: Whether the momentum is Nesterov's.
    """
    bound = 2 * (1 + momentum) / lr
    return bound / (1 + 2 * momentum) if nesterov else bound


def stability(
    largest: Sequence[float],
    *,
    smallest: float,
    negative_share: float,
    size: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
) -> dict[str, Any]:
    """The report: discrete steps of SGD, and gradient flow.

    Args:
        largest: The k largest eigenvalues, descending.
        smallest: The smallest.
        negative_share: The estimated share of eigenvalues below -weight_decay.
        size: The number of eigenvalues, P.
        lr: eta.
        momentum: beta of heavy-ball momentum.
        weight_decay: Added to every eigenvalue.
        nesterov: Whether the momentum is Nesterov's.

    Returns:
        Time constants are of gradient flow, 1 / lambda; over eta they are steps of plain gradient
        descent. The slowest is null where an eigenvalue is not positive: that mode never decays.
    """
    bound = threshold(lr, momentum, nesterov=nesterov)
    top, bottom = largest[0] + weight_decay, smallest + weight_decay
    above = sum(value + weight_decay > bound for value in largest)
    return {
        "lr": lr,
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "threshold": bound,
        "largest_over_threshold": top / bound,
        "num_unstable": above,
        "num_unstable_is_lower_bound": above == len(largest) < size,
        "largest_stable_lr": bound * lr / top if top > 0 else None,
        "flow_unstable_directions": round(negative_share * size) if bottom < 0 else 0,
        "fastest_time_constant": 1 / top if top > 0 else None,
        "slowest_time_constant": 1 / bottom if bottom > 0 else None,
    }


def sentence(report: dict[str, Any]) -> str:
    """The report in one plain sentence."""
    ratio = report["largest_over_threshold"]
    kind = "Nesterov momentum" if report["nesterov"] else "momentum"
    setting = f"a learning rate of {report['lr']:g} and {kind} {report['momentum']:g}"
    if report["largest_stable_lr"] is None:
        return f"No eigenvalue is positive here: no step size is too large, {setting} neither."
    limit = f"the largest stable learning rate is {report['largest_stable_lr']:.3g}"
    if ratio <= 1:
        return (
            f"With {setting} gradient descent is linearly stable here: the largest eigenvalue is "
            f"{ratio:.3g} of the threshold {report['threshold']:.4g}; {limit}."
        )
    count = f"{report['num_unstable']}{' or more' if report['num_unstable_is_lower_bound'] else ''}"
    return (
        f"With {setting} gradient descent is not linearly stable here: {count} directions lie "
        f"above the threshold {report['threshold']:.4g}, the largest eigenvalue {ratio:.3g} times "
        f"it; {limit}."
    )
