"""What derivatives of a model's loss are held against: differences of the model itself.

The truth is the gradient of the unmodified model's loss at displaced weights, moved in place so
that whatever reads them by another name sees it: g(w + h v). Its first difference is H v, its
second one the gradient of v^T H v. Where the model has kinks, which only short steps avoid, the
latter is taken as a first difference of H v, once that is known to be right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.calls import native_outputs
from hesstrace_cli.autodiff.differentiable import HeldPadding
from hesstrace_cli.autodiff.graph import Params, check_graph, gradient, named
from hesstrace_cli.curvature.checks.displaced import holding, mean_size, normal, typical_size
from hesstrace_cli.curvature.checks.verdicts import (
    TOLERANCE,
    NoDifferencesError,
    compared_gradients,
    one_line,
    pinned,
)
from hesstrace_cli.curvature.hessian import hvp
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import DerivativeError
from hesstrace_cli.failures import FAILURES, is_of_the_machine

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How differences are taken, and how nearly an engine has to agree with them.

    Attributes:
        value: Relative tolerance of a value.
        gradient: Of each tensor's part of a gradient.
        first: Steps of first differences, relative to the weights, the likeliest to do first: a
            long one may cross a kink of the network, a short one drowns in rounding.
        second: Steps of second differences.
    """

    value: float
    gradient: float
    first: Sequence[float]
    second: Sequence[float]


IN_DOUBLE = Accuracy(
    TOLERANCE, 10 * TOLERANCE, (1e-5, 1e-6, 1e-7, 1e-4, 1e-8, 1e-9, 1e-3),
    (1e-4, 1e-3, 3e-4, 3e-5, 1e-5),
)  # fmt: skip
IN_SINGLE = Accuracy(0.02, 0.1, (1e-2, 3e-3, 1e-3, 3e-2), (3e-2, 1e-2, 1e-1))


def over(steps: Sequence[float], difference: Callable[[float], T]) -> Iterator[T]:
    """A difference for every step within which the model has a value.

    Raises:
        NoDifferencesError: If it has none for any.
    """
    failures: list[Exception] = []
    for step in steps:
        try:
            found = difference(step)
        except FAILURES as problem:
            if is_of_the_machine(problem):
                raise
            failures.append(problem)
        else:
            yield found
    if len(failures) == len(steps):
        raise NoDifferencesError(
            f"the model fails at all weights beside its own: {one_line(failures[0])}"
        ) from failures[0]


