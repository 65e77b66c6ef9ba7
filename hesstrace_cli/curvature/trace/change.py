"""How much of a change of tr(G) is of the curvature in the outputs, and how much of the Jacobian.

With A and J taken at the weights before (0) or after (1),

    T(a, j) = (1/M) sum_m tr(J_m(w_j)^T A_m(w_a) J_m(w_j)),

log T(1, 1) / T(0, 0) is the sum of two parts, each the mean over both orders of changing A and J:

    of A   (1/2) [log T(1, 0) / T(0, 0)  +  log T(1, 1) / T(0, 1)]
    of J   (1/2) [log T(0, 1) / T(0, 0)  +  log T(1, 1) / T(1, 0)]

Source:
    Shapley, "A value for n-person games", 1953, of two players.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.calls import native_outputs
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.trace.exact import PerExampleTrace

_LOOKED_AT = 4  # examples, to see whether they touch each other


@dataclass(frozen=True)
class Change:
    """A change of tr(G) in two parts.

    Attributes:
        before: T(0, 0).
        after: T(1, 1).
        with_curvature_after: T(1, 0), A after and J before.
        with_jacobian_after: T(0, 1).
        of_curvature: A's part of log T(1, 1) / T(0, 0).
        of_jacobian: J's.
        of_curvature_stderr: The former's standard error, from the signs.
        of_jacobian_stderr: The latter's.
    """

    before: float
    after: float
    with_curvature_after: float
    with_jacobian_after: float
    of_curvature: float
    of_jacobian: float
    of_curvature_stderr: float
    of_jacobian_stderr: float


def trace_change(before: DataLoss, after: DataLoss, *, num_probes: int, seed: int) -> Change | None:
    """Take a change of tr(G) apart.

    Args:
        before: The loss over some examples with the model as it was, in eval mode.
        after: The same with the model as it is.
        num_probes: Signs for every example, the same in all four traces; 2 or more.
        seed: Of the signs.

    Returns:
        The parts; None where a trace is not above 0.

    Raises:
        Unfit: If examples touch each other in the model.
    """
    losses = (before, after)
    traces = torch.stack([
        torch.stack([_samples(losses[a], losses[j], num_probes, seed) for j in range(2)])
        for a in range(2)
    ])  # fmt: skip
    means = traces.mean(2)
    if not bool((means > 0).all()):
        return None
    parts = _parts(means)
    spreads = _parts(traces.clamp(min=1e-9 * means.min())).std(-1) / math.sqrt(num_probes)
    return Change(
        means[0, 0].item(), means[1, 1].item(), means[1, 0].item(), means[0, 1].item(),
        *parts.tolist(), *spreads.tolist(),
    )  # fmt: skip


def _parts(traces: Tensor) -> Tensor:
    """A's and J's, (2, ...), of T(a, j), (2, 2, ...)."""
    L = traces.log()
    of_curvature = (L[1, 0] - L[0, 0] + L[1, 1] - L[0, 1]) / 2
    of_jacobian = (L[0, 1] - L[0, 0] + L[1, 1] - L[1, 0]) / 2
    return torch.stack([of_curvature, of_jacobian])


def _samples(curved: DataLoss, data: DataLoss, num_probes: int, seed: int) -> Tensor:
    """T with A of one model and J of another, (num_probes,)."""
    model, total = curved.objective.model, torch.zeros(num_probes, dtype=torch.float64)

    @torch.no_grad()
    def outputs(X: Tensor) -> Tensor:
        return native_outputs(model, X)

    X, _ = next(iter(data.batches()))
    traces = PerExampleTrace(data.objective, X[:_LOOKED_AT], curved=outputs)
    generator = Generator(X.device).manual_seed(seed)
    for batch in data:
        samples = traces.sample(batch.X, batch.y, num_probes, generator)
        total += samples.sum((1, 2)).cpu() / data.num_terms
    return total
