"""Samples of tr(G) and tr(H) of a batch's mean loss, 0-dim and to be differentiated.

    E[t(w)] = tr(G(w)) or tr(H(w))

For tr(G) the outputs of an ordinary forward pass are enough, their graph recorded within
`differentiable_ops(order=2)`; tr(H) takes passes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.graph import Params, check_graph
from hesstrace_cli.curvature.ggn import (
    root_gradient,
    trace_sample_at,
    trace_sample_of_parts,
    traces_of,
)
from hesstrace_cli.curvature.hessian import Mode, loss_and_form, quadratic_form
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import Draws, rademacher
from hesstrace_cli.failures import FAILURES, is_of_the_machine
from hesstrace_cli.tasks import Task


def root_gradients(
    outputs: Tensor, params: Params, task: Task, targets: Tensor, *,
    draws: Draws, generator: Generator, rows: Tensor | None = None, num_examples: int = 0,
    hold: bool = False,
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:  # fmt: skip
    """For every probe what is kept, and g = sum_m J_m^T u_m of its tensors, u = B e or of labels.

    Args:
        outputs: Of some examples, with their graph.
        params: The parameters w by name.
        task: Gives B.
        targets: Of the same examples.
        draws: What is drawn.
        generator: Source of all randomness; the same for all parts of a batch.
        rows: The examples' positions in their batch; None where they are the batch.
        num_examples: Of the batch, where they are a part of it.
        hold: Whether B counts as constant where g is differentiated.
    """
    at = outputs.detach() if hold else outputs
    for _ in range(draws.num_probes):
        keep = draws.keep(params, generator)
        u = draws.cotangent(at, targets, task, generator, rows, num_examples)
        yield keep, root_gradient(outputs, params, u, keep)


def batch_samples(
    outputs: Tensor, params: Params, task: Task, targets: Tensor, *,
    draws: Draws, generator: Generator, num_terms: float | None = None, hold: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Samples of tr(G) of a whole batch, || s sum_m J_m^T B_m e_m ||^2 / M, one a probe.

    The arguments are those of `root_gradients`, and M, if not that of the targets.
    """
    num_terms = num_terms or task.divisor(targets)
    return [
        torch.stack(list(traces_of(g, keep, num_terms).values())).sum()
        for keep, g in root_gradients(
            outputs, params, task, targets, draws=draws, generator=generator, hold=hold
        )
    ]


def samples_of_parts(
    local: Iterator[tuple[Params, Params]], sums: Sequence[Tensor], num_terms: int
) -> list[Tensor]:
    """The same of a batch in parts, with the gradients that one part adds to each.

    Args:
        local: `root_gradients` of this part.
        sums: The same gradients summed over all parts, without a graph, one after another.
        num_terms: M, of the whole batch.
    """
    remaining, samples = iter(sums), []
    for keep, own in local:
        whole = {name: next(remaining) for name in own}
        samples.append(trace_sample_of_parts(own, whole, keep, num_terms or 1))
    return samples


def hessian_samples(
    objective: Objective, X: Tensor, y: Tensor, *,
    draws: Draws, generator: Generator, modes: Sequence[Mode], share: float = 1.0,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    """Samples v^T H v of a part's share in tr(H), and of the loss where a pass gave it.

    Args:
        objective: The mean loss.
        X: Inputs of the part.
        y: Their targets.
        draws: What is drawn.
        generator: Source of all randomness.
        modes: Of differentiation, all of them right here; the later ones are taken where what
            this batch does has no rule in those before.
        share: The weight of the part's mean loss in that of the batch.

    Returns:
        The samples, one a probe, and share times the loss or None.
    """
    probes = [draws.probe(objective.params, generator) for _ in range(draws.num_probes)]

    def loss(params: Params) -> Tensor:
        # Weighted in here, as synced norms sum what is differentiated over the parts.
        return share * objective.loss(params, X, y)

    for mode in modes:
        try:
            if mode == "taylor":
                pairs = [loss_and_form(loss, objective.params, v) for v in probes]
                return [form for _, form in pairs], pairs[0][0]
            return [quadratic_form(loss, objective.params, v, mode=mode) for v in probes], None
        except FAILURES as problem:
            if is_of_the_machine(problem):
                raise
            # Not kept for later steps: a resumed run would not know of it.
            failed = problem
    raise failed


class CompiledSamples:
    """Samples by one compiled function of parameters and batch, in a forward pass of its own.

    What is dropped is multiplied by 0 there.

    Args:
        objective: The mean loss.
        curvature: "hessian" or "ggn".
        hold: Whether A of the latter counts as constant where they are differentiated.
    """

    def __init__(self, objective: Objective, curvature: str, *, hold: bool = False) -> None:
        self._of_g = curvature == "ggn"
        self._objective = objective
        self._plain = partial(_sample, objective, curvature, hold)
        self._compiled: Callable[..., Tensor] | None = None

    def __call__(
        self, X: Tensor, y: Tensor, outputs: Tensor, *, draws: Draws, generator: Generator
    ) -> list[Tensor]:
        """One sample a probe of the trace on a batch.

        Args:
            X: Inputs.
            y: Targets.
            outputs: In the shape of those of X.
            draws: What is drawn.
            generator: Source of all randomness.
        """
        params = self._objective.params
        drawn = [self._drawn(outputs, draws, generator) for _ in range(draws.num_probes)]
        if self._compiled is None:  # looked at by the same function, before it is compiled
            check_graph(self._plain(params, X, y, *drawn[0]))
            self._compiled = torch.compile(self._plain, dynamic=False)
        return [self._compiled(params, X, y, *each) for each in drawn]

    def _drawn(
        self, outputs: Tensor, draws: Draws, generator: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        params, zero = self._objective.params, outputs.new_zeros(())
        if not self._of_g:
            zeros = {n: torch.zeros_like(p) for n, p in params.items()}
            return zero, zeros | draws.probe(params, generator)
        keep = draws.keep(params, generator)
        factors = {name: keep.get(name, zero) for name in params}
        return rademacher(outputs, generator=generator), factors


def _sample(
    objective: Objective, curvature: str, hold: bool, params: Params, X: Tensor, y: Tensor,
    signs: Tensor, parts: Params,
) -> Tensor:  # fmt: skip
    """One sample as a function of its arguments; `parts` are G's factors, or H's probe."""
    task = objective.task
    if curvature == "ggn":

        def cotangent(outputs: Tensor) -> Tensor:
            return task.root(outputs.detach() if hold else outputs, y, signs)

        traces = trace_sample_at(
            lambda p: objective.outputs(p, X), params, cotangent, parts, task.divisor(y)
        )
        return torch.stack(list(traces.values())).sum()
    return quadratic_form(lambda p: objective.loss(p, X, y), params, parts, mode="forward")
