"""Splits of a data set: examples held as one tensor, or read through a DataLoader."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from hesstrace_cli.config import shortened
from hesstrace_cli.data.checks import example_of, same_kind, stacked
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.errors import DataError
from hesstrace_cli.failures import is_out_of_memory
from hesstrace_cli.tasks import Classification, Task

Batch = tuple[Tensor, Tensor]
Item = TypeVar("Item")


class Examples(Protocol):
    """Labelled examples that come in batches, the same each time: all that an estimate needs."""

    @property
    def task(self) -> Task:
        """What inputs and targets are for: the loss, its terms and curvature."""
        ...

    @property
    def num_terms(self) -> int:
        """The terms that the mean loss over the split is over."""
        ...

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def batches(self, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Inputs and targets, batch by batch, in order; the last may be smaller.

        Args:
            batch_size: Examples in a batch.
            first: The number of the first batch given.
            stride: Each stride-th batch from there is given, the others are not read.
        """
        ...


class Split(Examples, Protocol):
    """Labelled examples that come in batches, preprocessed, on one device."""

    @property
    def targets(self) -> Tensor:
        """What the task is to find, shape (N, ...)."""
        ...

    def subset(self, indices: Tensor) -> Split:
        """The split of the examples at `indices`, in that order."""
        ...

    def of_task(self, task: Task) -> Split:
        """The same examples for a task."""
        ...

    def parts(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Inputs and targets of the examples at each of the given indices, part by part."""
        ...


@dataclass(frozen=True)
class TensorSplit:
    """Examples held as one tensor on the device: no workers, no copies.

    Attributes:
        inputs: uint8 or floating point, shape (N, ...).
        targets: int64 or floating point, shape (N, ...).
        preprocess: Applied to every batch.
        dtype: Floating-point type of the batches.
        task: What they are for.
    """

    inputs: Tensor
    targets: Tensor
    preprocess: Preprocess
    dtype: torch.dtype = torch.float32
    task: Task = Classification()

    @property
    def num_terms(self) -> int:
        """The terms that the mean loss over the split is over."""
        return self.task.num_terms(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> TensorSplit:
        """The split of the examples at `indices`, in that order."""
        indices = indices.to(self.targets.device)
        inputs, targets = self.inputs[indices], self.targets[indices]
        return dataclasses.replace(self, inputs=inputs, targets=targets)

    def of_task(self, task: Task) -> TensorSplit:
        """The same examples for a task."""
        return dataclasses.replace(self, task=task)

    def batches(self, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Inputs and targets, batch by batch, in order."""
        rows = torch.arange(len(self), device=self.targets.device)
        return self.parts(rows.split(batch_size)[first::stride])

    def parts(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Inputs and targets of the examples at each of the given indices."""
        if not indices:
            return
        # All at once, as every copy to a GPU waits for it.
        rows = torch.cat(list(indices)).to(self.targets.device)
        for chosen in rows.split([len(part) for part in indices]):
            X = self.preprocess(self.inputs[chosen], self.dtype)
            yield X, _in(self.dtype, self.targets[chosen])


@dataclass(frozen=True)
class DatasetSplit:
    """Examples of a `torch.utils.data.Dataset`, read by a DataLoader.

    Attributes:
        dataset: Gives pairs of an input tensor and a label.
        indices: Which of its examples, in order.
        targets: int64 or floating point, shape (N, ...), on the CPU.
        preprocess: Applied to every batch, on the device.
        device: Where the batches go.
        num_workers: Processes that read; 0 reads in this one.
        dtype: Floating-point type of the batches.
        task: What they are for.
        collate: Makes a batch of examples, each of them checked.
    """

    dataset: Dataset[Any]
    indices: Tensor
    targets: Tensor
    preprocess: Preprocess
    device: torch.device
    num_workers: int
    dtype: torch.dtype
    collate: Collate
    task: Task = Classification()

    @property
    def num_terms(self) -> int:
        """The terms that the mean loss over the split is over."""
        return self.task.num_terms(self.targets)

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, indices: Tensor) -> DatasetSplit:
        """The split of the examples at `indices`, in that order."""
        chosen, targets = self.indices[indices], self.targets[indices]
        return dataclasses.replace(self, indices=chosen, targets=targets)

    def of_task(self, task: Task) -> DatasetSplit:
        """The same examples for a task."""
        return dataclasses.replace(self, task=task)

    def batches(self, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Inputs and targets, batch by batch, in order."""
        return self.parts(torch.arange(len(self)).split(batch_size)[first::stride])

    def parts(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Inputs and targets of the examples at each of the indices, read ahead by workers."""
        loader: DataLoader[Batch] = DataLoader(
            self.dataset,
            batch_sampler=[self.indices[chosen].tolist() for chosen in indices],
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=self.collate,
            # Without one, every pass would draw a seed for the workers from the global state.
            generator=Generator().manual_seed(0),
        )
        for (inputs, targets), chosen in zip(
            readable(loader, self.collate.name), indices, strict=True
        ):
            if inputs.is_floating_point() and not torch.isfinite(inputs).all():
                raise DataError("an input of the data set is NaN or infinite, expected numbers")
            self._check_targets(targets, chosen)
            inputs = inputs.to(self.device, non_blocking=True)
            targets = _in(self.dtype, targets.to(self.device, non_blocking=True))
            yield self.preprocess(inputs, self.dtype), targets

    def _check_targets(self, targets: Tensor, chosen: Tensor) -> None:
        """The subsets and the number of classes rest on the targets that were said before."""
        said = self.targets[chosen]
        alike = targets.dtype == said.dtype and targets.shape == said.shape
        if not alike or not torch.equal(targets, said):
            row = 0
            if alike:
                row = int((targets != said).reshape(len(said), -1).any(1).nonzero()[0])
            given, before = (shortened(t[row].tolist()) for t in (targets, said))
            raise DataError(
                f"{self.collate.name}: example {int(self.indices[chosen][row])} has the target "
                f"{given}, but {before} when the data was opened, or in its `targets`; expected "
                "the same each time"
            )


def _in(dtype: torch.dtype, targets: Tensor) -> Tensor:
    """Targets that are numbers to be met in the type of the computation, others as they are."""
    return targets.to(dtype) if targets.is_floating_point() else targets


def readable(examples: Iterable[Item], name: str) -> Iterator[Item]:
    """What is read from files or by a user's code; what cannot be read is the data's fault.

    Args:
        examples: What to read.
        name: What to call the data in an error.

    Raises:
        DataError: In one line, also where a worker met the problem.
    """
    try:
        yield from examples
        return
    except SystemExit as problem:
        reason = f"{name}: the code that reads an example called sys.exit({problem.code!r})"
    except (OSError, DataError) as problem:
        if is_out_of_memory(problem):
            raise
        said = _reason(problem)
        reason = said if isinstance(problem, DataError) else f"{name}: {said}"
        problem.__traceback__ = None  # it would hold the loader, whose workers would live on
    raise DataError(reason)


def _reason(problem: Exception) -> str:
    text = str(problem)
    if "in DataLoader worker process" in text:  # with a traceback, of which the end says it
        text = re.split(r"^[\w.]+: ", text, flags=re.MULTILINE)[-1]
    return " ".join(text.split()) or type(problem).__name__


@dataclass(frozen=True)
class Collate:
    """Makes a batch of a Dataset's examples.

    Attributes:
        name: What to call the data in an error.
        kind: The type of the first example's inputs.
    """

    name: str
    kind: torch.dtype

    def __call__(self, examples: Sequence[Any]) -> Batch:
        """The batch.

        Raises:
            DataError: If one is no example, or differs from the others in its type or shape.
        """
        pairs = [example_of(example, self.name) for example in examples]
        other = [x.dtype for x, _ in pairs if x.dtype != pairs[0][0].dtype]
        other += [x.dtype for x, _ in pairs if not same_kind(x.dtype, self.kind)]
        if other:
            raise DataError(f"{self.name}: inputs are of the types {self.kind} and {other[0]}, "
                            "expected one")  # fmt: skip
        shapes = sorted({str(tuple(x.shape)) for x, _ in pairs})
        if len(shapes) > 1:
            raise DataError(
                f"{self.name}: the inputs differ in shape ({', '.join(shapes[:3])}); give "
                "--image-size, which resizes image files"
            )
        return torch.stack([x for x, _ in pairs]), stacked([y for _, y in pairs], self.name)


def strata_of(targets: Tensor) -> Tensor:
    """What to stratify examples by: class numbers, of rows of numbers the largest, else nothing."""
    if not targets.is_floating_point() and targets.dim() == 1:
        return targets
    if targets.is_floating_point() and targets.dim() == 2 and targets.shape[1] > 1:
        return targets.argmax(1)
    return torch.zeros(len(targets), dtype=torch.int64)


def stratified_order(targets: Tensor, seed: int) -> Tensor:
    """An order of the examples whose every beginning has about the classes' shares.

    Within a class the order is random; the j-th of its n examples stands at (j + u) / n of the
    whole, with one random shift u a class. The first M examples are a stratified subset.

    Args:
        targets: Shape (N, ...); see `strata_of`.
        seed: Of the random order and shifts; the global random state is untouched.
    """
    generator = Generator().manual_seed(seed)
    labels = strata_of(targets).cpu()
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        ranks = torch.arange(len(members), dtype=torch.float64)
        position[shuffled] = (ranks + shift) / len(members)
    return position.argsort(stable=True)
