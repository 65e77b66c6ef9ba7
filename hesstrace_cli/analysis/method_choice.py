"""Which estimator a trace is taken with, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from hesstrace_cli.autodiff.calls import native_outputs
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.checks.norm_rules import refuse_wrong_rules
from hesstrace_cli.curvature.detached import Detached
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.independence import MixedExamples, Unfit
from hesstrace_cli.curvature.probes import EVERYTHING, Inclusion, Scheme, inclusion
from hesstrace_cli.curvature.trace.estimators import (
    Sampler,
    control_variate_sampler,
    diagonal_sampler,
    exact_sampler,
    ggn_sampler,
    hessian_sampler,
    signs_sampler,
)
from hesstrace_cli.curvature.trace.exact import Curved, PerExampleTrace
from hesstrace_cli.errors import ConfigError

MAX_COLUMNS = 31
"""With more columns than this an example, as of 32 classes, random signs stand for them."""

DEFAULT_PROBES = 2
"""Per batch and pass; also the random signs per example."""

MAX_DIAGONAL = 256
"""Up to so many weights the whole diagonal of H is taken."""


@dataclass(frozen=True)
class Method:
    """An estimator ready to draw.

    Attributes:
        name: The one used, as the record says.
        reason: One clause that says why.
        sampler: Draws its samples on a batch.
        exact: Whether they have no error.
        inclusion: What a probe leaves out.
        by_products: Whether it takes products with H or G, not first derivatives alone.
    """

    name: str
    reason: str
    sampler: Sampler
    exact: bool = False
    inclusion: Inclusion = EVERYTHING
    by_products: bool = True


def choose_method(
    config: EstimateConfig, objective: Objective, X: Tensor, unfit: Sequence[Unfit] = ()
) -> Method:
    """The estimator that `--method` asks for, or the best one for this model.

    Args:
        config: Method, curvature, and the dropout scheme's settings.
        objective: The loss, its model in the mode that the trace is taken in.
        X: A batch to look at what the model executes.
        unfit: What is known to keep methods from being right: that which this function has raised
            for this model, or the methods that it chose have.

    Raises:
        ConfigError: If "exact" is asked for and there is no exact way for this model.
        DerivativeError: If a user's norm rule is wrong.
        Unfit: If a method turns out not to be right; one more call, told so, chooses another.
    """
    detached = next((p for p in unfit if isinstance(p, Detached)), None)
    if config.method in ("hutchinson", "dropout"):
        scheme: Scheme = "none"
        if config.method == "dropout":
            scheme = cast(Scheme, config.dropout_scheme)
        make = ggn_sampler if config.curvature == "ggn" else hessian_sampler
        reason = "as asked for" if detached is None else f"as asked for; {detached}"
        sampler = make(objective, scheme, config.keep_prob)
        included = inclusion(objective.params, scheme, config.keep_prob)
        return Method(config.method, reason, sampler, inclusion=included)
    curved = next((p for p in unfit if isinstance(p, Curved)), None)
    inseparable = next((p for p in unfit if isinstance(p, MixedExamples)), detached)
    is_hessian = config.curvature == "hessian"
    per_example = None
    if inseparable is None:
        refuse_wrong_rules(objective, X)
        per_example = PerExampleTrace(objective, X, linear=is_hessian and curved is None)
        if curved is None:
            return _of_ggn(config, per_example, X)
    problem = inseparable or curved
    num_parameters = sum(p.numel() for p in objective.params.values())
    if is_hessian and num_parameters <= MAX_DIAGONAL and detached is None:
        reason = f"the whole diagonal of {num_parameters} weights, as {problem}"
        return Method("exact", reason, diagonal_sampler(objective), exact=True)
    if config.method == "exact":
        other = "--curvature ggn, or " if is_hessian and inseparable is None else ""
        raise ConfigError(
            f"--method exact is not possible for this model: {problem}; use {other}--method auto"
        )
    if per_example is None:
        make = ggn_sampler if config.curvature == "ggn" else hessian_sampler
        return Method("hutchinson", str(problem), make(objective))
    by_signs = _num_columns(objective, X) > MAX_COLUMNS
    return Method(
        "signs+hutchinson" if by_signs else "exact+hutchinson",
        f"tr(G) {'by signs' if by_signs else 'exactly'}, H - G by Hutchinson: {problem}",
        control_variate_sampler(objective, per_example, by_signs=by_signs),
    )


def _of_ggn(config: EstimateConfig, per_example: PerExampleTrace, X: Tensor) -> Method:
    is_ggn = config.curvature == "ggn"
    equal = "tr(G)" if is_ggn else "tr(H) = tr(G), the model being piecewise linear,"
    if per_example.is_closed:
        reason = f"{equal} of a linear output layer in closed form"
        return Method("exact", reason, exact_sampler(per_example), exact=True)
    num_columns = _num_columns(per_example.objective, X)
    if num_columns > MAX_COLUMNS:
        reason = f"{equal} by random signs on the outputs, as {num_columns} columns are too many"
        return Method("signs", reason, signs_sampler(per_example), by_products=False)
    reason = f"{equal} from every example's gradient norms"
    sampler = exact_sampler(per_example)
    return Method("exact", reason, sampler, exact=True, by_products=False)


def _num_columns(objective: Objective, X: Tensor) -> int:
    return objective.task.num_columns(native_outputs(objective.model, X[:1]))
