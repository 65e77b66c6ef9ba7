"""By which derivatives a penalty on the trace is taken: the first that a trial finds right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from hesstrace_cli.casting import on_copies
from hesstrace_cli.curvature.hessian import Mode
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.derivatives import IN_SINGLE, Check, checked, move_aside, seeded
from hesstrace_cli.errors import DerivativeError
from hesstrace_cli.precision import full_precision
from hesstrace_cli.verdicts import NOT_FINITE, Row


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
    curvature: str, compiled: bool, single: bool, seed: int,
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

    Raises:
        DerivativeError: If there is none.
    """
    if curvature == "ggn":
        with checked(objective, X, y, seed=seed) as check:
            rows = check.ggn(as_function=compiled)
        _refuse_unless_right(rows)
        return Engine("reverse", "agrees with differences of the model")
    engines: tuple[Mode, ...] = ("forward",) if compiled else ("taylor", "forward", "reverse")
    right: list[Mode] = []
    tried: dict[Mode, list[Row]] = {}
    with checked(objective, X, y, seed=seed) as check:
        scale = check.scale()
        for mode in engines:
            if right and mode != "reverse":
                continue
            tried[mode] = check.hessian(mode)
            if all(row.verdict == "right" for row in tried[mode]):
                right.append(mode)
    with on_copies(objective.model, double=False):
        move_aside(objective.params, seeded(X, seed))
        own = Check(objective, X, y, seeded(X, seed), IN_SINGLE)
        for mode in list(right):
            problem = own.trial(mode, check.values[mode], scale if single else None)
            if problem is not None:
                right.remove(mode)
                tried[mode] = [problem]
    failed = [row for rows in tried.values() for row in rows if row.verdict != "right"]
    if right:
        reason = "; ".join(f"{r.check} {r.verdict}: {r.detail}" for r in failed)
        return Engine(right[0], reason or "agrees with differences of the model", tuple(right[1:]))
    _refuse_unless_right(tried[engines[-1]])
    return Engine(engines[-1], "differences of the model do not settle, so it is not proved")


def _refuse_unless_right(rows: Sequence[Row]) -> None:
    bad = [row for row in rows if row.verdict in ("wrong", "refused")]
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