class Differences:
    """Of a model's loss on one batch, along random directions.

    Args:
        objective: Its parameters are the model's own, which are moved in place and put back.
        X: A batch.
        y: Its targets.
        generator: Of the directions.
        accuracy: To be expected of the model's precision.

    Attributes:
        v: The direction that products and forms are taken along.
        u: Another one, along which gradients of forms are shown.
    """

    def __init__(
        self, objective: Objective, X: Tensor, y: Tensor, generator: Generator, accuracy: Accuracy
    ) -> None:
        self.objective, self.X, self.y, self.accuracy = objective, X, y, accuracy
        self.v, self.u = self._direction(generator), self._direction(generator)
        self._padding = HeldPadding()
        self._gradients: dict[float, Params] = {}
        self._product: Params | None = None
        self._product_found = False

    def _direction(self, generator: Generator) -> dict[str, Tensor]:
        """Entries of the weights' sizes, and of a tenth of a typical weight's at least."""
        params = self.objective.params
        floor = 0.1 * typical_size(params)
        return {n: normal(p, generator) * max(floor, mean_size(p)) for n, p in params.items()}

    def check_gradient(self) -> None:
        """Take the model's own gradient, which fails where it has none.

        Raises:
            DerivativeError: If it is not finite.
        """
        if not all(torch.isfinite(g).all() for g in self._gradient_at(0.0).values()):
            raise DerivativeError(
                "the gradient of the model's loss is not finite at weights near its own"
            )

    @contextmanager
    def _displaced(self, direction: Params, size: float) -> Iterator[None]:
        params = self.objective.params
        moved = {n: params[n].detach() + size * part for n, part in direction.items()}
        with holding(params, moved):
            yield

    def _outputs(self) -> Tensor:
        with self._padding:
            return native_outputs(self.objective.model, self.X)

    def _gradient_at(self, size: float) -> Params:
        """The unmodified model's gradient at w + size v."""
        if size not in self._gradients:
            with pinned(), self._displaced(self.v, size):
                loss = self.objective.task.loss(self._outputs(), self.y)
                self._gradients[size] = gradient(loss, self.objective.params)
        return self._gradients[size]

    def _first_difference(self, step: float) -> Params:
        ahead, behind = self._gradient_at(step), self._gradient_at(-step)
        return {n: (ahead[n] - behind[n]) / (2 * step) for n in ahead}

    def _second_difference(self, step: float) -> Params:
        ahead, here, behind = (self._gradient_at(t) for t in (step, 0.0, -step))
        return {n: (ahead[n] - 2 * here[n] + behind[n]) / step**2 for n in ahead}

    def product_at(self, size: float) -> Params:
        """H v at w + size v by reverse mode."""
        objective = self.objective
        with pinned(), self._displaced(self.v, size):
            loss = objective.loss(objective.params, self.X, self.y)
            grad = gradient(loss, objective.params, create_graph=True)
            check_graph(*grad.values())
            return {n: p.detach() for n, p in hvp(grad, objective.params, self.v).items()}

    def products(self) -> Iterator[Params]:
        """H v, for one step after another."""
        return over(self.accuracy.first, self._first_difference)

    @property
    def product(self) -> Params | None:
        """H v by reverse mode where it agrees with differences, else None."""
        if not self._product_found:
            self._product_found = True
            try:
                found = self.product_at(0.0)
            except FAILURES as problem:
                if is_of_the_machine(problem):
                    raise
                return None
            row = compared_gradients("", found, self.products(), self.v, self.accuracy.gradient)
            self._product = found if row.verdict == "right" else None
        return self._product

    def gradients_of_form(self) -> Iterator[Params]:
        """The gradient of v^T H v, for one step after another."""

        def of_products(step: float) -> Params:
            ahead, behind = self.product_at(step), self.product_at(-step)
            return {n: (ahead[n] - behind[n]) / (2 * step) for n in ahead}

        if self.product is not None:
            yield from over(self.accuracy.first, of_products)
        yield from over(self.accuracy.second, self._second_difference)

    def scale(self) -> float:
        """The size of the terms that v^T H v is a sum of."""
        product = self.product or next(self.products())
        return sum((product[n] * self.v[n]).abs().sum().item() for n in self.v)

    def forms_with_ggn(self) -> Iterator[float]:
        """v^T G v by the outputs' differences along v, for one step after another."""
        task, y, v = self.objective.task, self.y, self.v

        @torch.no_grad()
        def outputs_at(size: float) -> Tensor:
            with pinned(), self._displaced(v, size):
                return self._outputs()

        def difference(step: float) -> float:
            pushed = (outputs_at(step) - outputs_at(-step)) / (2 * step)
            return (task.curve(here, y, pushed) * pushed).sum().item() / task.num_terms(y)

        here = outputs_at(0.0)
        yield from over(self.accuracy.first, difference)

    def pulled(
        self, root: Callable[[Tensor], Tensor], num_terms: int
    ) -> tuple[Params, Iterator[Params]]:
        """The unmodified model's g = J^T u, u = B e, and differences of || g ||^2 / M.

        Its gradient is (2/M) [ d/dt J(w + t g)^T u + (du/dw)^T J g ].
        """
        params = self.objective.params

        def pull(outputs: Tensor, cotangent: Tensor) -> Params:
            grads = torch.autograd.grad(
                outputs, list(params.values()), cotangent, materialize_grads=True,
                retain_graph=True,
            )  # fmt: skip
            return named(params, grads)

        with pinned():
            outputs = self._outputs()
        u = root(outputs.detach())
        pulled = pull(outputs, u)
        # Steps are of the weights' sizes.
        size = max(mean_size(part) for part in pulled.values())
        unit = typical_size(params) / size if size > 0 else 1.0
        direction = {n: unit * part for n, part in pulled.items()}

        def at(step: float) -> tuple[Tensor, Params]:
            with pinned(), self._displaced(direction, step):
                moved = self._outputs()
                return moved.detach(), pull(moved, u)

        def difference(step: float) -> Params:
            (outputs_ahead, ahead), (outputs_behind, behind) = at(step), at(-step)
            length = 2 * step * unit
            pushed = (outputs_ahead - outputs_behind) / length
            change = {n: (ahead[n] - behind[n]) / length for n in pulled}
            rooted = root(outputs)
            if rooted.requires_grad:  # a squared error's curvature is the same everywhere
                by_root = pull(rooted, pushed)
                change = {n: part + by_root[n] for n, part in change.items()}
            return {n: 2 / num_terms * part for n, part in change.items()}

        return pulled, over(self.accuracy.first, difference)
