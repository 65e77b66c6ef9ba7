"""How the loss rises around a point: on average, in the worst direction, and along slices.

A displacement d is at distance rho in one of two ways:

    plain:   |d| = rho, the Euclidean norm over all parameters;
    filter:  |d_f| = rho |w_f| for every filter (row of a tensor of two or more dimensions);
             biases and norm parameters stay. Rescaling the layers of a ReLU network, which leaves
             its function as it is, leaves this sharpness as it is.

Source:
    Li, Xu, Taylor, Studer, Goldstein, "Visualizing the loss landscape of neural nets", NeurIPS
    2018 (filter-normalized directions, slices); Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-aware
    minimization", ICLR 2021 (worst direction; one step of the ascent is theirs).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.calls import native_outputs
from hesstrace_cli.autodiff.graph import Params, gradient
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.statistics import Mean, means


class Landscape:
    """The mean loss over a whole data set, at parameters displaced from w.

    Args:
        data: The loss, in the model's own mode.
    """

    def __init__(self, data: DataLoss) -> None:
        self.data = data
        self.objective = data.objective

    def loss(self, displacement: Params) -> Tensor:
        """L(w + d), 0-dim and in float64; infinite or NaN where it overflows."""
        with torch.no_grad():
            return self._sum(self._moved(displacement), None)

    def gradient(self, displacement: Params) -> tuple[Tensor, dict[str, Tensor]]:
        """L(w + d) and its gradient."""
        params = {n: p.detach().requires_grad_() for n, p in self._moved(displacement).items()}
        total = {n: torch.zeros_like(p) for n, p in params.items()}
        return self._sum(params, total), total

    def _moved(self, displacement: Params) -> dict[str, Tensor]:
        params = self.objective.params
        return {n: p.detach() + displacement[n] if n in displacement else p.detach()
                for n, p in params.items()}  # fmt: skip

    def _sum(self, params: Params, total: dict[str, Tensor] | None) -> Tensor:
        device = next(iter(params.values())).device
        value = torch.zeros((), dtype=torch.float64, device=device)
        objective = self.objective
        for batch in self.data:
            outputs = native_outputs(objective.model, batch.X, params)
            loss = objective.task.loss(outputs, batch.y)
            value += batch.share * loss.detach().double()
            if total is not None:
                for name, grad in gradient(loss, params).items():
                    total[name] += batch.share * grad
        return value


def at_distance_one(
    direction: Params, params: Params, *, normalized: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The displacement in a direction, at distance 1 from w.

    Args:
        direction: A tensor for each parameter, which need not be normalized.
        params: w.
        normalized: Whether by filter.

    Returns:
        The displacement, and whether the direction has a length, and one that is finite: 0-dim.
    """
    if not normalized:
        squares = [t.double().square().sum() for t in direction.values()]
        size = functools.reduce(torch.add, squares).sqrt()
        return _times(direction, 1 / size), size.isfinite() & (size > 0)
    moved = {
        n: direction[n]
        * (
            _filter_norm(p.detach())
            / _filter_norm(direction[n]).clamp(min=torch.finfo(p.dtype).tiny)
        )
        for n, p in params.items()
        if p.dim() > 1
    }
    device = next(iter(params.values())).device
    finite, nonzero = torch.ones((), device=device).bool(), torch.zeros((), device=device).bool()
    for t in moved.values():
        finite, nonzero = finite & t.isfinite().all(), nonzero | t.any()
    return moved, finite & nonzero


def _filter_norm(tensor: Tensor) -> Tensor:
    """The norm over all but the first dimension, shape (F, 1, ...)."""
    norm = tensor.flatten(1).norm(dim=1)
    return norm.view(-1, *[1] * (tensor.dim() - 1))


def random_direction(
    params: Params, *, normalized: bool, generator: Generator
) -> dict[str, Tensor]:
    """A random displacement at distance 1; the random numbers do not depend on the weights.

    Args:
        params: w.
        normalized: Whether by filter.
        generator: Source of all randomness.

    Returns:
        By name; without those that have no filters, 0 where these are.
    """
    draws = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        for n, p in params.items()
    }
    return at_distance_one(draws, params, normalized=normalized)[0]


def average_sharpness(
    landscape: Landscape, *, radius: float, normalized: bool, num_directions: int,
    generator: Generator,
) -> Mean:  # fmt: skip
    """E[(L(w + d) + L(w - d)) / 2] - L(w) over random d at distance rho, with its error.

    For small rho and plain distance this is rho^2 tr(H) / (2 P).

    Args:
        landscape: L around w.
        radius: rho.
        normalized: Whether by filter.
        num_directions: At least 1; 2 give an error.
        generator: Source of all randomness.
    """
    params = landscape.objective.params
    here, rises = landscape.loss({}), []
    for _ in range(num_directions):
        d = random_direction(params, normalized=normalized, generator=generator)
        ends = [landscape.loss(_times(d, sign * radius)) for sign in (1, -1)]
        rises.append((ends[0] + ends[1]) / 2 - here)
    return means(torch.stack(rises).cpu()[:, None])[0]


def worst_sharpness(
    landscape: Landscape, *, radius: float, normalized: bool, steps: int, generator: Generator
) -> float:
    """The largest L(w + d) - L(w) found at distance rho: a lower bound of the maximum.

    Each step goes to the point at distance rho in the direction of the gradient at w + d. That
    raises a convex loss at every step, and with the plain distance on a quadratic it is the power
    method.

    Args:
        landscape: L around w.
        radius: rho.
        normalized: Whether by filter.
        steps: Gradients taken.
        generator: Source of the random start.
    """
    params = landscape.objective.params
    here, highest, goes_on = landscape.loss({}).item(), -math.inf, True
    d = random_direction(params, normalized=normalized, generator=generator)
    for _ in range(steps):
        reached, grad = landscape.gradient(_times(d, radius))
        d, has_length = at_distance_one(grad, params, normalized=normalized)
        height, goes_on = torch.stack([reached, has_length.double()]).tolist()  # one wait
        if not math.isfinite(height):
            return math.inf
        highest = max(highest, height)
        if not goes_on:
            break
    last = landscape.loss(_times(d, radius)).item() if goes_on else here
    return max(highest, last) - here


def slice_losses(
    landscape: Landscape, directions: Sequence[Params], grid: Sequence[float]
) -> list[float] | list[list[float]]:
    """L(w + a d) for a in the grid, or L(w + a d_1 + b d_2), rows by a and columns by b."""
    if len(directions) == 1:
        line = [landscape.loss(_times(directions[0], a)) for a in grid]
        losses: list[float] = torch.stack(line).tolist()
        return losses
    first, second = directions
    rows = [
        torch.stack([landscape.loss({n: a * first[n] + b * second[n] for n in first})
                     for b in grid])
        for a in grid
    ]  # fmt: skip
    plane: list[list[float]] = torch.stack(rows).tolist()
    return plane


def _times(tensors: Params, factor: float | Tensor) -> dict[str, Tensor]:
    return {n: factor * t for n, t in tensors.items()}
