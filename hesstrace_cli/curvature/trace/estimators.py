"""Estimators of tr(H) and tr(G) of a mean loss over a data set, with their standard errors.

Fresh probes are drawn for every batch b, of share M_b / M, and the samples v^T H_b v summed with
these shares: unbiased, and far less variable than one probe shared by all batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.graph import Params, check_graph, gradient
from hesstrace_cli.curvature.blame import naming_fault
from hesstrace_cli.curvature.data_loss import Batch, DataLoss
from hesstrace_cli.curvature.hessian import hvp
from hesstrace_cli.curvature.matrix import ggn_product
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import EVERYTHING, Inclusion, Scheme, draw_probe
from hesstrace_cli.curvature.statistics import Mean, StratifiedMean
from hesstrace_cli.curvature.trace.exact import PerExampleTrace, hessian_diagonal_traces
from hesstrace_cli.errors import NumericsError

Sampler = Callable[[Batch, int, Generator], Tensor]
"""From a batch, m and a generator to m samples of T blocks' traces for E strata, (m, E, T)."""

MIN_DEGREES = 6.0
"""A stopping rule looks at an interval only once this many degrees of freedom of it count."""

CHOSEN = 0.6
"""Of the degrees of freedom of an interval that was waited for, those that count.

It is looked at pass after pass, and taken the first time that it is short: when the spread of the
samples happens to be low for their number. With all of them such intervals hold the truth in 94 of
100 cases, with three fifths in 95 (`benchmarks/coverage.py`).
"""


@dataclass(frozen=True)
class Stop:
    """When to stop drawing probes.

    Attributes:
        rtol: Half-width of the 95 % interval over the trace; None for one pass.
        atol: Or its half-width; the larger bound holds.
        max_passes: Passes over the data at most.
        max_seconds: No new pass begins after this time.
    """

    rtol: float | None
    atol: float = 0.0
    max_passes: int = 100
    max_seconds: float = float("inf")

    def judged(self, means: Sequence[Mean]) -> list[Mean]:
        """The means with the degrees of freedom that count where the rule waits for an interval."""
        if not self.rtol and not self.atol:
            return list(means)
        return [replace(mean, degrees=CHOSEN * mean.degrees) for mean in means]

    def reached(
        self, total: Mean, passes: int, seconds: float, min_degrees: float = MIN_DEGREES
    ) -> bool:
        """Whether the estimate after these passes, as `judged`, is good enough, or has to be."""
        if self.rtol is None or passes >= self.max_passes or seconds >= self.max_seconds:
            return True
        interval = total.interval()
        if interval is None or total.degrees < min_degrees:
            return False
        half_width = (interval[1] - interval[0]) / 2
        return half_width <= max(self.atol, self.rtol * abs(total.value))


@dataclass(frozen=True)
class Traces:
    """An estimated trace and its parts.

    Attributes:
        total: The trace over all parameters, its standard error and degrees of freedom.
        tensors: The same for the diagonal block of each parameter tensor.
        passes: Passes over the data.
        subset_stderr: The error from the examples standing for more of them; None if unknown.
    """

    total: Mean
    tensors: dict[str, Mean]
    passes: int
    subset_stderr: float | None


def quadratic_samples(parts: Params, probe: Params, names: Iterable[str]) -> Tensor:
    """v_t^T (H v)_t for each tensor t of `names`, shape (T,); zero where v_t was dropped."""
    zero = next(iter(probe.values())).new_zeros(())
    return torch.stack(
        [(parts[n] * probe[n]).sum() if n in probe else zero for n in names]
    ).detach()


def hessian_sampler(objective: Objective, scheme: Scheme = "none", keep_prob: float = 1) -> Sampler:
    """Hutchinson's samples v_t^T (H v)_t of a batch, H the Hessian of its mean loss.

    Source:
        Hutchinson 1989; with a dropout scheme, Liu, Yu, Lin, arXiv 2208.05924 (SEHT-D).
    """
    return _quadratic_sampler(objective, objective.loss, scheme, keep_prob)


def residual_sampler(
    objective: Objective, linear: Callable[[], Collection[str]] = frozenset
) -> Sampler:
    """Hutchinson's samples v_t^T (R v)_t of a batch, R = H - G of its mean loss.

    Args:
        objective: The mean loss.
        linear: Names parameters in which the outputs are linear, the others held: R has nothing
            but zeros in their blocks, so that probes leave them out, with their noise and cost.
    """
    return _quadratic_sampler(objective, objective.residual, "none", 1.0, linear)


def _quadratic_sampler(
    objective: Objective, loss: Callable[..., Tensor], scheme: Scheme, keep_prob: float,
    left_out: Callable[[], Collection[str]] = frozenset,
) -> Sampler:  # fmt: skip
    params = objective.params

    def sample(batch: Batch, num_probes: int, generator: Generator) -> Tensor:
        rows, without = [], left_out()
        kept = {name: p for name, p in params.items() if name not in without}
        with naming_fault(objective, batch.X):
            grad = gradient(loss(params, batch.X, batch.y), kept, create_graph=True)
            check_graph(*grad.values())
            for _ in range(num_probes):
                v = draw_probe(kept, scheme=scheme, keep_prob=keep_prob, generator=generator)
                rows.append(quadratic_samples(hvp(grad, kept, v), v, params))
        return torch.stack(rows)[:, None]

    return sample


