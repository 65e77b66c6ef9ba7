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

from hesstrace_cli.data.checks import example_of, same_kind
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.errors import DataError
from hesstrace_cli.failures import is_out_of_memory
from hesstrace_cli.tasks import Classification, Task

Batch = tuple[Tensor, Tensor]
Item = TypeVar("Item")


class Split(Protocol):
    """Labelled examples that come in batches, preprocessed, on one device."""

    @property
    def labels(self) -> Tensor:
        """Class numbers, shape (N,)."""
        ...

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

    def subset(self, indices: Tensor) -> Split:
        """The split of the examples at `indices`, in that order."""
        ...

    def batches(self, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Inputs and labels, batch by batch, in order; the last may be smaller.

        Args:
            batch_size: Examples in a batch.
            first: The number of the first batch given.
            stride: Each stride-th batch from there is given, the others are not read.
        """
        ...

    def parts(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Inputs and labels of the examples at each of the given indices, part by part."""
        ...


@dataclass(frozen=True)
class TensorSplit:
    """Examples held as one tensor on the device: no workers, no copies.

    Attributes:
        inputs: uint8 or floating point, shape (N, ...).
        labels: int64, shape (N,).
        preprocess: Applied to every batch.
        dtype: Floating-point type of the batches.
        task: What they are for.
    """

    inputs: Tensor
    labels: Tensor
    preprocess: Preprocess
    dtype: torch.dtype = torch.float32
    task: Task = Classification()

    @property
    def num_terms(self) -> int:
        """The terms that the mean loss over the split is over."""
        return self.task.num_terms(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> TensorSplit:
        """The split of the examples at `indices`, in that order."""
        indices = indices.to(self.labels.device)
        inputs, labels = self.inputs[indices], self.labels[indices]
        return dataclasses.replace(self, inputs=inputs, labels=labels)

    def batches(self, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Inputs and labels, batch by batch, in order."""
        rows = torch.arange(len(self), device=self.labels.device)
        return self.parts(rows.split(batch_size)[first::stride])

    def parts(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Inputs and labels of the examples at each of the given indices."""
        if not indices:
            return
        # All at once, as every copy to a GPU waits for it.
        rows = torch.cat(list(indices)).to(self.labels.device)
        for chosen in rows.split([len(part) for part in indices]):
            yield self.preprocess(self.inputs[chosen], self.dtype), self.labels[chosen]


@dataclass(frozen=True)
class DatasetSplit:
    """Examples of a `torch.utils.data.Dataset`, read by a DataLoader.

    Attributes:
        dataset: Gives pairs of an input tensor and a label.
        indices: Which of its examples, in order.
        labels: int64, shape (N,), on the CPU.
        preprocess: Applied to every batch, on the device.
        device: Where the batches go.
        num_workers: Processes that read; 0 reads in this one.
        dtype: Floating-point type of the batches.
        task: What they are for.
        collate: Makes a batch of examples, each of them checked.
    """

    dataset: Dataset[Any]
    indices: Tensor
    labels: Tensor
    preprocess: Preprocess
    device: torch.device
    num_workers: int
    dtype: torch.dtype
    collate: Collate
    task: Task = Classification()

    @property
    def num_terms(self) -> int:
        """The terms that the mean loss over the split is over."""
        return self.task.num_terms(self.labels)

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, indices: Tensor) -> DatasetSplit:
        """The split of the examples at `indices`, in that order."""
        chosen, labels = self.indices[indices], self.labels[indices]
        return dataclasses.replace(self, indices=chosen, labels=labels)

    def batches(self, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Inputs and labels, batch by batch, in order."""
        return self.parts(torch.arange(len(self)).split(batch_size)[first::stride])

    def parts(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Inputs and labels of the examples at each of the given indices, read ahead by workers."""
        loader: DataLoader[Batch] = DataLoader(
            self.dataset,
            batch_sampler=[self.indices[chosen].tolist() for chosen in indices],
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=self.collate,
            # Without one, every pass would draw a seed for the workers from the global state.
            generator=Generator().manual_seed(0),
        )
        for (inputs, labels), chosen in zip(readable(loader), indices, strict=True):
            if inputs.is_floating_point() and not torch.isfinite(inputs).all():
                raise DataError("an input of the data set is NaN or infinite, expected numbers")
            self._check_labels(labels, chosen)
            inputs = inputs.to(self.device, non_blocking=True)
            yield self.preprocess(inputs, self.dtype), labels.to(self.device, non_blocking=True)

    def _check_labels(self, labels: Tensor, chosen: Tensor) -> None:
        """The subsets and the number of classes rest on the labels that were said before."""
        said = self.labels[chosen]
        if not torch.equal(labels, said):
            row = int((labels != said).nonzero()[0])
            raise DataError(
                f"{self.collate.name}: example {int(self.indices[chosen][row])} has the label "
                f"{int(labels[row])}, but {int(said[row])} when the data was opened, or in its "
                "`targets`; expected the same each time"
            )


def readable(examples: Iterable[Item]) -> Iterator[Item]:
    """What is read from files or by a user's code; what cannot be read is the data's fault.

    Raises:
        DataError: In one line, also where a worker met the problem.
    """
    try:
        yield from examples
        return
    except SystemExit as problem:
        reason = f"the code that reads the data called sys.exit({problem.code!r})"
    except (OSError, DataError) as problem:
        if is_out_of_memory(problem):
            raise
        reason = _reason(problem)
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
        return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """An order of the examples whose every beginning has about the classes' shares.

    Within a class the order is random; the j-th of its n examples stands at (j + u) / n of the
    whole, with one random shift u a class. The first M examples are a stratified subset.

    Args:
        labels: Shape (N,).
        seed: Of the random order and shifts; the global random state is untouched.
    """
    generator = Generator().manual_seed(seed)
    labels = labels.cpu()
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        ranks = torch.arange(len(members), dtype=torch.float64)
        position[shuffled] = (ranks + shift) / len(members)
    return position.argsort(stable=True)
