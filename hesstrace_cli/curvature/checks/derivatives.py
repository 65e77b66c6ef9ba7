"""The derivatives that penalties and estimates take of a model, each with its verdict."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.calls import native_outputs, recorded_outputs
from hesstrace_cli.autodiff.graph import Params, check_graph, gradient, inner
from hesstrace_cli.curvature.blame import derivative_error
from hesstrace_cli.curvature.checks.differences import (
    IN_DOUBLE,
    IN_SINGLE,
    Accuracy,
    Differences,
)
from hesstrace_cli.curvature.checks.norm_rules import rule_rows
from hesstrace_cli.curvature.checks.verdicts import (
    Row,
    compared,
    compared_gradients,
    one_line,
    pinned,
)
from hesstrace_cli.curvature.ggn import ggn_vp, trace_sample, trace_sample_at
from hesstrace_cli.curvature.hessian import Mode, quadratic_form
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import draw_keep, rademacher
from hesstrace_cli.errors import HesstraceError
from hesstrace_cli.failures import FAILURES, is_of_the_machine


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
        self.differences = Differences(objective, X, y, generator, accuracy)
        self.v, self.u = self.differences.v, self.differences.u
        self.values: dict[Mode, float] = {}

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
        found = self._evaluate(
            name, lambda: inner(self.differences.product_at(0.0), self.v).detach()
        )
        return [found] if isinstance(found, Row) else self._judged(name, *found)

    def estimate_of_ggn(self) -> list[Row]:
        """A row for v^T G v as estimates take it."""
        objective, v = self.objective, self.v

        def product() -> Tensor:
            found = ggn_vp(
                lambda p: objective.outputs(p, self.X), objective.params, v, objective.task, self.y
            )
            return inner(found, v).detach()

        name = f"{self.prefix}estimate, v'Gv"
        found = self._evaluate(name, product)
        if isinstance(found, Row):
            return [found]
        truths = self.differences.forms_with_ggn()
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
        values = (inner(d, self.v).item() for d in self.differences.products())
        scale = self.differences.scale() if accuracy is IN_SINGLE else 0.0
        rows = [compared(f"{name}, value", value, values, accuracy.value, scale)]
        if grads is not None:
            truths = self.differences.gradients_of_form()
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

    def norm_rules(self) -> list[Row]:
        """Rows for every rule of per-example norms that the model uses."""
        return rule_rows(
            self.objective, self.X, self._generator, direction=self.u, accuracy=self.accuracy,
            prefix=self.prefix,
        )  # fmt: skip

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
            outputs = recorded_outputs(objective.model, params, self.X, by_example=False)
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
        pulled, slopes = self.differences.pulled(root, num_terms)
        truth = sum(part.square().sum().item() for part in pulled.values()) / num_terms
        rows = [compared(f"{name}, value", value, [truth], self.accuracy.value)]
        if grads is not None:
            rows.append(compared_gradients(
                f"{name}, gradient", grads, slopes, self.u, self.accuracy.gradient
            ))  # fmt: skip
        return rows
