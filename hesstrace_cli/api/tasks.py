"""The task of a user's own loss, told from targets where it is not named."""

from __future__ import annotations

import torch
from torch import Tensor

from hesstrace_cli.config import TASK_NAMES
from hesstrace_cli.errors import ConfigError, DataError, ModelError
from hesstrace_cli.hints import did_you_mean
from hesstrace_cli.tasks import Multilabel, SoftmaxTask, Task, choose_task, task_of
from hesstrace_cli.tasks.base import shape_of


def resolve_task(task: str | Task, targets: Tensor) -> Task:
    """The task that is named, or that the targets are of.

    Args:
        task: A name, "auto", or a task with settings of its own, as `Tokens(ignore_index=0)`.
        targets: Of a batch.

    Raises:
        ConfigError: If there is none of this name, or targets could be of several.
        DataError: If no task has such targets.
    """
    if isinstance(task, Task):
        return task
    if task != "auto":
        if task not in TASK_NAMES:
            hint = did_you_mean(str(task), TASK_NAMES)
            raise ConfigError(f"task is {task!r}, expected auto, {', '.join(TASK_NAMES)} or a "
                              f"Task{hint}")  # fmt: skip
        return task_of(task)
    # The loss is the user's own here, so that what is guessed wrong would be a wrong number.
    if (
        targets.is_floating_point()
        and targets.dim() > 1
        and bool(((targets >= 0) & (targets <= 1)).all())
    ):
        raise ConfigError(
            f"targets have {shape_of(targets)}, from 0 to 1: probabilities of classes, labels that "
            'are there or not, or numbers to be met; give task="classification", "multilabel" or '
            '"regression", as your loss has it'
        )
    return task_of(choose_task(targets)[0])


def check_fit(task: Task, outputs: Tensor, targets: Tensor, model: str) -> None:
    """Refuse outputs that do not fit the targets of a batch.

    Args:
        task: What they are for.
        outputs: Of the batch.
        targets: Of the same.
        model: What to call the model in an error.

    Raises:
        DataError: If the targets are not the task's.
        ModelError: If the outputs are of another shape, or there are too few of them.
    """
    task.check_targets(targets, "the batch")
    if isinstance(task, SoftmaxTask) and targets.dtype in (torch.int8, torch.int16, torch.int32):
        raise DataError(f"targets are {targets.dtype}, which no cross-entropy takes, expected "
                        "torch.int64: y.long()")  # fmt: skip
    task.check_outputs(outputs, targets, model)
    _refuse_probabilities(task, outputs, model)
    needed, width = task.num_outputs(targets), task.width(outputs)
    if task.num_terms(targets) and width < needed:
        raise ModelError(f"{model} gives {width} outputs, and targets go up to {needed - 1}")


def _refuse_probabilities(task: Task, outputs: Tensor, model: str) -> None:
    """Logits are meant; of probabilities the task's loss would be another than the user's.

    Raises:
        ModelError: If the outputs are probabilities.
    """
    end = "" if outputs.grad_fn is None else outputs.grad_fn.name()
    with torch.no_grad():
        if isinstance(task, Multilabel) and end.startswith("Sigmoid"):
            layer, other = "sigmoid", "torch.logit of them"
        elif isinstance(task, SoftmaxTask) and _are_distributions(outputs, task.class_dim):
            layer, other = "softmax", "their logarithm"
        else:
            return
    raise ModelError(
        f"{model} gives probabilities, and the task {task.name} expects logits; leave out the "
        f"{layer}, or give {other}"
    )


def _are_distributions(outputs: Tensor, dim: int) -> bool:
    if outputs.shape[dim] < 2 or bool((outputs < 0).any()):
        return False
    sums = outputs.float().sum(dim)
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
