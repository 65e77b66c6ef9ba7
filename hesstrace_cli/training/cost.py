"""The time and memory of a training step with a regularizer, over those of a plain one."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hesstrace_cli.autodiff.calls import outputs_of, trainable
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.config import DataConfig, TrainConfig
from hesstrace_cli.curvature.checks.verdicts import Row
from hesstrace_cli.errors import NumericsError
from hesstrace_cli.randomness import random_state_kept
from hesstrace_cli.regularizers.trace import TraceRegularizer
from hesstrace_cli.training.trainer import Trainer

_ROUNDS, _STEPS = 5, 4
_PASSES, _SECONDS = 9, 0.2  # that an epoch's time is taken of, and of each
_ENOUGH = 10_000  # epochs for all passes

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Ratios to the plain step.

    Attributes:
        time: Of the fastest of a few rounds, which other work on the machine has held up least.
        memory: Of weights, gradients, momentum and what the step's graphs keep for backward.
    """

    time: float
    memory: float


def step_costs(configs: Mapping[str, TrainConfig], *, rounds: int = _ROUNDS) -> dict[str, StepCost]:
    """Ratios to `none`, every row's steps timed in turn so that a busy machine slows all alike.

    Args:
        configs: One a row, by the row's name; without `none` there is nothing to compare to.
        rounds: Of timing all rows in turn.

    Returns:
        By name, of steps at full strength; those of a penalty that is added on every k-th step
        are averaged over k. A row whose every try diverged is left out.
    """
    if "none" not in configs:
        return {}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    memory: dict[str, int] = {}
    trainers = {name: Trainer.of(config) for name, config in configs.items()}
    for round_number in range(rounds):
        for name, trainer in trainers.items():
            steps = max(_STEPS, trainer.config.every)
            try:
                if round_number == 0:
                    memory[name] = bytes_of_step(trainer)
                seconds[name].append(seconds_of_steps(trainer, steps) / steps)
            except NumericsError:  # the same batch again and again may diverge
                continue
    least = {name: min(own) for name, own in seconds.items() if own}
    return {
        name: StepCost(own / least["none"], memory[name] / memory["none"])
        for name, own in least.items()
    }


def epoch_seconds(configs: Mapping[Key, TrainConfig]) -> dict[Key, float]:
    """Seconds of an epoch of each row, reading the data included, validation not.

    They are taken as the run's own are, over steps of its beginning, every row's in turn.

    Args:
        configs: One a row.

    Returns:
        By the row's key; a row that diverged at once is left out.
    """
    with random_state_kept(), contextlib.ExitStack() as stack:
        clocks = {key: _Clock(config, stack) for key, config in configs.items()}
        passes = [{key: clock.step() for key, clock in clocks.items()} for _ in range(_PASSES)]
    first = next((key for key in clocks if passes[0][key] is not None), None)
    found: dict[Key, float] = {}
    for key, clock in clocks.items():
        # Over the first row's in the same pass: what slows a machine for a while slows both.
        pairs = [(own[key], own[first]) for own in passes if first is not None]
        ratios = [a / b for a, b in pairs if a is not None and b]
        if ratios:
            base = statistics.median(b for _, b in pairs if b)
            found[key] = statistics.median(ratios) * base * clock.steps_per_epoch
    return found


class _Clock:
    """Times some more of a run's steps in each pass.

    A short run goes on beyond its end, so that every pass has steps; all passes together take no
    longer than it, but for the fewest steps that tell.
    """

    def __init__(self, config: TrainConfig, stack: contextlib.ExitStack) -> None:
        config = config.effective()
        longer = dataclasses.replace(config, epochs=max(config.epochs, _ENOUGH), monitor_trace=0)
        self._trainer = trainer = Trainer.of(longer)
        self.steps_per_epoch = trainer.steps_per_epoch
        total = config.epochs * self.steps_per_epoch
        every = min(config.every, total)
        running: Any = trainer.advance()
        self._steps = stack.enter_context(contextlib.closing(running))
        first = self._mean(max(_STEPS, every))
        steps = _SECONDS / first if first else 0.0
        steps = max(_STEPS, min(steps, total / _PASSES))
        self._size = every * math.ceil(steps / every)

    def step(self) -> float | None:
        """Seconds of a step, some steps on; None where none is left."""
        return self._mean(self._size)

    def _mean(self, steps: int) -> float | None:
        before, begun = self._trainer.seconds, self._trainer.step
        with contextlib.suppress(NumericsError):
            for _ in itertools.islice(self._steps, steps):
                pass
        done = self._trainer.step - begun
        return (self._trainer.seconds - before) / done if done else None


