"""Whether the examples of a batch touch each other in a model.

Told by the logits of some examples when the others are dropped, or replaced by copies of the
former, in another order; and by slopes, which see what is too small for that. So thresholds, scales
and orders over the batch are found, groups of neighbours, what depends on an example's place, and
whatever has no slope, as inputs that are rounded to integers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from hesstrace_cli.errors import ModelError
from hesstrace_cli.failures import is_of_the_machine

LogitsOf = Callable[[Tensor], Tensor]

PART = 1 << 22
"""Numbers that are compared at a time (16 MiB in float32)."""

_ROUNDS = 3
_TOLERANCE = {torch.float64: 1e-6}
_COARSE = 1e-3  # of the largest logit: kernels round differently for batches of other sizes


class Unfit(ModelError):
    """A batch that the method chosen is not right for."""


class MixedExamples(Unfit):
    """Examples are not independent of each other, so that none has a gradient of its own."""

    def __init__(self, reason: str = "the logits of an example depend on the others in its batch"):
        super().__init__(reason)


def check_independence(logits_of: LogitsOf, X: Tensor, generator: Generator) -> None:
    """Refuse a model that lets examples of a batch touch each other.

    Args:
        logits_of: The outputs (N, ...) of inputs (N, ...), with their graph where it is recorded.
        X: A few examples; what is done costs some ten passes.
        generator: Draws which of them are kept.

    Raises:
        MixedExamples: If the logits of an example depend on the others in its batch.
    """
    if len(X) < 2:
        return
    with torch.no_grad():
        logits = logits_of(X)
        for _ in range(_ROUNDS):
            order = torch.randperm(len(X), generator=generator, device=X.device)
            half = len(X) // 2
            for kept in (order[:half], order[half:]):
                _compare(logits_of, X, logits, kept)
        _compare(logits_of, X, logits, order.new_zeros(1))
        check_others(logits_of, X, logits, generator)
    if X.is_floating_point():
        _check_slopes(logits_of, X, generator)


@torch.no_grad()
def check_others(logits_of: LogitsOf, X: Tensor, logits: Tensor, generator: Generator) -> None:
    """Replace a random half of a batch by copies of the other half, in another order: one pass.

    Args:
        logits_of: As for `check_independence`.
        X: The batch.
        logits: Its logits.
        generator: Draws which examples are kept, and where they go.

    Raises:
        MixedExamples: If the logits of an example depend on the others in its batch.
    """
    N = len(X)
    if N < 2:
        return
    kept = torch.randperm(N, generator=generator, device=X.device)[: (N + 1) // 2]
    order = torch.cat([kept, kept[torch.randint(len(kept), (N - len(kept),), generator=generator,
                                                device=X.device)]])  # fmt: skip
    order = order[torch.randperm(N, generator=generator, device=X.device)]
    _compare(logits_of, X, logits, order)


def column(values: Tensor, like: Tensor) -> Tensor:
    """One value an example, in a shape that multiplies the outputs."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _compare(logits_of: LogitsOf, X: Tensor, expected: Tensor, order: Tensor) -> None:
    """Hold the logits of the examples in this order against those expected, some at a time."""
    try:
        logits = logits_of(X[order])
    except (RuntimeError, ValueError, IndexError, AssertionError) as problem:
        if is_of_the_machine(problem):
            raise
        raise MixedExamples("the model does not take the examples of a batch one by one") from None
    if logits.shape != (len(order), *expected.shape[1:]):
        raise MixedExamples
    at_once = max(1, PART // max(1, expected[:1].numel()))
    parts = order.split(at_once)
    size = torch.stack([expected[part].abs().nan_to_num(0, 0, 0).max() for part in parts]).max()
    tolerance = _TOLERANCE.get(expected.dtype, _COARSE) * size
    for got, part in zip(logits.split(at_once), parts, strict=True):
        own = expected[part]
        same = (got - own).abs() <= tolerance
        if not bool((same | (got == own) | (got.isnan() & own.isnan())).all()):
            raise MixedExamples


def _check_slopes(logits_of: LogitsOf, X: Tensor, generator: Generator) -> None:
    inputs = X.detach().requires_grad_()
    logits = logits_of(inputs)
    if not logits.requires_grad:
        return
    weights = torch.randn(logits.shape, generator=generator, device=X.device).to(logits.dtype)
    for _ in range(_ROUNDS):
        order = torch.randperm(len(X), generator=generator, device=X.device)
        chosen = order < len(X) // 2
        try:
            (slope,) = torch.autograd.grad(
                logits,
                inputs,
                weights * column(chosen, logits),
                materialize_grads=True,
                retain_graph=True,
            )
        except (RuntimeError, NotImplementedError) as problem:
            if is_of_the_machine(problem):
                raise
            return  # without a derivative in the inputs there is nothing to be seen
        # A slope that is infinite, as of a square root at 0, times nothing is not a number.
        if bool(slope[~chosen].nan_to_num(0, 0, 0).any()):
            raise MixedExamples
