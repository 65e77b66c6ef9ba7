"""Linear stability of training near a minimum, from the eigenvalues of the Hessian.

Gradient descent with step size eta multiplies the distance along an eigenvector by 1 - eta lambda
each step, and contracts where 0 < lambda < 2 / eta: directions of negative curvature are left at
every step size. With heavy-ball momentum beta the bound is

    lambda < 2 (1 + beta) / eta,   with Nesterov's 2 (1 + beta) / (eta (1 + 2 beta)).

Weight decay adds to every eigenvalue. Gradient flow, dw/dt = -H w, is unstable where lambda < 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from hesstrace_cli import records
from hesstrace_cli.curvature.spectrum.density import Share


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
    smallest_residual: float,
    negative: Share,
    size: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
) -> records.StabilityFigures:
    """The report: discrete steps of SGD, and gradient flow.

    Args:
        largest: The k largest eigenvalues, descending.
        smallest: The smallest.
        smallest_residual: The distance within which it lies; closer to 0 it counts as 0.
        negative: The share of eigenvalues below -weight_decay.
        size: The number of eigenvalues, P.
        lr: eta.
        momentum: beta of heavy-ball momentum.
        weight_decay: Added to every eigenvalue.
        nesterov: Whether the momentum is Nesterov's.

    Returns:
        `num_unstable` counts the directions above the threshold; those of negative curvature,
        which gradient flow leaves too, are in `flow_unstable_directions`. Time constants are of
        gradient flow, 1 / lambda; over eta they are steps of plain gradient descent. The slowest
        is null where an eigenvalue is not positive: that mode never decays.
    """
    bound = threshold(lr, momentum, nesterov=nesterov)
    top = largest[0] + weight_decay
    bottom = weight_decay + (smallest if abs(smallest) > smallest_residual else 0.0)
    above = sum(value + weight_decay > bound for value in largest)
    leaving = [round(s * size) for s in (negative.value, negative.low, negative.high)]
    leaving = (
        [max(1, leaving[0]), max(1, leaving[1]), max(1, leaving[2])] if bottom < 0 else [0] * 3
    )
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
        "linearly_stable": above == 0 and bottom >= 0,
        "flow_unstable_directions": leaving[0],
        "flow_unstable_bounds": leaving[1:],
        "fastest_time_constant": 1 / top if top > 0 else None,
        "slowest_time_constant": 1 / bottom if bottom > 0 else None,
    }


def sentence(report: records.StabilityFigures, matrix: str = "Hessian", rate: str = "a") -> str:
    """The report in plain words.

    Args:
        report: Of `stability`.
        matrix: Whose eigenvalues they are.
        rate: What stands before "learning rate".
    """
    kind = "Nesterov momentum" if report["nesterov"] else "momentum"
    setting = f"With {rate} learning rate of {report['lr']:g} and {kind} {report['momentum']:g}"
    if report["weight_decay"]:
        setting += f", weight decay {report['weight_decay']:g} added to every eigenvalue,"
    ratio, bound = report["largest_over_threshold"], f"the threshold {report['threshold']:.4g}"
    low, high = report["flow_unstable_bounds"]
    leaving = (
        f"along about {report['flow_unstable_directions']} directions of negative curvature "
        f"(between {low} and {high}) it moves away at every learning rate"
    )
    if report["largest_stable_lr"] is None:
        begin = f"{setting} no step overshoots: no eigenvalue of the {matrix} is positive"
        return f"{begin}; but {leaving}." if report["flow_unstable_directions"] else f"{begin}."
    limit = f"the largest learning rate without overshooting is {report['largest_stable_lr']:.3g}"
    if report["num_unstable"]:
        count = f"{report['num_unstable']}{' or more' * report['num_unstable_is_lower_bound']}"
        text = (
            f"{setting} gradient descent is not linearly stable here: {count} eigenvalue(s) of the "
            f"{matrix} lie above {bound}, the largest {ratio:.3g} times it; {limit}."
        )
        return f"{text} Besides, {leaving}." if report["flow_unstable_directions"] else text
    if report["flow_unstable_directions"]:
        return (
            f"{setting} no step overshoots here, the largest eigenvalue of the {matrix} being "
            f"{ratio:.3g} of {bound} ({limit}); but gradient descent is not linearly stable: "
            f"{leaving}."
        )
    return (
        f"{setting} gradient descent is linearly stable here: the largest eigenvalue of the "
        f"{matrix} is {ratio:.3g} of {bound}; {limit}."
    )