def penalty_costs(config: DataConfig) -> Iterator[Row]:
    """Rows beside those of `verify`: a step with the penalty at the defaults of training."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(DataConfig)}
    plain = TrainConfig(**{**shared, "data_dir": config.data_dir or "data"})
    estimators = {"SEHT-H of tr(G)": "hutchinson", "SEHT-D of tr(G)": "dropout"}
    configs = {
        name: dataclasses.replace(plain, reg=["trace=0.01"], estimator=estimator, curvature="ggn")
        for name, estimator in estimators.items()
    }
    costs = step_costs({"none": plain, **configs})
    for name in configs:
        if name in costs:
            yield Row(
                f"train: a step with {name}, float32, batches of {config.batch_size}",
                "measured",
                f"{costs[name].time:.1f} times the plain step's time, {costs[name].memory:.1f} "
                "times its memory",
            )


def seconds_of_steps(trainer: Trainer, steps: int) -> float:
    """The time of so many steps at full strength, after one to warm up; it is spoilt."""
    rows = torch.arange(min(trainer.config.batch_size, len(trainer.data.train)))
    (examples,) = trainer.examples([rows])
    trainer.step = trainer.total_steps - 1
    # One thread that works alone has a time of its own, which other work does not lengthen.
    alone = trainer.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    with random_state_kept():
        trainer.take_step(examples)
        _synchronize(trainer)
        begin = clock()
        for index in range(steps):
            trainer.step = trainer.total_steps - 1 - index
            trainer.take_step(examples)
        _synchronize(trainer)
    return clock() - begin


def _synchronize(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


def bytes_of_step(trainer: Trainer) -> int:
    """Bytes of three copies of the weights, and of all tensors that a step saves for backward.

    A storage saved twice counts once, as does one whose memory is used again in the step.
    """
    size = 3 * sum(p.nbytes for p in trainer.model.parameters())
    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        seconds_of_steps(trainer, 0)
    return size + sum(saved.values())


def cost_without_cudnn(trainer: Trainer) -> str | None:
    """What a recurrent model's second derivatives cost on a GPU: cuDNN's layers have none.

    Returns:
        A sentence with a ratio measured on the first batch; None where none are taken.
    """
    takes = any(r.order > 1 or isinstance(r, TraceRegularizer) for r in trainer.regularizers)
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in trainer.model.modules())
    if not takes or not is_recurrent or not _has_cudnn(trainer.device):
        return None
    with_it, without = (_seconds_of_gradient(trainer, cudnn=cudnn) for cudnn in (True, False))
    return (
        "the penalty takes second derivatives, which cuDNN's recurrent layers do not have: they "
        f"run without it, and the plain gradient of a batch takes {without / with_it:.1f} times "
        "as long here"
    )


def _has_cudnn(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cudnn.enabled


def _seconds_of_gradient(trainer: Trainer, *, cudnn: bool) -> float:
    """Of the loss of a batch, the fastest of a few; nothing moves."""
    rows = torch.arange(min(trainer.config.batch_size, len(trainer.data.train)))
    X, y = next(trainer.data.train.parts([rows]))
    params, seconds = list(trainable(trainer.model).values()), []
    buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]
    with random_state_kept():
        for _ in range(_STEPS):
            _synchronize(trainer)
            begin = time.perf_counter()
            with contextlib.nullcontext() if cudnn else differentiable_ops(order=1):
                outputs = outputs_of(trainer.model.train()(X))
            loss = trainer.data.task.loss(outputs, y)
            torch.autograd.grad(loss, params, allow_unused=True)
            _synchronize(trainer)
            seconds.append(time.perf_counter() - begin)
    for buffer, before in buffers:
        buffer.copy_(before)
    return min(seconds)
