"""Losses with their curvature, by name; what `--task auto` takes."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator

import torch
from torch import Tensor

from hesstrace_cli.errors import ConfigError, DataError
from hesstrace_cli.tasks.base import Meter, Selection, Task, shape_of
from hesstrace_cli.tasks.classification import Classification
from hesstrace_cli.tasks.multilabel import Multilabel
from hesstrace_cli.tasks.regression import Regression
from hesstrace_cli.tasks.segmentation import Segmentation
from hesstrace_cli.tasks.softmax import SoftmaxTask
from hesstrace_cli.tasks.tokens import Tokens

__all__ = [
    "TASKS", "Classification", "Meter", "Multilabel", "Regression", "Segmentation", "Selection",
    "SoftmaxTask", "Task", "Tokens", "choose_task", "task_of",
]  # fmt: skip


def _found() -> Iterator[type[Task]]:
    """The tasks of this folder's files: the classes with a name of their own."""
    for module in pkgutil.iter_modules(__path__):
        for kind in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(kind, type) and issubclass(kind, Task) and "name" in vars(kind):
                yield kind


TASKS: dict[str, type[Task]] = {kind.name: kind for kind in _found()}


def task_of(
    name: str,
    *,
    class_weights: tuple[float, ...] | None = None,
    ignore_index: int = -100,
) -> Task:
    """The task of this name.

    Args:
        name: One of `TASKS`.
        class_weights: For a task with classes.
        ignore_index: For a task with an ignored index.

    Raises:
        ConfigError: If class weights are given for a task without classes.
    """
    kind = TASKS[name]
    own = {field.name for field in dataclasses.fields(kind)}
    if class_weights is not None and "class_weights" not in own:
        raise ConfigError(f"--class-weights weighs classes, and --task {name} has none")
    given = {"class_weights": class_weights, "ignore_index": ignore_index}
    return kind(**{key: value for key, value in given.items() if key in own})


def choose_task(targets: Tensor) -> tuple[str, str]:
    """The name of the task that targets like these are of, and the reason in a clause.

    Labels of which several may be there at once are never guessed.

    Args:
        targets: Of a whole data set.

    Raises:
        DataError: If no task has such targets.
    """
    shape, dim = f"targets of {shape_of(targets)}", targets.dim()
    if targets.is_floating_point() and dim >= 2:
        if dim == 2 and targets.shape[1] > 1 and _are_probabilities(targets):
            return "classification", f"auto: {shape}, whose rows are probabilities"
        return "regression", f"auto: {shape}"
    if not targets.is_floating_point() and not targets.is_complex() and dim in (1, 2, 3):
        name = {1: "classification", 2: "tokens", 3: "segmentation"}[dim]
        return name, f"auto: {shape}"
    hint = ""
    if targets.is_floating_point() and dim == 1:
        hint = "; numbers to be met are (N, 1), as the outputs, and class numbers are integers"
    raise DataError(f"no task has {shape}{hint}; --task is one of {', '.join(TASKS)}")


def _are_probabilities(targets: Tensor) -> bool:
    sums = targets.sum(1)
    return bool((targets >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
