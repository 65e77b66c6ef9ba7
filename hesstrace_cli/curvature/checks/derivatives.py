"""The derivatives that penalties and estimates take of a model, against differences of itself.

The truth is the gradient of the unmodified model's loss at displaced weights, moved in place so
that whatever reads them by another name sees it: g(w + h v). Its first difference is H v, its
second one the gradient of v^T H v. Where the model has kinks, which only short steps avoid, the
latter is taken as a first difference of H v, once that is known to be right.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Generator, Tensor
from torch.func import functional_call

from hesstrace_cli.autodiff.calls import native_outputs, outputs_of
from hesstrace_cli.autodiff.casting import cast, on_copies
from hesstrace_cli.autodiff.differentiable import HeldPadding, differentiable_ops
from hesstrace_cli.autodiff.graph import Params, check_graph, gradient, inner
from hesstrace_cli.curvature.blame import derivative_error
from hesstrace_cli.curvature.checks.verdicts import (
    TOLERANCE,
    NoDifferencesError,
    Row,
    compared,
    compared_gradients,
    one_line,
    pinned,
)
from hesstrace_cli.curvature.ggn import ggn_vp, trace_sample, trace_sample_at
from hesstrace_cli.curvature.hessian import Mode, hvp, quadratic_form
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import draw_keep, rademacher
from hesstrace_cli.errors import DerivativeError, HesstraceError
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


def typical_size(params: Params) -> float:
    """The mean absolute entry of a tensor of weights, those that are all 0 left out."""
    sizes = [_size(p) for p in params.values() if p.numel()]
    present = [size for size in sizes if size > 0]
    return sum(present) / len(present) if present else 1.0


def move_aside(params: Params, generator: Generator) -> None:
    """Move the weights a little: with biases of 0 many a unit sits on its kink.

    What is nearly 0, as a gate that begins closed, is moved by a typical weight's size: what is
    behind it would not be seen otherwise.
    """
    typical = typical_size(params)
    for p in params.values():
        is_closed = _size(p) < 0.03 * typical
        size = 0.3 * typical if is_closed else 0.01 * max(1.0, _size(p))
        p.data.add_(_normal(p, generator), alpha=size)


def _size(p: Tensor) -> float:
    return p.detach().abs().mean().item() if p.numel() else 0.0


def _normal(like: Tensor, generator: Generator) -> Tensor:
    """Drawn in double precision, so that every precision sees the same."""
    return torch.randn(
        like.shape, generator=generator, device=like.device, dtype=torch.float64
    ).to(like)  # fmt: skip


@contextmanager
def _holding(params: Params, values: Params) -> Iterator[None]:
    """For a while the parameters hold other values, in the memory that they have."""
    before = {n: params[n].detach().clone() for n in values}
    try:
        for n, value in values.items():
            params[n].data.copy_(value)
        yield
    finally:
        for n, p in before.items():
            params[n].data.copy_(p)


def _over(steps: Sequence[float], difference: Callable[[float], T]) -> Iterator[T]:
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


class Check:
    """The engines for a model's loss on one batch, each against differences.

    Args:
        objective: Its parameters are the model's own, which are moved in place and put back.
        X: A batch.
        y: Its targets.
        generator: Of the directions looked along.
        accuracy: To be expected of the model's precision.
        prefix: Of the rows' names.
        note: Why it is not in double precision, if it is not.
    """

    def __init__(
        self, objective: Objective, X: Tensor, y: Tensor, generator: Generator,
        accuracy: Accuracy = IN_DOUBLE, prefix: str = "", note: str | None = None,
    ) -> None:  # fmt: skip
        self.objective, self.X, self.y = objective, X, y
        self.accuracy, self.prefix, self.note = accuracy, prefix, note
        self._generator = generator
        self.v, self.u = self._direction(), self._direction()
        self._padding = HeldPadding()
        self._gradients: dict[float, Params] = {}
        self._product: Params | None = None
        self._product_found = False
        self.values: dict[Mode, float] = {}

    def _direction(self) -> dict[str, Tensor]:
        """Entries of the weights' sizes, and of a tenth of a typical weight's at least."""
        params = self.objective.params
        floor = 0.1 * typical_size(params)
        return {
            n: _normal(p, self._generator) * max(floor, _size(p)) for n, p in params.items()
        }  # fmt: skip

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
        with _holding(params, moved):
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

    def _product_at(self, size: float) -> Params:
        """H v at w + size v by reverse mode."""
        objective = self.objective
        with pinned(), self._displaced(self.v, size):
            loss = objective.loss(objective.params, self.X, self.y)
            grad = gradient(loss, objective.params, create_graph=True)
            check_graph(*grad.values())
            return {n: p.detach() for n, p in hvp(grad, objective.params, self.v).items()}

    def _first_differences(self) -> Iterator[Params]:
        return _over(self.accuracy.first, self._first_difference)

    @property
    def product(self) -> Params | None:
        """H v by reverse mode where it agrees with differences, else None."""
        if not self._product_found:
            self._product_found = True
            try:
                found = self._product_at(0.0)
            except FAILURES as problem:
                if is_of_the_machine(problem):
                    raise
                return None
            row = compared_gradients(
                "", found, self._first_differences(), self.v, self.accuracy.gradient
            )
            self._product = found if row.verdict == "right" else None
        return self._product

    def _gradients_of_form(self) -> Iterator[Params]:
        def of_products(step: float) -> Params:
            ahead, behind = self._product_at(step), self._product_at(-step)
            return {n: (ahead[n] - behind[n]) / (2 * step) for n in ahead}

        if self.product is not None:
            yield from _over(self.accuracy.first, of_products)
        yield from _over(self.accuracy.second, self._second_difference)

    def scale(self) -> float:
        """The size of the terms that v^T H v is a sum of."""
        product = self.product or next(self._first_differences())
        return sum((product[n] * self.v[n]).abs().sum().item() for n in self.v)

    def hessian(self, mode: Mode) -> list[Row]:
        """Rows for v^T H v, as the penalty on tr(H) takes it, and for its gradient."""
        name = f"{self.prefix}penalty on tr(H), {mode} mode"
        found = self._evaluate(name, self._form(mode), names_module=mode != "taylor")
        if isinstance(found, Row):
            return [found]
        self.values[mode] = found[0]
        return self._judged(name, *found)

    def estimate(self) -> list[Row]:
        """A row for v^T H v as estimates take it."""
        name = f"{self.prefix}estimate, v'Hv"
        found = self._evaluate(name, lambda: inner(self._product_at(0.0), self.v).detach())
        return [found] if isinstance(found, Row) else self._judged(name, *found)

    def estimate_of_ggn(self) -> list[Row]:
        """A row for v^T G v as estimates take it."""
        objective, v, y = self.objective, self.v, self.y
        task, num_terms = objective.task, objective.task.num_terms(y)

        def product() -> Tensor:
            found = ggn_vp(lambda p: objective.outputs(p, self.X), objective.params, v, task, y)
            return inner(found, v).detach()

        @torch.no_grad()
        def outputs_at(size: float) -> Tensor:
            with pinned(), self._displaced(v, size):
                return self._outputs()

        def difference(step: float) -> float:
            pushed = (outputs_at(step) - outputs_at(-step)) / (2 * step)
            return (task.curve(here, y, pushed) * pushed).sum().item() / num_terms

        name, here = f"{self.prefix}estimate, v'Gv", outputs_at(0.0)
        found = self._evaluate(name, product)
        if isinstance(found, Row):
            return [found]
        truths = _over(self.accuracy.first, difference)
        return [compared(f"{name}, value", found[0], truths, self.accuracy.value)]

    def trial(self, mode: Mode, truth: float, scale: float | None) -> Row | None:
        """What keeps a mode from a whole step in the model's own precision, if anything.

        Args:
            mode: Of propagation.
            truth: Its value in double precision.
            scale: The size of the terms that this is a sum of; None where values are too rough.
        """
        name = f"{self.prefix}penalty on tr(H), {mode} mode"
        found = self._evaluate(name, self._form(mode), names_module=mode != "taylor")
        if isinstance(found, Row):
            return found
        if scale is None:
            return None
        value, grads = found
        if grads is not None and not all(torch.isfinite(g).all() for g in grads.values()):
            value = math.nan
        row = compared(name, value, [truth], self.accuracy.value, scale)
        return None if row.verdict == "right" else row

    def _form(self, mode: Mode) -> Callable[[], Tensor]:
        objective = self.objective
        return lambda: quadratic_form(
            lambda p: objective.loss(p, self.X, self.y), objective.params, self.v, mode=mode
        )

    def _judged(self, name: str, value: float, grads: Params | None) -> list[Row]:
        accuracy = self.accuracy
        values = (inner(d, self.v).item() for d in self._first_differences())
        scale = self.scale() if accuracy is IN_SINGLE else 0.0
        rows = [compared(f"{name}, value", value, values, accuracy.value, scale)]
        if grads is not None:
            truths = self._gradients_of_form()
            rows.append(
                compared_gradients(f"{name}, gradient", grads, truths, self.u, accuracy.gradient)
            )
        return rows

    def _evaluate(
        self, name: str, engine: Callable[[], Tensor], *, names_module: bool = True
    ) -> tuple[float, Params | None] | Row:
        """What an engine gives, with its gradient; a row that refuses it where it fails."""
        try:
            with pinned():
                value = engine()
                grads = gradient(value, self.objective.params) if value.requires_grad else None
        except FAILURES as problem:
            if is_of_the_machine(problem):
                raise
            if not names_module:  # another mode knows better which module it is
                return Row(name, "refused", one_line(problem))
            reason = derivative_error(problem, self.objective, self.X)
            if not isinstance(reason, HesstraceError):
                raise reason from problem
            return Row(name, "refused", str(reason))
        return value.item(), grads

    def ggn(self, *, as_function: bool = False) -> list[Row]:
        """Rows for a sample of tr(G), as the penalty on it takes it, and for its gradient.

        Args:
            as_function: Of the parameters, as it is compiled.
        """
        objective, params = self.objective, self.objective.params
        keep = draw_keep(params, scheme="none", keep_prob=1.0, generator=self._generator)
        like = native_outputs(objective.model, self.X).detach()
        signs = rademacher(like, generator=self._generator)
        num_terms = objective.task.num_terms(self.y)

        def ordinary() -> Tensor:
            buffers = {n: b.clone() for n, b in objective.model.named_buffers()}
            with differentiable_ops(order=2):
                raw = functional_call(objective.model, {**params, **buffers}, (self.X,))
                outputs = outputs_of(raw)
            parts = trace_sample(outputs, params, root(outputs), keep, num_terms)
            value = torch.stack(list(parts.values())).sum()
            check_graph(value)
            return value

        def functional() -> Tensor:
            parts = trace_sample_at(
                lambda p: objective.outputs(p, self.X), params, root, keep, num_terms
            )
            return torch.stack(list(parts.values())).sum()

        def root(outputs: Tensor) -> Tensor:
            return objective.task.root(outputs, self.y, signs)

        name = f"{self.prefix}penalty on tr(G)"
        found = self._evaluate(name, functional if as_function else ordinary)
        if isinstance(found, Row):
            return [found]
        value, grads = found
        pulled, slopes = self._pulled(root, num_terms)
        truth = sum(part.square().sum().item() for part in pulled.values()) / num_terms
        rows = [compared(f"{name}, value", value, [truth], self.accuracy.value)]
        if grads is not None:
            rows.append(compared_gradients(
                f"{name}, gradient", grads, slopes, self.u, self.accuracy.gradient
            ))  # fmt: skip
        return rows

    def _pulled(
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
            return dict(zip(params, grads, strict=True))

        with pinned():
            outputs = self._outputs()
        u = root(outputs.detach())
        pulled = pull(outputs, u)
        # Steps are of the weights' sizes.
        size = max(_size(part) for part in pulled.values())
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

        return pulled, _over(self.accuracy.first, difference)


def _reads_parameters_alone(objective: Objective, X: Tensor, generator: Generator) -> bool:
    """Whether moving the weights in place is the same as giving the model moved parameters."""
    model, params = objective.model, objective.params
    check = Check(objective, X, X, generator)
    # The same to the last bit both times, as rounding may grow on its way through batch norms.
    moved_params = {n: p.detach() + _ASIDE * check.v[n] for n, p in params.items()}
    with torch.no_grad(), pinned():
        here = native_outputs(model, X)
    with torch.no_grad(), pinned():
        given = native_outputs(model, X, moved_params)
    with torch.no_grad(), pinned(), _holding(params, moved_params):
        in_place = native_outputs(model, X)
    moved = (in_place - here).abs().max().item()
    rounding = 100 * torch.finfo(here.dtype).eps * here.abs().max().item()
    return (given - in_place).abs().max().item() <= 0.01 * moved + rounding


_ASIDE = 0.01


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
                check.check_gradient()
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


def seeded(like: Tensor, seed: int) -> Generator:
    """A generator on the device of a tensor."""
    return Generator(like.device).manual_seed(seed)
