"""A text held as one tensor on the device, read in windows that follow each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesstrace_cli.data.splits import Batch
from hesstrace_cli.tasks import Task

EVALUATED_STREAMS = 10
"""Streams that a text is evaluated in by a model that carries its state, whatever the batch."""


@dataclass(frozen=True)
class TextSplit:
    """Windows of a text: T tokens each, to each token the one that follows as its target.

    Window i holds the tokens from i T on, so that all but the first token are targets, each once.
    In the last window what lies beyond the end does not count.

    Attributes:
        tokens: int64, shape (W T + 1,): the text, beyond its end the ignored index.
        end: How many tokens the text has.
        length: T.
        task: What they are for.
        rows: Which of the W windows, in order; None for all, as they follow each other.
    """

    tokens: Tensor
    end: int
    length: int
    task: Task
    rows: Tensor | None = None

    @classmethod
    def of(cls, text: Tensor, length: int, task: Task, ignored: int) -> TextSplit:
        """The windows of a text, shape (n,), n > T; the last filled up with the ignored index."""
        num_windows = -(-(len(text) - 1) // length)
        tokens = text.new_full((num_windows * length + 1,), ignored)
        tokens[: len(text)] = text
        return cls(tokens, len(text), length, task)

    @property
    def is_consecutive(self) -> bool:
        """Whether the windows follow each other, so that a state can be carried on."""
        return self.rows is None

    @property
    def targets(self) -> Tensor:
        """The token behind each of the inputs, shape (N, T)."""
        following = self.tokens[1:].view(-1, self.length)
        return following if self.rows is None else following[self.rows]

    @property
    def num_terms(self) -> int:
        """The tokens that count."""
        return self.task.num_terms(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> TextSplit:
        """The split of the windows at `indices`, in that order, each on its own."""
        indices = indices.to(self.tokens.device)
        return dataclasses.replace(self, rows=indices if self.rows is None else self.rows[indices])

    def of_task(self, task: Task) -> TextSplit:
        """The same windows for a task."""
        return dataclasses.replace(self, task=task)

    def batches(self, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Inputs and targets, batch by batch, in order."""
        rows = torch.arange(len(self), device=self.tokens.device)
        return self.parts(rows.split(batch_size)[first::stride])

    def parts(self, indices: Sequence[Tensor]) -> Iterator[Batch]:
        """Inputs and targets of the windows at each of the given indices."""
        if not indices:
            return
        # All at once, as every copy to a GPU waits for it.
        rows = torch.cat(list(indices)).to(self.tokens.device)
        rows = rows if self.rows is None else self.rows[rows]
        steps = torch.arange(self.length, device=rows.device)
        for chosen in rows.split([len(part) for part in indices]):
            places = chosen[:, None] * self.length + steps
            X = torch.where(places < self.end, self.tokens[places], 0)
            yield X, self.tokens[places + 1]


def streams(num_windows: int, num_streams: int) -> list[Tensor]:
    """Batches that read a text in several streams at once, each window behind the one before.

    The text's W windows are cut into B runs of almost equal length. Batch k holds the k-th window
    of every run, in the runs' order: what stands in row b of a batch goes on in row b of the next.
    Where the runs come out unequal, the first ones are a window longer, and the last batch has
    these alone.

    Args:
        num_windows: W.
        num_streams: B; no more than there are windows are read.

    Returns:
        The windows' numbers, batch by batch: every one of them once.
    """
    num_streams = min(num_streams, num_windows)
    each, longer = divmod(num_windows, num_streams)
    number = torch.arange(num_streams)
    begins = number * each + number.clamp(max=longer)
    batches = list((begins + torch.arange(each)[:, None]).unbind())
    return [*batches, begins[:longer] + each] if longer else batches
