"""By which derivatives a penalty on the trace is taken: the first that a trial finds right."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from torch import Tensor

from hesstrace_cli.autodiff.calls import reads_by_other_names
from hesstrace_cli.autodiff.casting import on_copies
from hesstrace_cli.autodiff.precision import full_precision
from hesstrace_cli.curvature.checks.copies import checked, tries
from hesstrace_cli.curvature.checks.derivatives import Check
from hesstrace_cli.curvature.checks.differences import IN_SINGLE
from hesstrace_cli.curvature.checks.displaced import move_aside, seeded
from hesstrace_cli.curvature.checks.verdicts import NOT_FINITE, Row, is_settled, merged
from hesstrace_cli.curvature.hessian import Mode
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import DerivativeError


@dataclasses.dataclass(frozen=True)
class Engine:
    """By which derivatives a penalty is taken, and why.

    Attributes:
        engine: "taylor", "forward" or "reverse".
        engine_reason: One clause for the summary.
        others: Right ones to take where that one fails on a later batch.
    """

    engine: Mode
    engine_reason: str
    others: tuple[Mode, ...] = ()


@full_precision()
def choose_engine(
    objective: Objective, X: Tensor, y: Tensor, *,
    curvature: str, compiled: bool, single: bool, seed: int, first: int | None = None,
) -> Engine:  # fmt: skip
    """The first engine whose value and gradient are right for this model, in a whole trial step.

    Args:
        objective: The loss trained on, its model in training mode.
        X: Some of the first batch.
        y: Their targets.
        curvature: "hessian" or "ggn".
        compiled: Whether the penalty is to be compiled.
        single: Whether the model runs in single precision throughout, not in half.
        seed: Of the directions looked along.
        first: So many examples are tried first, all of them only where that proves nothing.

    Raises:
        DerivativeError: If there is none.
    """
    if compiled and reads_by_other_names(objective.model, X):
        raise DerivativeError(
            "the model reads a parameter in another way than as its module's attribute, which a "
            "compiled penalty does not follow; leave out --compile"
        )
    first = len(X) if first is None else first
    if curvature == "ggn":
        rows: list[Row] = []
        for some, targets, number in tries(objective, X, y, first, seed):
            with checked(objective, some, targets, seed=number) as check:
                found = check.ggn(as_function=compiled)
            rows = merged(rows, found)
            if is_settled(rows):
                break
        _refuse_unless_right(rows)
        return Engine("reverse", "agrees with differences of the model")
    engines: tuple[Mode, ...] = ("forward",) if compiled else ("taylor", "forward", "reverse")
    tried: dict[Mode, list[Row]] = {}
    for some, targets, number in tries(objective, X, y, first, seed):
        with checked(objective, some, targets, seed=number) as check:
            scale = check.differences.scale()
            right = _try(engines, check, tried)
        if right or is_settled(itertools.chain(*tried.values())):
            break
    with on_copies(objective.model, double=False):
        move_aside(objective.params, seeded(X, number))
        own = Check(objective, some, targets, seeded(X, number), IN_SINGLE)
        for mode in list(right):
            problem = own.trial(mode, check.values[mode], scale if single else None)
            if problem is not None:
                right.remove(mode)
                tried[mode] = [problem]
    if not right:
        _refuse_unless_right(tried[engines[-1]])
    failed = [row for rows in tried.values() for row in rows if row.verdict != "right"]
    reason = "; ".join(f"{r.check} {r.verdict}: {r.detail}" for r in failed)
    return Engine(right[0], reason or "agrees with differences of the model", tuple(right[1:]))


def _try(engines: Sequence[Mode], check: Check, tried: dict[Mode, list[Row]]) -> list[Mode]:
    """The engines that are right, reverse mode and no more than one other; all others' faults."""
    right: list[Mode] = []
    for mode in engines:
        if right and mode != "reverse":
            tried.pop(mode, None)  # what an earlier try left open
            continue
        if mode not in tried or not is_settled(tried[mode]):
            tried[mode] = merged(tried.get(mode, []), check.hessian(mode))
        if all(row.verdict == "right" for row in tried[mode]):
            right.append(mode)
    return right


def _refuse_unless_right(rows: Sequence[Row]) -> None:
    bad = [row for row in rows if row.verdict != "right"]
    bad.sort(key=lambda row: row.verdict == "unsettled")
    if bad and bad[0].verdict == "unsettled":
        raise DerivativeError(
            f"the penalty's derivative cannot be proved for this model ({bad[0].check}: "
            f"{bad[0].detail}), as where its differences depend on their step: it has jumps, or "
            "a batch norm over few values; a larger --batch-size may help, or --curvature of the "
            "other kind"
        )
    if bad and bad[0].verdict == "refused":
        raise DerivativeError(bad[0].detail)
    if bad and bad[0].detail == NOT_FINITE:
        raise DerivativeError(
            f"the penalty's derivative is not finite for this model ({bad[0].check}), as where "
            "it takes a square root or a logarithm of 0; keep what it takes them of away from 0, "
            "by adding 1e-6 or so"
        )
    if bad:
        raise DerivativeError(
            f"the penalty's derivative is wrong for this model ({bad[0].check}: {bad[0].detail}): "
            "it has a backward that is not its loss's derivative, as a detach(), a torch.no_grad() "
            "or a Function of its own may have; hesstrace verify says more"
        )