def ggn_sampler(objective: Objective, scheme: Scheme = "none", keep_prob: float = 1) -> Sampler:
    """Hutchinson's samples v_t^T (G v)_t of a batch, G the Gauss-Newton matrix of its mean loss."""
    params = objective.params

    def sample(batch: Batch, num_probes: int, generator: Generator) -> Tensor:
        rows = []
        for _ in range(num_probes):
            v = draw_probe(params, scheme=scheme, keep_prob=keep_prob, generator=generator)
            product = ggn_product(objective, batch.X, batch.y, v)
            rows.append(quadratic_samples(product, v, params))
        return torch.stack(rows)[:, None]

    return sample


def signs_sampler(per_example: PerExampleTrace) -> Sampler:
    """Samples of tr(G) from random signs on the outputs, each example a stratum of its own."""

    def sample(batch: Batch, num_probes: int, generator: Generator) -> Tensor:
        sums = per_example.sample(batch.X, batch.y, num_probes, generator, batch.number)
        return _of_examples(per_example, batch, sums)

    return sample


def _of_examples(per_example: PerExampleTrace, batch: Batch, sums: Tensor) -> Tensor:
    """Values (..., N, T) whose mean is the batch's trace, of sums over each example's terms."""
    return sums * (len(batch.X) / per_example.objective.task.num_terms(batch.y))


def exact_sampler(per_example: PerExampleTrace) -> Sampler:
    """tr(G) itself, each example a stratum of its own."""

    def sample(batch: Batch, _num_probes: int, _generator: Generator) -> Tensor:
        sums = per_example.exact(batch.X, batch.y, batch.number)
        return _of_examples(per_example, batch, sums)[None]

    return sample


def diagonal_sampler(objective: Objective) -> Sampler:
    """tr(H) itself, from the whole diagonal."""

    def sample(batch: Batch, _num_probes: int, _generator: Generator) -> Tensor:
        with naming_fault(objective, batch.X):
            return hessian_diagonal_traces(objective, batch.X, batch.y)[None, None]

    return sample


def control_variate_sampler(
    objective: Objective, per_example: PerExampleTrace, *, by_signs: bool
) -> Sampler:
    """Samples of tr(H) = tr(G) + E[v^T R v]: where the loss is low, R and its variance are small.

    tr(G) of a batch is taken once, exactly, and remembered; or by signs, afresh in each pass.
    """
    residual = residual_sampler(objective, lambda: per_example.linear_blocks)
    signs = signs_sampler(per_example)
    exact, remembered = exact_sampler(per_example), dict[int, Tensor]()

    def sample(batch: Batch, num_probes: int, generator: Generator) -> Tensor:
        if by_signs:
            main = signs(batch, num_probes, generator).mean(1)
        else:
            if batch.number not in remembered:
                remembered[batch.number] = exact(batch, num_probes, generator)[0].mean(0)
            main = remembered[batch.number]
        return main[..., None, :] + residual(batch, num_probes, generator)

    return sample


def estimate_trace(
    sampler: Sampler,
    data: DataLoss,
    *,
    population: int | None = None,
    num_probes: int,
    stop: Stop,
    generator: Generator,
    exact: bool = False,
    inclusion: Inclusion = EVERYTHING,
    on_pass: Callable[[int, Mean], None] | None = None,
) -> Traces:
    """Estimate a trace over a data set, pass by pass, until `stop` says so.

    Args:
        sampler: Draws samples of the T diagonal blocks' traces on one batch.
        data: The loss whose trace it is; all processes that share it get the same estimate.
        population: The number of examples that those of the data stand for; theirs by default.
        num_probes: m, fresh probes per batch in each pass.
        stop: The stopping rule.
        generator: Source of all randomness; with several processes another for each.
        exact: Whether the samples have no error: one pass is then all.
        inclusion: What a probe leaves out.
        on_pass: Told the number of passes done and the estimate so far.

    Raises:
        NumericsError: If a sample is not finite.
    """
    running, ranks = StratifiedMean(exact, inclusion), data.ranks
    begin = time.monotonic()
    passes = 0

    def drawn() -> Iterator[tuple[int, float, Tensor]]:
        for batch in data:
            samples = sampler(batch, num_probes, generator)
            samples = torch.cat([samples.sum(-1, keepdim=True, dtype=torch.float64), samples], -1)
            yield batch.number, batch.share, samples.cpu()

    while True:
        for number, share, samples in ranks.each(drawn()):
            running.add(number, share, samples)
        passes += 1
        total, *parts = stop.judged(running.means())
        if not abs(total.value) < float("inf"):
            raise NumericsError(f"the trace estimate is {total.value} after {passes} passes")
        if on_pass is not None:
            on_pass(passes, total)
        enough = exact or stop.reached(total, passes, time.monotonic() - begin)
        if ranks.from_first(enough):  # their clocks differ
            examples = data.num_examples
            subset = running.subset_stderr(population or examples, examples)
            names = data.objective.params
            return Traces(total, dict(zip(names, parts, strict=True)), passes, subset)
