"""The mean loss of a model over a data set, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.distributed.parallel import ALONE, Ranks
from hesstrace_cli.errors import DataError

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def check_counts(num_terms: int, num_examples: int) -> None:
    """Refuse examples of which no term counts, as a few of many may be.

    Raises:
        DataError: Saying how many examples there are.
    """
    if num_terms == 0:
        raise DataError(
            f"every target of these {num_examples} examples is the ignored index, expected some "
            "that count; take more examples or others"
        )


@dataclass(frozen=True)
class Batch:
    """A batch of a pass over the data.

    Attributes:
        number: Its number in the pass, from 0, the same in every pass.
        X: Inputs, N_b of them.
        y: Targets.
        share: M_b / M, its terms among those of the data set: its weight in the mean loss.
    """

    number: int
    X: Tensor
    y: Tensor
    share: float


@dataclass(frozen=True)
class DataLoss:
    """L(w) = sum_b (M_b / M) L_b(w): a mean over the M terms of all batches, not over batches.

    Attributes:
        objective: The mean loss L_b of a batch.
        batches: Gives the same batches on every call; of several processes each its own, every
            `ranks.size`-th from number `ranks.rank`.
        num_examples: N, of all batches together.
        num_terms: M, of all batches together.
        ranks: The processes that share the batches.

    Raises:
        DataError: If there is no term.
    """

    objective: Objective
    batches: Batches
    num_examples: int
    num_terms: int
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        check_counts(self.num_terms, self.num_examples)

    @classmethod
    def counted(cls, objective: Objective, batches: Batches) -> DataLoss:
        """The loss over batches whose examples and terms are counted in a first pass."""
        targets = [y for _, y in batches()]
        num_terms = sum(objective.task.num_terms(y) for y in targets)
        return cls(objective, batches, sum(map(len, targets)), num_terms)

    def __iter__(self) -> Iterator[Batch]:
        """This process's batches; those without a term that counts are left out."""
        for index, (X, y) in enumerate(self.batches()):
            share = self.objective.task.num_terms(y) / self.num_terms
            if share:
                yield Batch(self.ranks.rank + index * self.ranks.size, X, y, share)
