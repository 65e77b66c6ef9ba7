"""The penalty on the trace as a term of anyone's loss.

    loss = criterion(outputs, y) + lambda(t) * t(w),   E[t(w)] = tr(G(w)) or tr(H(w))

by the regularizer that `hesstrace train --reg trace` has, in a step of the user's own loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from hesstrace_cli.api.batches import as_batch
from hesstrace_cli.api.distributed import Parallel, parallel_of
from hesstrace_cli.api.inputs import InputsWatch
from hesstrace_cli.api.models import (
    apart,
    device_of,
    eager,
    is_compiled,
    unwrapped,
)
from hesstrace_cli.api.tasks import check_fit, resolve_task
from hesstrace_cli.api.wording import naming_arguments
from hesstrace_cli.autodiff.arguments import arguments_of
from hesstrace_cli.autodiff.calls import outputs_of, recorded_outputs, trainable
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.autodiff.graph import leaves, topological
from hesstrace_cli.config import TrainConfig, shortened
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.distributed.parallel import ALONE
from hesstrace_cli.errors import ConfigError, DataError, DerivativeError, ModelError
from hesstrace_cli.randomness import random_state_kept, stream_generator
from hesstrace_cli.regularizers import Part, Setting, Step
from hesstrace_cli.regularizers.trace import TraceRegularizer
from hesstrace_cli.regularizers.trace_held import HeldTraceRegularizer
from hesstrace_cli.tasks import Task

_TRIED = 16  # examples in double precision; times as many where these prove nothing:
_MORE = 4
# In a graph they are never right; what else is replaced in a model is found out with it.
_FUSED = ("WeightNorm", "Hardsigmoid", "Hardswish", "ScaledDotProduct", "CudnnRnn", "Miopen")
_MOVES = 30  # of the weights within one step, from which on it cannot be one


@contextmanager
def differentiable() -> Iterator[None]:
    """Run the forward pass inside with operations whose second derivatives are right.

    For a penalty on tr(G). Values agree with PyTorch's own kernels to rounding, and most of these
    are kept; attention is taken from primitive operations, recurrent layers without cuDNN.
    """
    with differentiable_ops(order=2, by_example=True):
        yield


@contextmanager
def _recording() -> Iterator[None]:
    """With gradients, whatever the loop around has on; errors name arguments."""
    with naming_arguments(), torch.inference_mode(False), torch.enable_grad():
        yield


class TracePenalty:
    """lambda(t) times an unbiased sample of tr(G) or tr(H) of the batch's mean loss.

        loss = criterion(outputs, y) + penalty(outputs, y)     tr(G); outputs from a forward pass
                                                               within `differentiable()`
        loss = penalty.loss(X, y)                              tr(G) or tr(H), loss and penalty

    The Hessian is that of the task's mean loss over the batch in the parameters that need a
    gradient, in the model's present mode. Before the first step the derivatives are held against
    differences of the model, on some examples, as `hesstrace train` does.

    Args:
        model: The network, which DistributedDataParallel or `torch.compile` may wrap.
        strength: lambda at full strength, in units of loss per trace.
        task: "auto" goes by the targets; or classification, multilabel, regression, segmentation,
            tokens, or a task with settings of its own (`hesstrace_cli.tasks.Tokens(...)`). It must
            be that of your criterion.
        curvature: "ggn" for tr(G), "hessian" for tr(H); "auto" takes tr(G).
        form: Of tr(G): "example" sums squared norms of every example's gradient, with far less
            noise, "batch" takes the batch's; "auto" goes by example but for models that take batch
            statistics.
        estimator: "dropout" drops parts of the probe (SEHT-D), "hutchinson" none (SEHT-H).
        dropout_scheme: What is dropped: tensor, block or entry.
        keep_prob: With which probability it is kept, in (0, 1]; divided out.
        num_probes: Samples a step.
        penalty_examples: Share of the batch that the penalty is taken of, in (0, 1]; below 1 by
            `loss` alone, as it takes a forward pass of its own.
        hold_logit_curvature: Of tr(G): whether A, the curvature of the loss in the outputs, counts
            as constant, so that the penalty is lowered by the Jacobian alone (`trace-held`).
        every: Add the penalty on every k-th step only.
        warmup_steps: Steps over which the strength rises from 0.
        generator: Its seed names the streams that every step draws from, as `--seed` does; it is
            not advanced. None is seed 0.

    Attributes:
        trace: The last sample, detached; None before the first.
        task: The task; None before the first batch where it is "auto".

    Raises:
        ConfigError: If an argument is wrong.

    Source:
        Liu, Yu, Lin, "Regularizing Deep Neural Networks with Stochastic Estimators of Hessian
        Trace", arXiv 2208.05924.
    """

    @naming_arguments()
    def __init__(
        self,
        model: nn.Module,
        strength: float,
        *,
        task: str | Task = "auto",
        curvature: str = "auto",
        form: str = "auto",
        estimator: str = "dropout",
        dropout_scheme: str = "tensor",
        keep_prob: float = 0.5,
        num_probes: int = 1,
        penalty_examples: float = 1.0,
        hold_logit_curvature: bool = False,
        every: int = 1,
        warmup_steps: int = 0,
        generator: Generator | None = None,
    ) -> None:
        if not isinstance(strength, (int, float)) or not 0 <= strength <= 1e300:
            raise ConfigError(f"strength is {shortened(strength)}, expected a number from 0")
        if not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ConfigError(f"warmup_steps is {warmup_steps!r}, expected a whole number from 0")
        if hold_logit_curvature and curvature == "hessian":
            raise ConfigError("hold_logit_curvature is of tr(G), and curvature is 'hessian'; leave "
                              "one of them out")  # fmt: skip
        if generator is not None and not isinstance(generator, Generator):
            raise ConfigError(f"generator is {generator!r}, expected a torch.Generator or None")
        self.model, self._inner = model, unwrapped(model)
        self.trace: Tensor | None = None
        self.task: Task | None = task if isinstance(task, Task) else None
        self._asked_task = task
        self._seed = 0 if generator is None else generator.initial_seed()
        self._warmup_steps = warmup_steps
        self._settings: dict[str, Any] = {
            "curvature": curvature, "form": form, "estimator": estimator,
            "dropout_scheme": dropout_scheme, "keep_prob": keep_prob, "num_probes": num_probes,
            "penalty_examples": penalty_examples, "every": every, "seed": self._seed,
            "warmup": 1.0 if warmup_steps else 0.0,
        }  # fmt: skip
        self._strength = float(strength)
        self._kind = HeldTraceRegularizer if hold_logit_curvature else TraceRegularizer
        self._regularizer = self._kind(self._strength, TrainConfig(**self._settings))
        self._parallel: Parallel = parallel_of(model)
        self._watch = InputsWatch(self._inner)
        self._prepared_for: list[str] | None = None
        self._first: tuple[Tensor, Tensor] | None = None
        self._removed: set[str] = set()
        self._index, self._seen = 0, 0
        self._moves, self._version = 0, 0

    # -- in the loop

    @_recording()
    def __call__(self, outputs: Any, targets: Tensor | None = None) -> Tensor:
        """Strength at this step times an unbiased sample of tr(G), to be added to the loss.

        Args:
            outputs: Of the model for a batch or a part of it, from a forward pass within
                `differentiable()`.
            targets: Of the same examples. Only a named task in which all terms count alike, as
                "classification", does without.

        Returns:
            0-dim, with a graph; 0 on a step without penalty.

        Raises:
            ConfigError: If the penalty is on tr(H), or the task cannot be told.
            DerivativeError: If a derivative would be wrong or missing.
        """
        outputs = outputs_of(outputs)
        if not len(outputs):
            raise DataError("the batch has no example, expected some")
        if not outputs.requires_grad:
            raise ModelError("the outputs have no graph; call the model with gradients on, and "
                             "give the penalty what it returned")  # fmt: skip
        targets = self._targets(outputs, targets)
        self._prepare(self._watch.inputs(len(targets)), targets, outputs)
        if not self._regularizer.of_g:
            raise ConfigError("the penalty on tr(H) takes passes of its own; write loss = "
                              "penalty.loss(X, y)")  # fmt: skip
        if self._regularizer.is_of_some:
            raise ConfigError("penalty_examples below 1 takes a forward pass of its own; write "
                              "loss = penalty.loss(X, y)")  # fmt: skip
        self._check_forward_pass(outputs)
        assert self.task is not None
        assert self._first is not None
        self.task.check_outputs(outputs, targets, type(self._inner).__name__)
        step = self._step(self._first[0], outputs, targets, outputs.new_zeros(()))
        return self._penalty(step)[0]

    @_recording()
    def loss(self, X: Any, y: Tensor) -> Tensor:
        """The task's mean loss of a batch plus the penalty, 0-dim with a graph.

        Args:
            X: The model's input, or several as a tuple or dict.
            y: Targets.

        Raises:
            HesstraceError: As for a call; tr(H) is no error here.
        """
        X, y = as_batch(X, y, "the batch")
        y = self._targets(None, y)
        self._prepare(X, y)
        assert self.task is not None
        regularizer, progress = self._regularizer, self._progress
        gives = regularizer.gives_loss(self._index, progress) and not self._parallel.is_ddp
        own_pass = not regularizer.of_g or regularizer.is_of_some or is_compiled(self.model)
        args, kwargs = arguments_of(X)
        if own_pass:
            with torch.set_grad_enabled(not gives):
                outputs = outputs_of(self.model(*args, **kwargs))
        else:
            with differentiable():
                outputs = outputs_of(self.model(*args, **kwargs))
        self.task.check_outputs(outputs, y, type(self._inner).__name__)
        loss = self.task.loss(outputs, y)
        if own_pass and regularizer.of_g and not regularizer.is_of_some:
            with eager():
                recorded = recorded_outputs(self._inner, trainable(self._inner), X)
            return loss + self._penalty(self._step(X, recorded, y, loss))[0]
        penalty, given = self._penalty(self._step(X, outputs, y, loss))
        return (loss if given is None or loss.requires_grad else given) + penalty

    def step(self) -> None:
        """One step of the optimizer is done: for `every`, `warmup_steps` and the next probes."""
        self._index, self._seen, self._moves = self._index + 1, 0, 0

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs."""
        return {"step": self._index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self._index, self._seen, self._moves = state["step"], 0, 0

    def description(self) -> dict[str, Any]:
        """Which task, curvature and form it is, by which rule, and by which derivatives."""
        own = self._regularizer.description() if self._prepared_for is not None else {}
        return {"task": None if self.task is None else self.task.name, **own}

    def __repr__(self) -> str:
        task = "auto" if self.task is None else self.task.name
        curvature = self._regularizer.choice.curvature
        return (
            f"TracePenalty({type(self._inner).__name__}, {self._strength:g}, task={task!r}, "
            f"curvature={curvature!r}, at step {self._index})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: each for name, each in vars(self).items() if name != "_parallel"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._parallel = parallel_of(self.model)
        if self._prepared_for is None:
            self._watch.go_on()

    # -- how

    @property
    def _progress(self) -> float:
        return min(1.0, self._index / self._warmup_steps) if self._warmup_steps else 1.0

    def _targets(self, outputs: Tensor | None, targets: Tensor | None) -> Tensor:
        """The targets, and the task with the first of them."""
        if targets is not None:
            if not isinstance(targets, Tensor):
                raise DataError(f"targets are a {type(targets).__name__}, expected a tensor")
            if self.task is None:
                self.task = resolve_task(self._asked_task, targets)
            return targets.to(device_of(self._inner))
        if self.task is None and self._asked_task != "auto":
            self.task = resolve_task(self._asked_task, torch.empty(0))
        assert outputs is not None
        made = None if self.task is None else self.task.any_targets(outputs)
        if made is None:
            raise ConfigError(
                "targets are missing: penalty(outputs, y); without, name a task in which all "
                'terms count alike, as task="classification"'
            )
        return made

    def _prepare(self, X: Tensor | None, y: Tensor, outputs: Tensor | None = None) -> None:
        """Before the first step, and where other parameters are trained than before."""
        names = list(trainable(self._inner))
        if names == self._prepared_for:
            return
        if self._first is not None:
            X, y = self._first
            of_weights = next(self._inner.parameters())
            X = X.to(of_weights) if X.is_floating_point() else X.to(of_weights.device)
            y = y.to(of_weights.device)
        if X is None:
            raise ModelError(
                "the model has not been called since the penalty was made, so that its derivatives "
                "cannot be looked at; make the penalty before the forward pass"
            )
        assert self.task is not None
        without = _without_autocast(device_of(self._inner))
        with random_state_kept(), eager(), without:
            self.task.check_targets(y, "the batch")
            model = apart(self._inner)
            # Of rows that were left out or put together behind the model, those that there are.
            size = min(len(X), len(y), _MORE * _TRIED)
            self._first = X, y = X[:size].detach(), y[:size]
            native = _plain_outputs(model, X)
            if outputs is not None and outputs.shape[1:] != native.shape[1:]:
                raise ModelError(
                    f"the outputs have shape {tuple(outputs.shape)}, those of the model "
                    f"{(len(outputs), *native.shape[1:])}; give the penalty what the model "
                    "returned, and where some do not count, targets with the ignored index"
                )
            for each in (native,) if outputs is None else (native, outputs[:size]):
                check_fit(self.task, each, y, type(model).__name__)
            objective = Objective(model, trainable(model), self.task)
            setting = Setting(objective, X, y, _TRIED, self.task.width(native), 0, ALONE)
            self._regularizer = self._kind(
                self._strength, TrainConfig(**self._settings, precision=_precision(X.device))
            )
            self._regularizer.prepare(setting)
            by_example = self._regularizer.by_example
            recorded = recorded_outputs(model, objective.params, X, by_example=by_example)
            self._removed = _nodes(native) - _nodes(recorded)
        self._prepared_for = names
        self._watch.stop()

    def _check_forward_pass(self, outputs: Tensor) -> None:
        """Refuse outputs of a forward pass that ran outside `differentiable()`, or compiled.

        Raises:
            DerivativeError: If an operation is in their graph that is replaced there.
        """
        nodes = _nodes(outputs)
        own = {id(p) for p in trainable(self._inner).values()}
        if not any(id(p) in own for p in leaves(outputs)):
            raise ModelError(
                "the outputs do not depend on the model's parameters; give the penalty the model "
                "whose own parameters were called: functional_call with others, and other models, "
                "have a penalty of their own"
            )
        if any("CompiledFunction" in name for name in nodes):
            raise DerivativeError(
                "the outputs come from compiled code, through which there is no second derivative; "
                "write loss = penalty.loss(X, y), which takes a pass of its own beside it"
            )
        outside = sorted(n for n in nodes if n in self._removed or n.startswith(_FUSED))
        if outside:
            raise DerivativeError(
                f"the forward pass ran outside hesstrace_cli.differentiable(): {outside[0]} has no "
                "second derivative that is right; write: with hesstrace_cli.differentiable(): "
                "outputs = model(X)"
            )

    def _step(self, X: Tensor | None, outputs: Tensor, y: Tensor, loss: Tensor) -> Step:
        assert self.task is not None
        device, ranks, N = outputs.device, self._parallel, len(y)
        self._count_moves()
        rows = (self._seen + torch.arange(N)) * ranks.size + ranks.rank
        number, self._seen = self._seen, self._seen + N
        whole = ranks.size * self._seen
        # Terms of this part alone: the means over the parts are for the loop to weigh.
        part = Part(rows, whole, 1.0, self.task.num_terms(y), 1.0)
        shared = stream_generator(self._seed, device, "regularizers", self._index)
        own = stream_generator(self._seed, device, "parts", self._index, ranks.rank, number)
        objective = Objective(self._inner, trainable(self._inner), self.task)
        step = Step(
            objective, cast(Tensor, X), y, outputs, loss, part, self._index, self._progress, own,
            shared.get_state(),
        )  # fmt: skip
        return ranks.gathered(self._regularizer, step)

    def _count_moves(self) -> None:
        """Say it where steps are never said to be done; SAM and L-BFGS move weights in a step."""
        version = sum(p._version for p in trainable(self._inner).values())
        if self._seen and version != self._version:
            self._moves += 1
        self._version = version
        if self._moves == _MOVES:
            self._moves += 1
            warnings.warn(
                f"the weights have moved {_MOVES} times since the last penalty.step(), without "
                "which warm-up stands still and each step drops the same tensors; call it after "
                "optimizer.step()",
                stacklevel=6,
            )

    def _penalty(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """The weighted term, and the plain loss where its own pass gave it."""
        with eager():
            try:
                term = self._regularizer.term(step)
            except DerivativeError as problem:
                if "second time" not in str(problem):
                    raise
                raise ModelError("the graph of the outputs is gone; call the penalty before "
                                 "loss.backward()") from problem  # fmt: skip
        if term is None:
            return step.loss.new_zeros(()), None
        self.trace = term.value.detach()
        return term.weight * self._parallel.averaged(term), term.loss


def _nodes(outputs: Tensor) -> set[str]:
    return {node.name() for node in topological(outputs)}


def _plain_outputs(model: nn.Module, X: Tensor) -> Tensor:
    """The outputs with the model's own operations, buffers left as they are."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    args, kwargs = arguments_of(X)
    return outputs_of(functional_call(model, buffers, args, kwargs))


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False):
        yield


def _precision(device: torch.device) -> str:
    """Of the loop, as `--precision` has it."""
    if not torch.is_autocast_enabled(device.type):
        return "float32"
    return "fp16" if torch.get_autocast_dtype(device.type) == torch.float16 else "bf16"
