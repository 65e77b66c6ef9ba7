"""Label noise: a fixed share of the training labels replaced by other classes.

Which and by what is the data's, not the run's: the same for every `--seed`, and the noise of a
larger share has that of a smaller one in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hesstrace_cli.data.splits import Batch, Split
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.randomness import derived_seed
from hesstrace_cli.tasks import Task

_SEED = 0


def noisy(targets: Tensor, share: float, task: Task) -> Tensor:
    """The class numbers, round(share N) of them another one, each other with equal chance.

    Args:
        targets: Class numbers from 0, shape (N,).
        share: Of them to be replaced.
        task: What they are for.

    Raises:
        ConfigError: If they are something else, or of one class.
    """
    num_classes = task.num_outputs(targets)
    if task.name != "classification" or targets.is_floating_point() or num_classes < 2:
        raise ConfigError(
            f"--label-noise replaces class numbers by others, and the targets of --task {task.name}"
            " here are no class numbers of two classes or more; leave it out"
        )
    generator = Generator().manual_seed(derived_seed(_SEED, "label-noise"))
    order = torch.randperm(len(targets), generator=generator)
    shift = torch.randint(1, num_classes, (len(targets),), generator=generator)
    shift[order[round(share * len(targets)) :]] = 0
    return (targets + shift.to(targets.device)) % num_classes


@dataclass(frozen=True)
class Relabelled:
    """The inputs of a split with other targets.

    Attributes:
        split: The inputs'.
        targets: Shape (N,), on the device of its batches.
    """

    split: Split
    targets: Tensor

    @property
    def task(self) -> Task:
        """What they are for."""
        return self.split.task

    @property
    def num_terms(self) -> int:
        """The terms that the mean loss over the split is over."""
        return self.task.num_terms(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> Relabelled:
        """The split of the examples at `indices`, in that order."""
        own = self.targets[indices.to(self.targets.device)]
        return Relabelled(self.split.subset(indices), own)

    def of_task(self, task: Task) -> Relabelled:
        """The same examples for a task."""
        return dataclasses.replace(self, split=self.split.of_task(task))

    def batches(self, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Inputs and targets, batch by batch, in order."""
        own = self.targets.split(batch_size)[first::stride]
        for (X, _), y in zip(self.split.batches(batch_size, first, stride), own, strict=True):
            yield X, y.to(X.device)

    def parts(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Inputs and targets of the examples at each of the given indices, part by part."""
        for (X, _), chosen in zip(self.split.parts(indices), indices, strict=True):
            yield X, self.targets[chosen.to(self.targets.device)].to(X.device)
