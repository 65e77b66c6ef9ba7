"""The penalty on the trace of the loss Hessian: SEHT-H and SEHT-D, for H and for G.

    loss + lambda(t) * t(w),   E[t(w)] = tr(H(w)) or tr(G(w))

where lambda(t) rises linearly from 0 to the strength over the warm-up.

Source:
    Liu, Yu, Lin, "Regularizing Deep Neural Networks with Stochastic Estimators of Hessian
    Trace", arXiv 2208.05924.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from hesstrace_cli.autodiff.calls import uses_batch_statistics
from hesstrace_cli.autodiff.graph import Params, check_graph
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.config.schedule import ramp
from hesstrace_cli.curvature.blame import derivative_error
from hesstrace_cli.curvature.checks.derivatives import FAILURES
from hesstrace_cli.curvature.checks.engines import Engine, choose_engine
from hesstrace_cli.curvature.ggn import (
    root_gradient,
    trace_sample_at,
    trace_sample_of_parts,
    traces_of,
)
from hesstrace_cli.curvature.hessian import loss_and_form, quadratic_form
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import Scheme, draw_keep, draw_probe, rademacher
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.failures import is_of_the_machine
from hesstrace_cli.regularizers.base import Coupled, Setting, Step, Term


@dataclass(frozen=True)
class CurvatureChoice:
    """Which matrix the penalty is of, and by which rule.

    Attributes:
        curvature: "hessian" or "ggn".
        reason: One clause for the summary and the table.
    """

    curvature: str
    reason: str


def choose_curvature(asked: str, objective: Objective, X: Tensor) -> CurvatureChoice:
    """Resolve `--curvature auto` for a model in training mode.

    G is chosen for every task: it is never negative, costs about half, and its
    estimate varies less. With batch statistics there is no other choice: tr(H) through them has
    no lower bound, and training on it falls apart.
    """
    if asked != "auto":
        return CurvatureChoice(asked, "as asked for")
    if uses_batch_statistics(objective.model, X):
        return CurvatureChoice("ggn", "auto: batch statistics leave tr(H) without a lower bound")
    return CurvatureChoice("ggn", "auto: tr(G) is never negative and its estimate varies less")


class TracePenalty(Coupled):
    """lambda tr(H) or lambda tr(G) of the batch's mean loss, in training mode.

    Args:
        strength: lambda at full strength, in units of loss per trace.
        config: Estimator, scheme, keep probability, probes, interval, warm-up and curvature.
    """

    name = "trace"
    default = 0.01
    unit = "weight of tr(H) or tr(G)"
    is_penalty = True

    settings = (
        "estimator", "dropout_scheme", "keep_prob", "num_probes", "every", "warmup", "curvature",
    )  # fmt: skip
    logged_as = "penalty_trace"

    def __init__(self, strength: float, config: TrainConfig) -> None:
        super().__init__(strength, config)
        self.scheme: Scheme = "none"
        if config.estimator == "dropout":
            self.scheme = cast(Scheme, config.dropout_scheme)
        self.engine = Engine("taylor", "not checked")
        self._take(CurvatureChoice(config.curvature, "as asked for"))
        self._graph_checked = False
        self._compiled: Callable[..., Tensor] | None = None

    def _take(self, choice: CurvatureChoice) -> None:
        self.choice = choice
        # Compiled, the penalty takes a forward pass of its own.
        self.order = 2 if self.of_g and not self.config.compile else 1
        self.in_parts = self.order == 2 or not self.of_g

    @property
    def of_g(self) -> bool:
        """Whether the penalty is on tr(G)."""
        return self.choice.curvature == "ggn"

    def prepare(self, setting: Setting) -> None:
        """Choose the curvature, and the derivatives to take by a trial on some of the first batch.

        Raises:
            ConfigError: If the run is too short for the penalty to be added once.
            DerivativeError: If no derivative is right for this model.
        """
        config, objective = self.config, setting.objective
        if 1 < setting.total_steps <= config.every and config.warmup > 0:
            raise ConfigError(
                f"--every is {config.every}, but the run has {setting.total_steps} steps: the "
                "penalty would never be added"
            )
        self._take(choose_curvature(config.curvature, objective, setting.X[:2]))
        engine = choose_engine(
            objective, setting.X, setting.y, curvature=self.choice.curvature,
            compiled=config.compile, single=config.precision == "float32", seed=config.seed,
            first=setting.num_tried,
        )  # fmt: skip
        self.engine = setting.ranks.from_first(engine)

    def description(self) -> dict[str, Any]:
        """What the penalty is of, by which rule and derivatives, and its settings."""
        settings = {n: getattr(self.config, n) for n in self.settings if n != "curvature"}
        engine = dataclasses.asdict(self.engine)
        del engine["others"]
        return {**dataclasses.asdict(self.choice), **engine, **settings}

    def strength_at(self, progress: float) -> float:
        """Lambda after this share of the run."""
        return self.strength * ramp(self.config.warmup, progress)

    def _is_active(self, index: int, progress: float) -> bool:
        return self.strength_at(progress) > 0 and index % self.config.every == 0

    def gather(self, step: Step) -> list[Tensor]:
        """For tr(G), which is not additive: each probe's sum over the examples."""
        if not self.of_g or not self._is_active(step.index, step.progress):
            return []
        return [g for _, grads in self._root_gradients(step) for g in grads.values()]

    def term(self, step: Step) -> Term | None:
        """The unbiased sample of the trace, averaged over the probes."""
        if not self._is_active(step.index, step.progress):
            return None
        of_g, loss = self.of_g, None
        try:
            if self.config.compile:
                samples = self._compiled_samples(step)
            else:
                samples = self._ggn_samples(step) if of_g else []
                if not of_g:
                    samples, loss = self._hessian_samples(step)
            value = torch.stack(samples).mean()
            if not self._graph_checked:
                check_graph(value)
                self._graph_checked = True
        except (RuntimeError, NotImplementedError) as problem:
            raise derivative_error(problem, step.objective, step.X) from problem
        is_mean = self.config.compile or (of_g and self.gathered(step) is None)
        is_whole = of_g and not is_mean
        strength = self.strength_at(step.progress)
        return Term(strength, value, is_mean=is_mean, is_whole=is_whole, loss=loss)

    def gives_loss(self, index: int, progress: float) -> bool:
        """For tr(H) by Taylor propagation."""
        by_taylor = not self.of_g and self.engine.engine == "taylor"
        return by_taylor and not self.config.compile and self._is_active(index, progress)

    def _root_gradients(self, step: Step) -> Iterator[tuple[Params, dict[str, Tensor]]]:
        """For every probe what is kept, and sum_m J_m^T B_m e_m over this part's terms."""
        params, outputs, part = step.objective.params, step.outputs, step.part
        generator = step.shared_generator()
        for _ in range(self.config.num_probes):
            keep = draw_keep(
                params, scheme=self.scheme, keep_prob=self.config.keep_prob, generator=generator
            )
            like = outputs.new_empty((part.num_examples, *outputs.shape[1:]))
            signs = rademacher(like, generator=generator)
            if not part.is_whole:
                signs = signs[part.rows.to(signs.device, non_blocking=True)]
            cotangent = step.objective.task.root(outputs, step.targets, signs)
            yield keep, root_gradient(outputs, params, cotangent, keep)

    def _ggn_samples(self, step: Step) -> list[Tensor]:
        samples, num_terms = [], step.part.num_terms
        gathered = self.gathered(step)
        sums = iter(gathered or ())
        for keep, local in self._root_gradients(step):
            if gathered is None:
                parts = traces_of(local, keep, num_terms)
                samples.append(torch.stack(list(parts.values())).sum())
            else:
                whole = {n: next(sums) for n in local}
                samples.append(trace_sample_of_parts(local, whole, keep, num_terms))
        return samples

    def _compiled_samples(self, step: Step) -> list[Tensor]:
        """The sample as one compiled function; what is dropped is multiplied by 0 there."""
        params, generator = step.objective.params, step.shared_generator()
        drawn = []
        for _ in range(self.config.num_probes):
            settings: dict[str, Any] = {
                "scheme": self.scheme, "keep_prob": self.config.keep_prob, "generator": generator
            }  # fmt: skip
            if self.of_g:
                keep = draw_keep(params, **settings)
                zero = step.outputs.new_zeros(())
                factors = {name: keep.get(name, zero) for name in params}
                drawn.append((rademacher(step.outputs, generator=generator), factors))
            else:
                probe = draw_probe(params, **settings)
                zeros = {n: torch.zeros_like(p) for n, p in params.items()}
                drawn.append((step.outputs.new_zeros(()), zeros | probe))
        if not self._graph_checked:  # by the same function, before it is compiled
            given = (params, step.X, step.targets, *drawn[0])
            check_graph(_sample(step.objective, self.choice.curvature, *given))
            self._graph_checked = True
        if self._compiled is None:
            sample = partial(_sample, step.objective, self.choice.curvature)
            self._compiled = torch.compile(sample, dynamic=False)
        return [self._compiled(params, step.X, step.targets, *each) for each in drawn]

    def _hessian_samples(self, step: Step) -> tuple[list[Tensor], Tensor | None]:
        """This part's share of v^T H v for each probe, and of the loss where a pass gave it."""
        objective, generator = step.objective, step.shared_generator()
        probes = [
            draw_probe(objective.params, scheme=self.scheme, keep_prob=self.config.keep_prob,
                       generator=generator)
            for _ in range(self.config.num_probes)
        ]  # fmt: skip

        def loss(params: Params) -> Tensor:
            # Weighted in here, as synced norms sum what is differentiated over the parts.
            return step.part.share * objective.loss(params, step.X, step.targets)

        engine = self.engine
        for mode in (engine.engine, *engine.others):
            try:
                if mode == "taylor":
                    pairs = [loss_and_form(loss, objective.params, v) for v in probes]
                    return [form for _, form in pairs], pairs[0][0]
                forms = [quadratic_form(loss, objective.params, v, mode=mode) for v in probes]
                return forms, None if step.loss.requires_grad else loss(objective.params)
            except FAILURES as problem:
                if is_of_the_machine(problem):
                    raise
                # What this batch does may have no rule; another mode was found right as well. Not
                # kept for later steps: a resumed run would not know of it.
                failed = problem
        raise failed


def _sample(
    objective: Objective, curvature: str, params: Params, X: Tensor, y: Tensor, signs: Tensor,
    parts: Params,
) -> Tensor:  # fmt: skip
    """One sample as a function of its arguments; `parts` are G's factors, or H's probe."""
    task = objective.task
    if curvature == "ggn":
        traces = trace_sample_at(
            lambda p: objective.outputs(p, X), params, lambda f: task.root(f, y, signs), parts,
            task.num_terms(y),
        )  # fmt: skip
        return torch.stack(list(traces.values())).sum()
    return quadratic_form(lambda p: objective.loss(p, X, y), params, parts, mode="forward")
