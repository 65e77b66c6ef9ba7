"""The rules of per-example norms against autograd, example by example: value and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.calls import recorded_outputs
from hesstrace_cli.autodiff.casting import cast, on_copies
from hesstrace_cli.autodiff.differentiable import held_statistics
from hesstrace_cli.autodiff.graph import Params, check_graph, gradient
from hesstrace_cli.curvature.checks.differences import IN_DOUBLE, IN_SINGLE, Accuracy
from hesstrace_cli.curvature.checks.displaced import move_aside, seeded
from hesstrace_cli.curvature.checks.verdicts import (
    NOT_FINITE,
    Row,
    compared_gradients,
    one_line,
    pinned,
)
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.independence import column
from hesstrace_cli.curvature.per_example.norms import check_layouts, gradients
from hesstrace_cli.curvature.per_example.registry import FUNCTION_RULES, LAYER_RULES
from hesstrace_cli.curvature.per_example.rules.layout import Layout, Norms
from hesstrace_cli.curvature.per_example.uses import Use, find_uses
from hesstrace_cli.errors import DerivativeError, HesstraceError
from hesstrace_cli.failures import FAILURES, is_of_the_machine

_EXAMPLES = 4


@dataclass(frozen=True)
class _Pass:
    """A forward pass and the uses whose examples' rows are known; each example's direction u_i."""

    objective: Objective
    outputs: Tensor
    uses: Sequence[Use]
    layouts: dict[str, Layout]
    u: Tensor

    @classmethod
    def of(cls, objective: Objective, X: Tensor, generator: Generator, *, of_users: bool) -> _Pass:
        """Of some examples."""
        with pinned():
            outputs = recorded_outputs(objective.model, objective.params, X[:_EXAMPLES])
        uses = [
            use for use in find_uses(outputs, objective.params) if use.users or not of_users
        ]  # fmt: skip
        with held_statistics():
            layouts = check_layouts(outputs, uses)
        uses = [use for use in uses if layouts.keys() >= set(use.names.values())]
        draw = torch.randn(outputs.shape, generator=generator, device=X.device, dtype=torch.float64)
        return cls(objective, outputs, uses, layouts, draw.to(outputs.dtype))

    def by_rules(self, uses: Sequence[Use]) -> Norms:
        """||J_i^T u_i||^2, (N,) by name."""
        with held_statistics():
            grads = gradients(self.outputs, uses, self.u, create_graph=True)
        norms: Norms = {}
        for use, g in zip(uses, grads, strict=True):
            norms |= use.squares(g, self.layouts[next(iter(use.names.values()))])
        return norms

    def by_autograd(self, uses: Sequence[Use]) -> Norms:
        """The same, each example differentiated by itself."""
        params = self.objective.params
        names = [name for use in uses for name in use.names.values()]
        rows = []
        for i in range(len(self.outputs)):
            only = torch.zeros_like(self.u[:, :1].flatten(1)[:, 0])
            only[i] = 1
            with held_statistics(with_weights=True):
                grads = torch.autograd.grad(
                    self.outputs, [params[name] for name in names], self.u * column(only, self.u),
                    create_graph=True, materialize_grads=True,
                )  # fmt: skip
            rows.append([g.square().sum() for g in grads])
        squares = zip(*rows, strict=True)
        return {n: torch.stack(list(own)) for n, own in zip(names, squares, strict=True)}


def rule_rows(
    objective: Objective, X: Tensor, generator: Generator, *,
    direction: Params, accuracy: Accuracy = IN_DOUBLE, prefix: str = "", of_users: bool = False,
) -> list[Row]:  # fmt: skip
    """A row for the norms of every rule that a model uses, and one for their gradient.

    Args:
        objective: Its model in its mode.
        X: A batch, of which a few examples are taken.
        generator: Of the examples' directions.
        direction: With entries of the weights' sizes, see `compared_gradients`.
        accuracy: To be expected of the model's precision.
        prefix: Of the rows' names.
        of_users: Whether only rules are looked at that are not built in.
    """
    found = _Pass.of(objective, X, generator, of_users=of_users)
    rows: list[Row] = []
    for kind in dict.fromkeys(use.kind for use in found.uses):
        uses = [use for use in found.uses if use.kind == kind]
        name = f"{prefix}norm rule of {kind}"
        try:
            rows += _judged(name, found, uses, direction, accuracy)
        except HesstraceError as problem:
            rows.append(Row(name, "wrong", str(problem)))
        except FAILURES as problem:
            if is_of_the_machine(problem):
                raise
            rows.append(Row(name, "refused", one_line(problem)))
    return rows


def _judged(
    name: str, found: _Pass, uses: Sequence[Use], direction: Params, accuracy: Accuracy
) -> list[Row]:
    by_rules, truth = found.by_rules(uses), found.by_autograd(uses)
    check_graph(*(norms for norms in by_rules.values() if norms.requires_grad))
    rows = [_of_values(f"{name}, value", by_rules, truth, accuracy.value)]
    weights = torch.arange(1, len(found.outputs) + 1).to(found.u)  # so that no two may be swapped
    slopes = [
        gradient(torch.stack([(weights * own).sum() for own in norms.values()]).sum(),
                 found.objective.params)
        for norms in (by_rules, truth)
    ]  # fmt: skip
    rows.append(compared_gradients(
        f"{name}, gradient", slopes[0], [slopes[1]], direction, accuracy.gradient,
        by="by autograd",
    ))  # fmt: skip
    return rows


def _of_values(name: str, found: Norms, truth: Norms, tolerance: float) -> Row:
    if not all(torch.isfinite(norms).all() for norms in found.values()):
        return Row(name, "wrong", NOT_FINITE)
    least = 1e-9 * max(own.max().item() for own in truth.values())
    errors = {
        n: ((found[n] - own).abs().max() / max(own.max().item(), least, 1e-30)).item()
        for n, own in truth.items()
    }  # fmt: skip
    at = max(errors, key=errors.__getitem__)
    detail = f"{len(found)} tensors; off by {errors[at]:.2g} of its size in {at!r}"
    return Row(name, "right" if errors[at] <= tolerance else "wrong", detail)


def refuse_wrong_rules(objective: Objective, X: Tensor) -> None:
    """Hold the users' rules that a model uses against autograd, on copies of its weights.

    Args:
        objective: Its model in the mode that the rules are used in.
        X: A batch, of which a few examples are taken.

    Raises:
        DerivativeError: If one is wrong.
    """
    if not (LAYER_RULES or FUNCTION_RULES):
        return
    with pinned():
        outputs = recorded_outputs(objective.model, objective.params, X[:_EXAMPLES])
    if not any(use.users for use in find_uses(outputs, objective.params)):
        return
    generator = seeded(X, 0)
    for accuracy in (IN_DOUBLE, IN_SINGLE):
        double = accuracy is IN_DOUBLE
        with on_copies(objective.model, double=double):
            move_aside(objective.params, generator)
            batch = cast(X, torch.float64) if double else X
            try:
                rows = rule_rows(
                    objective, batch, generator, direction=objective.params, accuracy=accuracy,
                    of_users=True,
                )  # fmt: skip
            except FAILURES as problem:
                if is_of_the_machine(problem) or not double:
                    raise
                continue  # it cannot run in double precision
        bad = [row for row in rows if row.verdict != "right"]
        if bad:
            raise DerivativeError(
                f"{bad[0].check} is {bad[0].verdict} ({bad[0].detail}), held against every "
                "example's own gradient; mend the rule; hesstrace verify says more"
            )
        return
