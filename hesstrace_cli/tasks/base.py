"""What a task is: how outputs and targets make a mean loss, and its curvature in the outputs.

The loss of a batch is a mean over its M terms (examples, or the tokens or pixels that count),

    L = (1/M) sum_m l(f_m, y_m),   A_m = d2 l(f_m, y_m) / df_m2 = B_m B_m^T,

and the Gauss-Newton part of its Hessian in the weights is G = (1/M) sum_m J_m^T A_m J_m. All else
(data, metrics, traces, penalties, comparisons) asks the task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hesstrace_cli import records
from hesstrace_cli.errors import ConfigError, DataError, ModelError


@dataclass(frozen=True)
class Selection:
    """The metric that picks the best epoch and a strength.

    Attributes:
        metric: A name among the task's metrics, or "loss".
        higher_is_better: Whether more of it is better.
    """

    metric: str
    higher_is_better: bool

    def score(self, loss: float, metrics: Mapping[str, float]) -> float:
        """The larger the better."""
        value = loss if self.metric == "loss" else metrics[self.metric]
        return value if self.higher_is_better else -value

    def as_dict(self) -> records.Selection:
        """For a record."""
        return {"metric": self.metric, "higher_is_better": self.higher_is_better}


class Meter(ABC):
    """Sums over the batches of a data set, on the device and without waiting for it.

    Attributes:
        loss: After `result` the mean of the task's loss; None where the metrics do not take it.
    """

    takes_loss: bool = False
    """Whether `loss` is found on the way, so that nobody else has to."""
    loss: float | None = None

    @abstractmethod
    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """The metrics of all batches together."""


@dataclass(frozen=True)
class Task(ABC):
    """A loss with its curvature; one file each.

    Attributes:
        name: As `--task` has it.
        counts_all: Whether every example has as many terms as any other.
        expects: What outputs and targets must look like, half a sentence for an error.
        loss_name: What the mean is of, for a sentence: "cross-entropy".
        selection: What the best epoch and a strength are picked by.
        higher_is_better: The metrics by name, and whether more of each is better.
        has_logit_scale: Whether A falls where outputs grow, as a language model's may, so that a
            run says how much of a change of tr(G) is A's.
        refuses: Regularizers that make no sense here, each with the reason.
    """

    name: ClassVar[str]
    counts_all: ClassVar[bool] = True
    expects: ClassVar[str]
    loss_name: ClassVar[str]
    selection: ClassVar[Selection]
    higher_is_better: ClassVar[Mapping[str, bool]]
    has_logit_scale: ClassVar[bool] = False
    refuses: ClassVar[Mapping[str, str]] = {}

    # -- what comes in

    @abstractmethod
    def check_targets(self, targets: Tensor, where: str) -> None:
        """Refuse targets of another shape, type or range.

        Args:
            targets: Of all examples, or of a batch.
            where: The data set's name, for the error.

        Raises:
            DataError: Saying what is expected and what was given.
        """

    @abstractmethod
    def check_outputs(self, outputs: Tensor, targets: Tensor, model: str) -> None:
        """Refuse a model's outputs that do not fit the targets.

        Args:
            outputs: For a batch.
            targets: Of the same batch.
            model: The model's name, for the error.

        Raises:
            ModelError: Saying what is expected and what was given.
        """

    @abstractmethod
    def num_outputs(self, targets: Tensor) -> int:
        """How many outputs a model needs, as far as all targets of a data set tell.

        For classes their number, else the numbers of a target.
        """

    @abstractmethod
    def width(self, outputs: Tensor) -> int:
        """How many outputs a model's are: of classes, or of the numbers of a target."""

    @abstractmethod
    def num_terms(self, targets: Tensor) -> int:
        """M, the number of terms that the mean loss of a batch is over."""

    def divisor(self, targets: Tensor) -> int:
        """M; 1 where no term counts, of which sums are 0 and so are their means."""
        return self.num_terms(targets) or 1

    # -- the loss

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the M terms of a batch, 0-dim; 0 where there is none."""

    def num_right(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """How many terms the outputs are right on, 0-dim; None where that is no question."""
        return None

    @property
    def has_accuracy(self) -> bool:
        """Whether outputs are right or not."""
        return type(self).num_right is not Task.num_right

    @abstractmethod
    def meter(self) -> Meter:
        """An empty sum of this task's metrics, those of `higher_is_better`."""

    def described_loss(self) -> str:
        """What the mean is of, with what this task's settings make of it."""
        return self.loss_name

    def collapse(self, loss: float, metrics: Mapping[str, float], targets: Tensor) -> str | None:
        """Whether a network tells nothing of these examples, and by what; None if not known.

        Args:
            loss: Its mean loss.
            metrics: Those of the examples.
            targets: Theirs.
        """
        return None

    # -- its curvature in the outputs; M stays out of these

    @abstractmethod
    def root(self, outputs: Tensor, targets: Tensor, e: Tensor) -> Tensor:
        """B e for every term, in the shape of the outputs; zero where a term does not count.

        Args:
            outputs: f.
            targets: y.
            e: Anything that broadcasts with the outputs.
        """

    def label_root(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        """The gradient in the outputs of every term's loss at a label drawn from the outputs.

        It is no part of B e for signs e, and E[u u^T] = A too.

        Args:
            outputs: f.
            targets: y, for which terms count and weigh what.
            noise: Independent numbers from [0, 1) in the shape of the outputs.
        """
        raise NotImplementedError

    @property
    def has_labels(self) -> bool:
        """Whether the outputs are a distribution of labels."""
        return type(self).label_root is not Task.label_root

    @abstractmethod
    def curve(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        """A v for every term, in the shape of the outputs."""

    @abstractmethod
    def num_columns(self, outputs: Tensor) -> int:
        """K, the number of `columns` for a batch like this."""

    @abstractmethod
    def columns(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Vectors u_k with sum_k u_k u_k^T = A for each example, its terms apart from each other.

        Returns:
            Shape (K, *outputs.shape): each is a cotangent for one backward pass of the batch, and
            the squared norms of an example's gradients add up to M times its part of tr(G).
        """

    @abstractmethod
    def curvature_traces(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """tr(A) of every term, 0 where it does not count: the outputs' shape without classes."""

    def term_numbers(self, outputs: Tensor) -> Tensor:
        """Which term, from 0, each output is of: int64 in the outputs' shape.

        The terms are in the order of `curvature_traces`; an example is one unless said otherwise.
        """
        numbers = torch.arange(len(outputs), device=outputs.device)
        return numbers.reshape(-1, *[1] * (outputs.dim() - 1)).expand_as(outputs)

    def any_targets(self, outputs: Tensor) -> Tensor | None:
        """Targets with the same curvature as any others; None where it hangs on them."""
        return None

    # -- what regularizers ask

    def smoothed(self, share: float) -> Task:
        """This task with a share of every target spread evenly over the classes.

        Raises:
            ConfigError: If its targets are no classes.
        """
        raise ConfigError(f"label-smoothing spreads a class's share over the others, and the "
                          f"targets of --task {self.name} are no classes")  # fmt: skip

    def mixable(self, targets: Tensor, num_outputs: int) -> Tensor:
        """The targets in a form of which weighted means make sense.

        Raises:
            ConfigError: If there is none.
        """
        raise ConfigError(f"mixup mixes targets, which --task {self.name} does not allow")

    def entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean entropy in nats of the predicted distributions of the terms, 0-dim.

        Raises:
            ConfigError: If the outputs are no distributions.
        """
        raise ConfigError(
            f"confidence penalizes distributions, and the outputs of --task {self.name} are none"
        )


def shape_of(tensor: Tensor) -> str:
    """A tensor's shape and type for an error."""
    return f"shape {tuple(tensor.shape)} and type {str(tensor.dtype).removeprefix('torch.')}"


def wrong_targets(task: Task, targets: Tensor, where: str) -> DataError:
    """The error for targets of another shape or type."""
    return DataError(
        f"{where}: targets have {shape_of(targets)}; --task {task.name} expects {task.expects}"
    )


def wrong_outputs(task: Task, outputs: Tensor, targets: Tensor, model: str) -> ModelError:
    """The error for outputs that do not fit."""
    return ModelError(
        f"model {model!r} gives outputs of {shape_of(outputs)} for targets of {shape_of(targets)}; "
        f"--task {task.name} expects {task.expects}"
    )


def check_finite_targets(targets: Tensor, where: str) -> None:
    """Refuse targets that are NaN or infinite.

    Raises:
        DataError: Naming the first.
    """
    finite = torch.isfinite(targets).flatten(1).all(1) if targets.dim() > 1 else (
        torch.isfinite(targets)
    )  # fmt: skip
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise DataError(f"{where}: {int((~finite).sum())} targets hold NaN or infinite values, "
                        f"the first is number {first}")  # fmt: skip
