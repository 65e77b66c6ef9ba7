"""The penalty on the trace of the loss Hessian: SEHT-H and SEHT-D, for H and for G.

    loss + lambda(t) * t(w),   E[t(w)] = tr(H(w)) or tr(G(w))

where lambda(t) rises linearly from 0 to the strength over the warm-up.

Source:
    Liu, Yu, Lin, "Regularizing Deep Neural Networks with Stochastic Estimators of Hessian
    Trace", arXiv 2208.05924.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.calls import hooks_off, recorded_outputs, uses_batch_statistics
from hesstrace_cli.autodiff.graph import Params, check_graph
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.config.schedule import ramp
from hesstrace_cli.curvature.blame import naming_fault
from hesstrace_cli.curvature.checks.engines import Engine, choose_engine
from hesstrace_cli.curvature.checks.norm_rules import refuse_wrong_rules
from hesstrace_cli.curvature.hessian import Mode
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.by_example import ByExample
from hesstrace_cli.curvature.probes import Draws, Scheme
from hesstrace_cli.curvature.trace_penalty import (
    CompiledSamples,
    batch_samples,
    hessian_samples,
    root_gradients,
    samples_of_parts,
)
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.randomness import random_state_kept
from hesstrace_cli.regularizers.base import Coupled, Setting, Step, Term


@dataclass(frozen=True)
class FormChoice:
    """Whether tr(G) is taken by example, and by which rule.

    Attributes:
        form: "example" or "batch".
        form_reason: One clause for the summary.
    """

    form: str
    form_reason: str


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


def choose_form(config: TrainConfig, objective: Objective, X: Tensor) -> FormChoice:
    """Resolve `--form auto` of tr(G) for a model in training mode.

    By example, where examples do not meet in batch statistics: there it ended at no higher test
    loss and a lower trace (docs/results.md). Labels drawn and compiled models leave no choice.
    """
    if config.form != "auto":
        return FormChoice(config.form, "as asked for")
    if config.draw == "labels":
        return FormChoice("batch", "auto: labels are drawn, as for the Fisher penalty")
    if config.compile:
        return FormChoice("batch", "auto: by example a compiled model has no graph to read")
    if uses_batch_statistics(objective.model, X):
        return FormChoice("batch", "auto: the model takes batch statistics")
    return FormChoice("example", "auto: no batch statistics, and far less noise")


class TraceRegularizer(Coupled):
    """lambda tr(H) or lambda tr(G) of the batch's mean loss, in training mode.

    Args:
        strength: lambda at full strength, in units of loss per trace.
        config: Estimator, scheme, keep probability, probes, interval, warm-up and curvature.
    """

    name = "trace"
    default = 0.01
    unit = "weight of tr(H) or tr(G)"
    is_penalty = True
    alone_to = "penalize the trace"

    settings = (
        "estimator", "dropout_scheme", "keep_prob", "num_probes", "every", "warmup", "curvature",
        "form", "penalty_examples", "draw",
    )  # fmt: skip
    logged_as = "penalty_trace"
    holds: ClassVar[bool] = False
    """Whether A of tr(G), the curvature of the loss in the outputs, counts as constant."""

    def __init__(self, strength: float, config: TrainConfig) -> None:
        super().__init__(strength, config)
        drops = config.estimator == "dropout"
        self.draws = Draws(
            scheme=cast(Scheme, config.dropout_scheme) if drops else "none",
            keep_prob=config.keep_prob, num_probes=config.num_probes,
            labels=config.draw == "labels",
        )  # fmt: skip
        self.engine = Engine("taylor", "not checked")
        self._take(
            CurvatureChoice(config.curvature, "as asked for"), FormChoice("batch", "not chosen yet")
        )
        self._examples = ByExample()
        self._graph_checked = False
        self._compiled: CompiledSamples | None = None

    def _take(self, choice: CurvatureChoice, form: FormChoice) -> None:
        self.choice, self.form = choice, form
        # Compiled, or of fewer examples, the penalty takes a forward pass of its own.
        self.order = 2 if self.of_g and not self.config.compile and not self.is_of_some else 1
        self.in_parts = not self.config.compile or not self.of_g

    @property
    def is_of_some(self) -> bool:
        """Whether the penalty is of a random part of the batch."""
        return self.config.penalty_examples < 1

    @property
    def by_example(self) -> bool:  # type: ignore[override]
        """Whether tr(G) is taken by example."""
        return self.of_g and self.form.form == "example"

    @property
    def of_g(self) -> bool:
        """Whether the penalty is on tr(G)."""
        return self.choice.curvature == "ggn"

    def prepare(self, setting: Setting) -> None:
        """Choose the curvature, and the derivatives to take by a trial on some of the first batch.

        Raises:
            ConfigError: If the run is too short for the penalty to be added once, or there are no
                labels to draw.
            DerivativeError: If no derivative is right for this model.
        """
        config, objective = self.config, setting.objective
        if 1 < setting.total_steps <= config.every and config.warmup > 0:
            raise ConfigError(
                f"--every is {config.every}, but the run has {setting.total_steps} steps: the "
                "penalty would never be added"
            )
        if self.draws.labels and not objective.task.has_labels:
            raise ConfigError(
                f"--draw labels takes the outputs for a distribution of labels, and those of "
                f"--task {objective.task.name} are none; leave it out"
            )
        self._take(
            choose_curvature(config.curvature, objective, setting.X[:2]),
            choose_form(config, objective, setting.X[:2]),
        )
        with hooks_off(objective.model):
            engine = choose_engine(
                objective, setting.X, setting.y, curvature=self.choice.curvature,
                compiled=config.compile, single=config.precision == "float32", seed=config.seed,
                first=setting.num_tried,
            )  # fmt: skip
        self.engine = setting.ranks.from_first(engine)
        if self.by_example:
            self._examine(setting)

    @property
    def reads_weights(self) -> str | None:  # type: ignore[override]
        """Differentiating twice in the weights themselves, as all but the form by example does."""
        if not self.of_g:
            return "tr(H) differentiates in the weights; --curvature ggn --form example does not"
        if self.is_of_some:
            return "--penalty-examples takes a pass of its own"
        if not self.by_example:
            return "the batch's norm differentiates in the weights; --form example does not"
        ways = self._examples.taken(self.draws)
        whole = [name for name, way in ways.items() if way.kind == "batch"]
        if whole:
            return f"{whole[0]} has no norm by example ({ways[whole[0]].reason})"
        return None

    def _examine(self, setting: Setting) -> None:
        """Find out which parameters go by example; where none does, the batch's norm is taken."""
        objective, X = setting.objective, setting.X[: setting.num_tried]
        with random_state_kept():
            outputs = recorded_outputs(objective.model, objective.params, X)
        refuse_wrong_rules(objective, X)
        self._examples.examine(outputs, objective.params, objective.task)
        form = "batch" if self._examples.is_batch else "example"
        self.form = FormChoice(form, self._examples.described(self.draws))

    def description(self) -> dict[str, Any]:
        """What the penalty is of, by which rule and derivatives, and its settings."""
        settings = {n: getattr(self.config, n) for n in self.settings if n != "curvature"}
        engine = dataclasses.asdict(self.engine)
        del engine["others"]
        form = dataclasses.asdict(self.form) if self.of_g else {}
        held = {"hold_logit_curvature": self.holds}
        return {**dataclasses.asdict(self.choice), **engine, **settings, **form, **held}

    def strength_at(self, progress: float) -> float:
        """Lambda after this share of the run."""
        return self.strength * ramp(self.config.warmup, progress)

    def _is_active(self, index: int, progress: float) -> bool:
        return self.strength_at(progress) > 0 and index % self.config.every == 0

    def gathers(self, index: int, progress: float) -> bool:
        """For the batch's norm, which is not additive."""
        is_norm_of_batch = self.of_g and not self.by_example and not self.is_of_some
        return is_norm_of_batch and self._is_active(index, progress)

    def gather(self, step: Step) -> list[Tensor]:
        """Each probe's sum over the examples."""
        with hooks_off(step.objective.model):
            return [g for _, grads in self._root_gradients(step) for g in grads.values()]

    def term(self, step: Step) -> Term | None:
        """The unbiased sample of the trace, averaged over the probes."""
        if not self._is_active(step.index, step.progress):
            return None
        with naming_fault(step.objective, step.X), hooks_off(step.objective.model):
            samples, loss = self._samples(step)
            value = torch.stack(samples).mean()
            if not self._graph_checked:
                check_graph(value)
                self._graph_checked = True
        is_norm_of_parts = self.of_g and self.gathered(step) is not None
        is_mean = self.config.compile or (self.of_g and not is_norm_of_parts)
        strength = self.strength_at(step.progress)
        return Term(strength, value, is_mean=is_mean, is_whole=is_norm_of_parts, loss=loss)

    def gives_loss(self, index: int, progress: float) -> bool:
        """For tr(H) by Taylor propagation."""
        by_taylor = not self.of_g and self.engine.engine == "taylor" and not self.is_of_some
        return by_taylor and not self.config.compile and self._is_active(index, progress)

    def _root_gradients(self, step: Step) -> Iterator[tuple[Params, Params]]:
        """For every probe what is kept, and sum_m J_m^T B_m e_m over this part's terms."""
        part = step.part
        return root_gradients(
            step.outputs, step.objective.params, step.objective.task, step.targets,
            draws=self.draws, generator=step.shared_generator(),
            rows=None if part.is_whole else part.rows, num_examples=part.num_examples,
            hold=self.holds,
        )  # fmt: skip

    def _samples(self, step: Step) -> tuple[list[Tensor], Tensor | None]:
        """One sample a probe, and this part's share of the plain loss where a pass gave it."""
        objective, generator = step.objective, step.shared_generator()
        if self.is_of_some:
            return self._samples_of_some(step), None
        if self.config.compile:
            return self._compiled_samples(
                objective, step.X, step.targets, step.outputs, generator
            ), None
        if not self.of_g:
            samples, loss = hessian_samples(
                objective, step.X, step.targets, draws=self.draws, generator=generator,
                modes=self._modes, share=step.part.share,
            )  # fmt: skip
            if loss is None and not step.loss.requires_grad:
                loss = step.part.share * objective.loss(objective.params, step.X, step.targets)
            return samples, loss
        sums = self.gathered(step)
        if sums is not None:
            return samples_of_parts(self._root_gradients(step), sums, step.part.num_terms), None
        if not self.by_example:
            return batch_samples(
                step.outputs, objective.params, objective.task, step.targets, draws=self.draws,
                generator=generator, hold=self.holds,
            ), None  # fmt: skip
        return self._examples.samples(
            step.outputs, objective.params, objective.task, step.targets, draws=self.draws,
            generator=generator, rows=None if step.part.is_whole else step.part.rows,
            num_examples=step.part.num_examples, hold=self.holds,
        ), None  # fmt: skip

    def _samples_of_some(self, step: Step) -> list[Tensor]:
        """The same of a random part of these examples, in a forward pass of its own.

        Drawn anew in every part of a batch, so that the samples are of a mean over its terms.
        """
        objective, N = step.objective, len(step.X)
        # Which tensors are kept is the same in all parts: processes meet in synced norms.
        generator = step.shared_generator()
        # Two at least, of which batch norm has statistics.
        size = max(min(2, N), round(self.config.penalty_examples * N))
        own = step.generator
        chosen = torch.randperm(N, generator=own, device=own.device)[:size]
        chosen = chosen.to(step.X.device)
        X, y = step.X[chosen], step.targets[chosen]
        task, params = objective.task, objective.params
        num_terms = task.num_terms(step.targets) * size / N  # of X, y on average
        share = task.num_terms(y) / num_terms if num_terms else 0.0
        if not self.of_g:
            samples, _ = hessian_samples(
                objective, X, y, draws=self.draws, generator=generator, modes=self._modes,
                share=step.part.share * share,
            )  # fmt: skip
            return samples
        if self.config.compile:
            samples = self._compiled_samples(objective, X, y, step.outputs[chosen], generator)
            return [share * sample for sample in samples]
        outputs = recorded_outputs(objective.model, params, X)
        samples_of = self._examples.samples if self.by_example else batch_samples
        return samples_of(
            outputs, params, task, y, draws=self.draws, generator=generator,
            num_terms=num_terms, hold=self.holds,
        )  # fmt: skip

    @property
    def _modes(self) -> tuple[Mode, ...]:
        return (self.engine.engine, *self.engine.others)

    def _compiled_samples(
        self, objective: Objective, X: Tensor, y: Tensor, outputs: Tensor, generator: Generator
    ) -> list[Tensor]:
        self._compiled = self._compiled or CompiledSamples(
            objective, self.choice.curvature, hold=self.holds
        )
        return self._compiled(X, y, outputs, draws=self.draws, generator=generator)
