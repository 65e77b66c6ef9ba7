"""Checks of a model on copies of its weights, in double precision where it can run in that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.calls import native_outputs
from hesstrace_cli.autodiff.casting import cast, on_copies
from hesstrace_cli.curvature.checks.derivatives import Check
from hesstrace_cli.curvature.checks.differences import IN_DOUBLE, IN_SINGLE, Differences
from hesstrace_cli.curvature.checks.displaced import holding, move_aside, seeded
from hesstrace_cli.curvature.checks.verdicts import one_line, pinned
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import DerivativeError
from hesstrace_cli.failures import FAILURES, is_of_the_machine

_ASIDE = 0.01  # of a direction


def _reads_parameters_alone(objective: Objective, X: Tensor, generator: Generator) -> bool:
    """Whether moving the weights in place is the same as giving the model moved parameters."""
    model, params = objective.model, objective.params
    v = Differences(objective, X, X, generator, IN_DOUBLE).v
    # The same to the last bit both times, as rounding may grow on its way through batch norms.
    moved_params = {n: p.detach() + _ASIDE * v[n] for n, p in params.items()}
    with torch.no_grad(), pinned():
        here = native_outputs(model, X)
    with torch.no_grad(), pinned():
        given = native_outputs(model, X, moved_params)
    with torch.no_grad(), pinned(), holding(params, moved_params):
        in_place = native_outputs(model, X)
    moved = (in_place - here).abs().max().item()
    rounding = 100 * torch.finfo(here.dtype).eps * here.abs().max().item()
    return (given - in_place).abs().max().item() <= 0.01 * moved + rounding


@contextmanager
def checked(
    objective: Objective, X: Tensor, y: Tensor, *, seed: int, prefix: str = ""
) -> Iterator[Check]:
    """A check of a model on copies of its weights, moved a little aside; all is left as it was.

    In double precision, whatever the model's; in its own where it cannot run in that.

    Args:
        objective: Of the model in its mode.
        X: A batch.
        y: Its targets.
        seed: Of all randomness.
        prefix: Of the rows' names.

    Raises:
        DerivativeError: If the model has no gradient, or reads its weights in ways that neither
            autograd nor these copies follow.
    """
    model = objective.model
    try:
        alone = _reads_parameters_alone(objective, X, seeded(X, seed))
    except FAILURES as problem:
        if is_of_the_machine(problem):
            raise
        raise DerivativeError(
            f"the model fails at weights beside its own: {one_line(problem)}"
        ) from problem
    note = None
    for accuracy in (IN_DOUBLE, IN_SINGLE):
        double = accuracy is IN_DOUBLE
        with on_copies(model, double=double):
            move_aside(objective.params, seeded(X, seed))
            batch = (cast(X, torch.float64), cast(y, torch.float64)) if double else (X, y)
            check = Check(objective, *batch, seeded(X, seed), accuracy, prefix, note)
            try:
                check.differences.check_gradient()
            except FAILURES as problem:
                if is_of_the_machine(problem):
                    raise
                if not double:
                    raise DerivativeError(
                        f"the model has no gradient here: {one_line(problem)}"
                    ) from problem
                note = (
                    f"it cannot run in it ({one_line(problem)}): checked in its own precision, in "
                    "which errors of a few per cent are not seen"
                )
                continue
            if not alone and _reads_parameters_alone(objective, batch[0], seeded(X, seed)):
                raise DerivativeError(
                    "the model reads a weight in another way than by its parameter (.data, "
                    "detach(), or a second tensor in the same memory), which its gradient leaves "
                    "out; read the parameter itself"
                )
            yield check
            return


def tries(
    objective: Objective, X: Tensor, y: Tensor, first: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Examples and a seed to check with; the next where differences have not settled there.

    Args:
        objective: Its task says whether some examples have a term that counts.
        X: A batch.
        y: Its targets.
        first: So many examples at first; then all, as a batch norm over few values is too steep
            for differences; then others.
        seed: Of the first; other weights beside the model's and other directions follow.
    """
    for number, rows in enumerate((slice(first), slice(None), slice(-first, None))):
        if objective.task.num_terms(y[rows]):
            yield X[rows], y[rows], seed + number
