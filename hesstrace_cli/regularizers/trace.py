"""The penalty on the trace of the loss Hessian: SEHT-H and SEHT-D, for H and for G.

    loss + lambda(t) * t(w),   E[t(w)] = tr(H(w)) or tr(G(w))

where lambda(t) rises linearly from 0 to the strength over the warm-up.

Source:
    Liu, Yu, Lin, "Regularizing Deep Neural Networks with Stochastic Estimators of Hessian
    Trace", arXiv 2208.05924.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesstrace_cli.config import TrainConfig
from hesstrace_cli.curvature.ggn import trace_sample
from hesstrace_cli.curvature.graph import check_graph
from hesstrace_cli.curvature.hessian import Mode, quadratic_form
from hesstrace_cli.curvature.objective import Objective, uses_batch_statistics
from hesstrace_cli.curvature.probes import Scheme, draw_keep, draw_probe, rademacher
from hesstrace_cli.curvature.refusal import refuse
from hesstrace_cli.regularizers.base import Regularizer, Step, Term


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

    G is chosen for every softmax cross-entropy: it is never negative, costs about half, and its
    estimate varies less. With batch statistics there is no other choice: tr(H) through them has
    no lower bound, and training on it falls apart.
    """
    if asked != "auto":
        return CurvatureChoice(asked, "as asked for")
    if uses_batch_statistics(objective.model, X):
        return CurvatureChoice("ggn", "auto: batch statistics leave tr(H) without a lower bound")
    return CurvatureChoice("ggn", "auto: tr(G) is never negative and its estimate varies less")


class TracePenalty(Regularizer):
    """lambda tr(H) or lambda tr(G) of the batch's mean loss, in training mode.

    Args:
        strength: lambda at full strength, in units of loss per trace.
        config: Estimator, scheme, keep probability, probes, interval, warm-up, and the curvature,
            already resolved.
    """

    def __init__(self, strength: float, config: TrainConfig) -> None:
        super().__init__(strength, config)
        self.order = 2 if config.curvature == "ggn" else 1
        self.scheme: Scheme = "none"
        if config.estimator == "dropout":
            self.scheme = "entry" if config.dropout_scheme == "entry" else "tensor"
        self._mode: Mode = "forward"
        self._graph_checked = False

    def weight(self, progress: float) -> float:
        """Lambda after this share of the run."""
        warmup = self.config.warmup
        return self.strength * (min(1.0, progress / warmup) if warmup > 0 else 1.0)

    def term(self, step: Step) -> Term | None:
        """The unbiased sample of the trace, averaged over the probes."""
        weight = self.weight(step.progress)
        if weight == 0 or step.index % self.config.every:
            return None
        sample = self._ggn_sample if self.config.curvature == "ggn" else self._hessian_sample
        try:
            value = torch.stack([sample(step) for _ in range(self.config.num_probes)]).mean()
            if not self._graph_checked:
                check_graph(value)
                self._graph_checked = True
        except (RuntimeError, NotImplementedError) as problem:
            raise refuse(problem, step.objective, step.X) from problem
        return Term(weight, value)

    def _ggn_sample(self, step: Step) -> Tensor:
        keep = draw_keep(
            step.objective.params, scheme=self.scheme, keep_prob=self.config.keep_prob,
            generator=step.generator,
        )  # fmt: skip
        signs = rademacher(step.logits, generator=step.generator)
        parts = trace_sample(step.logits, step.objective.params, signs, keep)
        return torch.stack(list(parts.values())).sum()

    def _hessian_sample(self, step: Step) -> Tensor:
        objective = step.objective
        probe = draw_probe(
            objective.params, scheme=self.scheme, keep_prob=self.config.keep_prob,
            generator=step.generator,
        )  # fmt: skip

        def form(mode: Mode) -> Tensor:
            return quadratic_form(
                lambda p: objective.loss(p, step.X, step.targets),
                objective.params,
                probe,
                mode=mode,
            )

        if self._mode == "forward":
            try:
                return form("forward")
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError):
                # An operation without a forward derivative; reverse mode may still have all three.
                self._mode = "reverse"
        return form("reverse")
