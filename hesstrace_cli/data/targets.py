"""Which task a data set is for, and what its targets say of the model that it needs."""

from __future__ import annotations

import torch
from torch import Tensor

from hesstrace_cli.config import DataConfig
from hesstrace_cli.errors import ConfigError, DataError
from hesstrace_cli.tasks import SoftmaxTask, Task, choose_task, task_of


def task_and_reason(config: DataConfig, targets: Tensor) -> tuple[Task, str]:
    """The task that the config names, or that the targets are of, and why."""
    name, reason = config.task or "auto", "as asked for"
    if name == "auto":
        name, reason = choose_task(targets)
    weights = config.class_weights_given()
    return task_of(name, class_weights=weights, ignore_index=config.ignore_index), reason


def count_outputs(task: Task, config: DataConfig, known: int | None, *targets: Tensor) -> int:
    """How many outputs a model needs.

    Args:
        task: What they are for.
        config: May say the number of classes.
        known: The number of classes that the source knows of.
        targets: Of training and test examples.

    Raises:
        DataError: If a class number is beyond what was said, or absurd.
    """
    found = max(task.num_outputs(each) for each in targets)
    of_numbers = isinstance(task, SoftmaxTask) and not targets[0].is_floating_point()
    if not of_numbers:
        if any(task.num_outputs(each) != found for each in targets):
            raise DataError(
                f"{config.dataset}: targets for training and for testing differ in shape"
            )
        if config.num_classes not in (None, found):
            raise DataError(
                f"--num-classes is {config.num_classes}, but targets of {config.dataset} have "
                f"{found} numbers"
            )
        return found
    said = config.num_classes or known
    if said is None and found > max(1000, 100 * len(targets[0])):
        raise DataError(
            f"{config.dataset}: labels go up to {found - 1} among {len(targets[0])} examples; "
            "if that is right, say so with --num-classes"
        )
    if said is not None and found > said:
        raise DataError(
            f"{config.dataset}: labels go from 0 to {found - 1}, expected 0 to {said - 1}; "
            "--num-classes sets their number"
        )
    return said or found


def balanced_weights(targets: Tensor, num_classes: int, task: Task) -> tuple[float, ...]:
    """Weights in inverse proportion to how often a class occurs, 1 on average over the terms.

    Raises:
        ConfigError: If the targets are no class numbers.
    """
    if not isinstance(task, SoftmaxTask) or targets.is_floating_point():
        raise ConfigError("--class-weights balanced counts class numbers, and the targets are none")
    counted = targets.flatten().cpu()
    counted = counted[counted != task.ignored] if task.ignored is not None else counted
    counts = torch.bincount(counted, minlength=num_classes).double()
    present = counts > 0
    weights = torch.where(present, len(counted) / (present.sum() * counts.clamp(min=1)), 0.0)
    return tuple(weights.tolist())
