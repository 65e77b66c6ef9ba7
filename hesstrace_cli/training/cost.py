"""The time and memory of a training step with a regularizer, over those of a plain one."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hesstrace_cli.config import DataConfig, TrainConfig
from hesstrace_cli.curvature.checks.verdicts import Row
from hesstrace_cli.errors import NumericsError
from hesstrace_cli.randomness import random_state_kept
from hesstrace_cli.training.trainer import Trainer

_ROUNDS, _STEPS = 5, 4


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Ratios to the plain step.

    Attributes:
        time: Median over a few rounds.
        memory: Of weights, gradients, momentum and what the step's graphs keep for backward.
    """

    time: float
    memory: float


def step_costs(configs: Mapping[str, TrainConfig]) -> dict[str, StepCost]:
    """Ratios to `none`, every row's steps timed in turn so that a busy machine slows all alike.

    Args:
        configs: One a row, by the row's name; without `none` there is nothing to compare to.

    Returns:
        By name, of steps at full strength; those of a penalty that is added on every k-th step
        are averaged over k. A row whose every try diverged is left out.
    """
    if "none" not in configs:
        return {}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    memory: dict[str, int] = {}
    trainers = {name: Trainer.of(config) for name, config in configs.items()}
    for round_number in range(_ROUNDS):
        for name, trainer in trainers.items():
            steps = max(_STEPS, trainer.config.every)
            try:
                if round_number == 0:
                    memory[name] = bytes_of_step(trainer)
                seconds[name].append(seconds_of_steps(trainer, steps) / steps)
            except NumericsError:  # the same batch again and again may diverge
                continue
    medians = {name: statistics.median(own) for name, own in seconds.items() if own}
    return {
        name: StepCost(own / medians["none"], memory[name] / memory["none"])
        for name, own in medians.items()
    }


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
    with random_state_kept():
        trainer.take_step(examples)
        _synchronize(trainer)
        begin = time.perf_counter()
        for index in range(steps):
            trainer.step = trainer.total_steps - 1 - index
            trainer.take_step(examples)
        _synchronize(trainer)
    return time.perf_counter() - begin


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
