"""Image files that are decoded once and held; of those that nobody asks for, none is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hesstrace_cli.data.splits import Batch, DatasetSplit, Split, TensorSplit, readable
from hesstrace_cli.tasks import Task


class HeldSplit:
    """Image files that become one tensor on the device as soon as they are gone through.

    A look at a single batch, as at the first to learn the shape of the inputs, decodes that batch
    alone, until as many images were looked at as there are.

    Args:
        files: The same examples, read from their files each time; all of one shape.
    """

    def __init__(self, files: DatasetSplit) -> None:
        self._files = files
        self._tensors: TensorSplit | None = None
        self._looked_at = 0

    @property
    def targets(self) -> Tensor:
        """What the task is to find, shape (N, ...)."""
        return self._files.targets

    @property
    def task(self) -> Task:
        """What inputs and targets are for."""
        return self._files.task

    @property
    def num_terms(self) -> int:
        """The terms that the mean loss over the split is over."""
        return self._files.num_terms

    def __len__(self) -> int:
        return len(self._files)

    def subset(self, indices: Tensor) -> Split:
        """The split of the examples at `indices`, in that order, which are all that it decodes."""
        if self._tensors is not None:
            return self._tensors.subset(indices)
        return HeldSplit(self._files.subset(indices))

    def of_task(self, task: Task) -> Split:
        """The same examples for a task."""
        if self._tensors is not None:
            return self._tensors.of_task(task)
        return HeldSplit(self._files.of_task(task))

    def batches(self, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Inputs and targets, batch by batch, in order."""
        return self.parts(torch.arange(len(self)).split(batch_size)[first::stride])

    def parts(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Inputs and targets of the examples at each of the given indices."""
        if indices and self._tensors is None:
            self._looked_at += len(indices[0])
            if self._looked_at < len(self):
                yield from self._files.parts(indices[:1])
                indices = indices[1:]
        if indices:
            yield from self.held().parts(indices)

    def held(self) -> TensorSplit:
        """All of them as a tensor, decoded now if they are not yet."""
        if self._tensors is None:
            files = self._files
            images = (files.dataset[int(i)][0] for i in files.indices)
            inputs = torch.stack(list(readable(images, files.collate.name))).to(files.device)
            targets = files.targets.to(files.device)
            self._tensors = TensorSplit(inputs, targets, files.preprocess, files.dtype, files.task)
        return self._tensors
