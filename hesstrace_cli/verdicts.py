"""A verdict on a derivative: an engine's value and gradient against differences of the model."""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from hesstrace_cli.curvature.finite import slopes
from hesstrace_cli.curvature.graph import gradient
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import Params
from hesstrace_cli.curvature.refusal import refuse
from hesstrace_cli.errors import HesstraceError
from hesstrace_cli.failures import is_of_the_machine

GOOD = ("right", "replaced", "yes", "no", "measured")
NEARER_STEPS = (1e-7, 1e-8, 1e-9)  # for first differences, which are less noisy
_TOLERANCE = 1e-4  # relative; ten times as much for a gradient, whose differences are noisier


@dataclasses.dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: What was looked at.
        verdict: "right", "replaced" (made right by another form), "wrong", "refused",
            "unsettled" (the differences themselves depend on the step, so that nothing is
            proved), or, where no verdict hangs on it, the answer "yes" or "no", or "measured".
        detail: The figures, or the reason.
    """

    check: str
    verdict: str
    detail: str


@contextmanager
def pinned(X: Tensor) -> Iterator[None]:
    """The same random numbers each time, and the global state as before."""
    devices = [X.device] if X.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


@dataclasses.dataclass(frozen=True)
class Truth:
    """Differences of the unmodified model, one a step: of the value, and of its slope along u."""

    values: list[float]
    slopes: list[float]


def judge(
    name: str,
    engine: Callable[[], Tensor],
    truth: Truth,
    objective: Objective,
    X: Tensor,
    u: Params,
) -> list[Row]:
    """A row for an engine's value and one for its gradient, or one that says it has none.

    Args:
        name: Of the check.
        engine: Gives the value, a 0-dim tensor, at the objective's parameters.
        truth: What to compare with.
        objective: Names the module that has no derivative.
        X: The batch.
        u: The direction along which the gradient is looked at.
    """
    params = objective.params
    try:
        with pinned(X):
            value = engine()
            if not value.requires_grad:
                return [compared(f"{name}, value", value.item(), truth.values)]
            grads = gradient(value, params)
        slope = torch.stack([(grads[n] * u[n]).sum() for n in u]).sum().item()
        rows = [compared(f"{name}, value", value.item(), truth.values)]
        row = compared(f"{name}, gradient", slope, truth.slopes, tolerance=10 * _TOLERANCE)
        if row.verdict == "unsettled" and rows[0].verdict == "right":
            # Kinks all around: differences of its own value, which is right, take shorter steps.
            own = slopes(partial(_engine_at, engine, params, u, X), NEARER_STEPS)
            row = compared(f"{name}, gradient", slope, own, tolerance=10 * _TOLERANCE)
        return [*rows, row]
    except (RuntimeError, NotImplementedError, TypeError) as problem:
        if is_of_the_machine(problem):
            raise
        if "taylor" in name:  # the next mode knows better which module it is
            return [Row(name, "refused", one_line(problem))]
        reason = refuse(problem, objective, X)
        if not isinstance(reason, HesstraceError):
            raise reason from problem
        return [Row(name, "refused", str(reason))]


def _engine_at(
    engine: Callable[[], Tensor], params: Params, u: Params, X: Tensor, t: float
) -> float:
    """The engine's value at w + t u."""
    before = {n: p.detach().clone() for n, p in params.items()}
    try:
        with torch.no_grad():
            for n, part in u.items():
                params[n].add_(part, alpha=t)
        with pinned(X):
            return engine().item()
    finally:
        with torch.no_grad():
            for n, p in before.items():
                params[n].copy_(p)


def one_line(problem: Exception) -> str:
    """What an exception says, shortened."""
    return textwrap.shorten(" ".join(str(problem).split()), 160, placeholder=" ...")


def compared(name: str, value: float, truths: list[float], tolerance: float = _TOLERANCE) -> Row:
    """Right if it agrees with the differences for one step; wrong if these agree with each other.

    Where neither holds, as with kinks everywhere, differences cannot tell.
    """
    if not math.isfinite(value):
        return Row(name, "wrong", f"{value:g}, by differences {truths[-1]:.6g}")

    def near(a: float, b: float) -> bool:
        return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-9)

    truth = min(truths, key=lambda t: abs(t - value))
    detail = f"{value:.6g}, by differences {truth:.6g}"
    if near(value, truth):
        return Row(name, "right", detail)
    settled = len(truths) == 1 or any(near(a, b) for a, b in itertools.pairwise(truths))
    return Row(name, "wrong" if settled else "unsettled", detail)


def with_fallbacks(engines: Mapping[str, list[Row]], *, is_random: bool) -> Iterator[Row]:
    """Where another mode has the derivative, one that has not is no fault.

    Nor is one whose pass draws other random numbers than an ordinary pass, as attention's dropout
    does in forward mode; reverse mode, whose passes are ordinary ones, then decides.
    """
    works = [name for name, rows in engines.items() if all(r.verdict != "refused" for r in rows)]
    decided = is_random and all(row.verdict == "right" for row in engines["reverse"])
    for row in itertools.chain(*engines.values()):
        if row.verdict == "refused" and works:
            yield Row(row.check, "no", f"{works[0]} mode is taken: {row.detail}")
        elif row.verdict in ("wrong", "unsettled") and decided:
            yield Row(row.check, "no", f"other random numbers than an ordinary pass: {row.detail}")
        else:
            yield row
