"""A verdict on a derivative: an engine's value and gradient against differences of the model."""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from hesstrace_cli import records
from hesstrace_cli.autodiff.graph import Params
from hesstrace_cli.errors import DerivativeError
from hesstrace_cli.randomness import random_state_kept, seed_defaults

GOOD = ("right", "replaced", "yes", "no", "measured")
TOLERANCE = 1e-4
"""Relative, of a value in double precision; ten times as much for a gradient."""

NOT_FINITE = "it is not finite"
_LEAST = 0.01  # of the largest tensor's part of a gradient: smaller parts are held to this
T = TypeVar("T")


class NoDifferencesError(DerivativeError):
    """The model fails at all weights beside its own that differences are taken of."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: What was looked at.
        verdict: "right", "replaced" (made right by another form), "wrong", "refused",
            "unsettled" (the differences themselves depend on the step, or there are none, so
            that nothing is proved), or, where no verdict hangs on it, the answer "yes" or "no",
            or "measured".
        detail: The figures, or the reason.
    """

    check: str
    verdict: str
    detail: str

    def as_record(self) -> records.Verdict:
        """As JSON has it."""
        return {"check": self.check, "verdict": self.verdict, "detail": self.detail}


@contextmanager
def pinned() -> Iterator[None]:
    """The same random numbers each time, and the global state as before."""
    with random_state_kept():
        seed_defaults(0)
        yield


def one_line(problem: Exception) -> str:
    """What an exception says, shortened."""
    return textwrap.shorten(" ".join(str(problem).split()), 160, placeholder=" ...")


def compared(
    name: str, value: float, truths: Iterable[float], tolerance: float = TOLERANCE, scale: float = 0
) -> Row:
    """Right if it agrees with the differences for one step; wrong if these agree with each other.

    Where neither holds, as with kinks everywhere, differences cannot tell.

    Args:
        name: Of the check.
        value: What an engine gives.
        truths: Differences, one a step; no more are taken than are needed.
        tolerance: Relative.
        scale: A size of what the value is a sum of, which errors are relative to where it is
            larger than the value.
    """
    if not math.isfinite(value):
        return Row(name, "wrong", NOT_FINITE)

    def near(a: float, b: float) -> bool:
        return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-9, scale)

    try:
        verdict, truth = _verdict(value, truths, near, lambda a, b: abs(a - b))
    except NoDifferencesError as problem:
        return Row(name, "unsettled", str(problem))
    return Row(name, verdict, f"{value:.6g}, by differences {truth:.6g}")


def compared_gradients(
    name: str, found: Params, truths: Iterable[Params], u: Params, tolerance: float,
    by: str = "by differences",
) -> Row:  # fmt: skip
    """The same for a gradient, which has to agree in each tensor.

    Args:
        name: Of the check.
        found: By an engine.
        truths: By differences, one a step.
        u: A direction with entries of the weights' sizes; the figures shown are along it.
        tolerance: Relative, of each tensor's part.
        by: What the truths are taken by.
    """
    if not all(torch.isfinite(part).all() for part in found.values()):
        return Row(name, "wrong", NOT_FINITE)
    size = {n: part.norm().item() / math.sqrt(max(1, part.numel())) for n, part in u.items()}

    def errors(a: Params, b: Params) -> dict[str, float]:
        sizes = {n: size[n] * b[n].norm().item() for n in u}
        least = max(_LEAST * max(sizes.values()), 1e-9)
        return {n: size[n] * (a[n] - b[n]).norm().item() / max(sizes[n], least) for n in u}

    def worst(a: Params, b: Params) -> float:
        return max(errors(a, b).values())

    try:
        verdict, truth = _verdict(found, truths, lambda a, b: worst(a, b) <= tolerance, worst)
    except NoDifferencesError as problem:
        return Row(name, "unsettled", str(problem))
    along = [torch.stack([(g[n] * u[n]).sum() for n in u]).sum().item() for g in (found, truth)]
    detail = f"{along[0]:.6g}, {by} {along[1]:.6g}"
    if verdict != "right":
        off = errors(found, truth)
        at = max(off, key=off.__getitem__)
        detail += f"; it is off by {off[at]:.2g} of its size in {at!r}"
    return Row(name, verdict, detail)


def _verdict(
    found: T,
    truths: Iterable[T],
    near: Callable[[T, T], bool],
    distance: Callable[[T, T], float],
) -> tuple[str, T]:
    """The verdict, and the difference that comes nearest."""
    seen: list[T] = []
    for truth in truths:
        if near(found, truth):
            return "right", truth
        seen.append(truth)
    settled = len(seen) == 1 or any(near(a, b) for a, b in itertools.pairwise(seen))
    distances = [distance(found, truth) for truth in seen]
    nearest = min(range(len(seen)), key=lambda i: (math.isnan(distances[i]), distances[i]))
    return "wrong" if settled else "unsettled", seen[nearest]


def is_settled(rows: Iterable[Row]) -> bool:
    """Whether differences could tell for all of them."""
    return all(row.verdict != "unsettled" for row in rows)


def merged(before: Sequence[Row], now: Sequence[Row]) -> list[Row]:
    """Of two tries: what differences did not settle in one the other may; wrong is wrong."""
    known = {row.check: row for row in before if row.verdict != "unsettled"}

    def of_both(row: Row) -> Row:
        old = known.get(row.check, row)
        return old if old.verdict == "wrong" or row.verdict == "unsettled" else row

    return [of_both(row) for row in now]


def with_fallbacks(engines: Mapping[str, list[Row]]) -> Iterator[Row]:
    """Where one mode is right, another that is not is no fault.

    Training checks the modes in the same way before its first step, and takes the first that is
    right.
    """
    works = [name for name, rows in engines.items() if all(r.verdict == "right" for r in rows)]
    for row in itertools.chain(*engines.values()):
        if row.verdict != "right" and works:
            what = "" if row.verdict == "refused" else f"{row.verdict}: "
            yield Row(row.check, "no", f"{works[0]} mode is taken: {what}{row.detail}")
        else:
            yield row
