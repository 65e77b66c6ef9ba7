"""Whether the gradient that autograd gives is that of the function itself.

It is not where a model takes a value off the graph: `detach`, `no_grad`, `.data`, `.item()`, a
straight-through estimator, a hook or a backward that gives something else. Its curvature is then
that of the function with such values held constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from hesstrace_cli.autodiff.calls import native_outputs
from hesstrace_cli.autodiff.casting import cast, on_copies
from hesstrace_cli.autodiff.differentiable import HeldPadding
from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.curvature.blame import naming_fault
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.independence import Unfit
from hesstrace_cli.failures import is_of_the_machine


class Detached(Unfit):
    """The gradient that autograd gives is not that of the loss."""

    def __init__(
        self,
        reason: str = "autograd's gradient is not that of the outputs (detach, no_grad, item or a "
        "straight-through estimator), so that the curvature is that with what is detached held "
        "constant",
    ) -> None:
        super().__init__(reason)


_MOST = 64  # examples
_TRIES = 3
_IN_DOUBLE = ((1e-6, 1e-7, 1e-5, 1e-8, 1e-9, 1e-4, 1e-3), 1e-4, 1e-14)  # steps, tolerance, rounding
_IN_SINGLE = ((1e-2, 3e-3, 3e-2), 3e-2, 1e-6)


def check_attached(objective: Objective, X: Tensor) -> None:
    """Hold autograd's gradient of the outputs against differences of them, near the weights.

    Args:
        objective: Its parameters are the model's own, which are moved in place and put back.
        X: A batch; some examples of it are taken.

    Raises:
        Detached: If they differ in every direction tried, for every step.
        DerivativeError: If there is no gradient.
    """
    generator = Generator(X.device).manual_seed(0)
    X = X[:_MOST]
    try:
        differs = _differs(objective, X, generator, double=True)
    except (RuntimeError, TypeError, ValueError) as problem:
        if is_of_the_machine(problem):
            raise
        with naming_fault(objective, X):  # it does not run in double
            differs = _differs(objective, X, generator, double=False)
    if differs:
        raise Detached


def _differs(objective: Objective, X: Tensor, generator: Generator, *, double: bool) -> bool:
    with on_copies(objective.model, double=double):
        inputs = cast(X, torch.float64) if double else X
        tries = (_differs_somewhere(objective, inputs, generator, double) for _ in range(_TRIES))
        return all(tries)


def _differs_somewhere(objective: Objective, X: Tensor, generator: Generator, double: bool) -> bool:
    steps, tolerance, rounding = _IN_DOUBLE if double else _IN_SINGLE
    params, padding = objective.params, HeldPadding()

    def outputs() -> Tensor:
        with padding:  # such rows have no gradient, and are held fixed
            return native_outputs(objective.model, X)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device).to(like)

    sizes = {n: p.detach().square().mean().sqrt().clamp(min=1e-2) for n, p in params.items()}
    for name, p in params.items():  # off the kinks, on which units with biases of 0 may sit
        p.data.add_(0.01 * sizes[name] * normal(p))
    at = {n: p.detach().clone() for n, p in params.items()}
    v = {n: sizes[n] * normal(p) for n, p in params.items()}
    with torch.enable_grad():
        found = outputs()
        u = normal(found)
        g = gradient((u * found).sum(), params)
    parts = torch.stack([(part * v[n]).sum() for n, part in g.items()])
    squares = torch.stack([(part * v[n]).square().sum() for n, part in g.items()])
    slope, size = parts.sum().item(), squares.sum().sqrt().item()
    scale = (u * found).abs().sum().item()

    @torch.no_grad()
    def along(step: float) -> float:
        for name, p in params.items():
            p.data.copy_(at[name] + step * v[name])
        return (u * outputs()).sum().item()

    def agrees(step: float) -> bool:
        difference = (along(step) - along(-step)) / (2 * step)
        error = abs(difference - slope)
        # Where something is infinite or not a number, nothing can be told.
        return not error > tolerance * max(size, abs(difference)) + rounding * scale / step

    different = not any(agrees(step) for step in steps)
    along(0.0)
    return different


_EMPTY = {
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor,
}  # fmt: skip
_NUMBERS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__float__, Tensor.__complex__,
            Tensor.__array__}  # fmt: skip


class CutWatch(TorchFunctionMode):
    """Notes whether a value that was taken off the graph is used for one that is on it.

    Comparisons and indices do not count: they are constant but for jumps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False
        self._cut: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = [t for t in _tensors((args, kwargs or {})) if _is_continuous(t)]
        uses_cut = any(id(t) in self._cut for t in operands)
        if (not uses_cut and not any(t.requires_grad for t in operands)) or func in _EMPTY:
            return result
        self.found |= func in _NUMBERS
        for each in _tensors(result):
            if each.requires_grad:
                self.found |= uses_cut
            elif _is_continuous(each):
                self._cut[id(each)] = each  # held, so that its number is its own
        return result


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for each in thing.values():
            yield from _tensors(each)
    elif isinstance(thing, Sequence) and not isinstance(thing, str):
        for each in thing:
            yield from _tensors(each)
