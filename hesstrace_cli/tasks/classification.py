"""One class for every example: softmax cross-entropy of logits (N, C)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hesstrace_cli.tasks.base import Meter, Selection, wrong_outputs, wrong_targets
from hesstrace_cli.tasks.softmax import SoftmaxTask, check_probabilities

_BINS = 15
_FAR = 10.0  # times log C
_TOLD = 0.03  # share of the labels' entropy that is next to nothing


@dataclass(frozen=True)
class Classification(SoftmaxTask):
    """Classes, or probabilities of classes, of whole examples."""

    name: ClassVar[str] = "classification"
    expects: ClassVar[str] = "logits (N, C) and class numbers (N,) or probabilities (N, C)"
    loss_name: ClassVar[str] = "cross-entropy"
    selection: ClassVar[Selection] = Selection("accuracy", higher_is_better=True)
    higher_is_better: ClassVar[Mapping[str, bool]] = {
        "accuracy": True,
        "balanced_accuracy": True,
        "calibration_error": False,
    }

    def check_targets(self, targets: Tensor, where: str) -> None:
        """Class numbers (N,), or probabilities (N, C)."""
        if not targets.is_floating_point():
            super().check_targets(targets, where)
            return
        if targets.dim() != 2:
            raise wrong_targets(self, targets, where)
        check_probabilities(targets, where)

    def check_outputs(self, outputs: Tensor, targets: Tensor, model: str) -> None:
        """A logit for each class."""
        if not targets.is_floating_point():
            super().check_outputs(outputs, targets, model)
        elif not outputs.is_floating_point() or outputs.shape != targets.shape:
            raise wrong_outputs(self, outputs, targets, model)
        else:
            self.check_weights(outputs.shape[1])

    def num_right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Those whose largest logit is that of their class."""
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        return (outputs.argmax(1) == labels).sum()

    def meter(self) -> Meter:
        """Accuracy, its mean over the classes, and the calibration error."""
        return ClassMeter()

    def collapse(self, loss: float, metrics: Mapping[str, float], targets: Tensor) -> str | None:
        """`collapse` where every example has a class."""
        if targets.is_floating_point():
            return None
        return collapse(loss, metrics["accuracy"], targets, self.class_weights)

    def any_targets(self, outputs: Tensor) -> Tensor | None:
        """The likeliest classes, as A knows of no class but by its weight."""
        return outputs.detach().argmax(1) if self.class_weights is None else None

    def mixable(self, targets: Tensor, num_outputs: int) -> Tensor:
        """Probabilities."""
        if targets.is_floating_point():
            return targets
        return F.one_hot(targets, num_outputs).to(torch.get_default_dtype())


class ClassMeter(Meter):
    """Accuracy, balanced accuracy and expected calibration error.

    The calibration error is the mean |accuracy - confidence| over 15 bins of confidence.

    Source:
        Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML 2017.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []  # of each batch the class, whether it was right, confidence
        self._num_classes = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch of logits (M, C); probabilities count for their largest class."""
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        confidence, predicted = F.softmax(outputs.double(), 1).max(1)
        self._rows.append(
            torch.stack([labels.double(), (predicted == labels).double(), confidence])
        )
        self._num_classes = outputs.shape[1]

    def result(self) -> dict[str, float]:
        """Over all terms, over the classes that occur, and over the bins."""
        # On the CPU, where the order of summation is always the same.
        labels, right, confidence = torch.cat(self._rows, 1).cpu()
        count = torch.bincount(labels.long(), minlength=self._num_classes)
        correct = torch.bincount(labels.long(), right, minlength=self._num_classes)
        bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
        gaps = torch.bincount(bins, right - confidence, minlength=_BINS)
        present = count > 0
        return {
            "accuracy": right.mean().item(),
            "balanced_accuracy": (correct[present] / count[present]).mean().item(),
            "calibration_error": gaps.abs().sum().item() / len(right),
        }


def collapse(
    loss: float, accuracy: float, labels: Tensor, weights: Sequence[float] | None = None
) -> str | None:
    """Whether a network tells next to nothing of these examples, and by what; None if not.

    Whoever names every class with its share of the examples, whatever the input, has a loss of the
    shares' entropy, the least that is possible so, and at most the largest share as accuracy. Who
    is no more often right, by more than two standard errors, and has told less than three per cent
    of that entropy, has learnt no more than that: a network whose weights were driven to 0 is left
    with a little of its inputs. With class weights the shares are those of the weights' sum, by
    which the losses are multiplied.

    Args:
        loss: The mean cross-entropy on the examples.
        accuracy: On them.
        labels: Theirs.
        weights: Of the classes in the loss; None weighs all alike.
    """
    classes, counts = labels.cpu().unique(return_counts=True)
    shares = counts.double() / len(labels)
    largest = shares.max().item()
    if weights is not None:
        shares = shares * torch.tensor(weights, dtype=torch.float64)[classes]
    whole = shares.sum().item()
    entropy = torch.special.entr(shares).sum().item() + math.log(max(whole, 1e-300)) * whole
    guess = whole * math.log(max(2, len(counts)))
    if loss > _FAR * guess:
        return f"a loss of {loss:.3g}, where a guess among the classes has {guess:.3g}"
    noise = 2 * math.sqrt(largest * (1 - largest) / len(labels))
    if entropy > 0 and loss >= (1 - _TOLD) * entropy and accuracy <= largest + noise:
        return (
            f"accuracy {accuracy:.3g} and loss {loss:.3g} are about those of the classes' shares "
            f"alone, {largest:.3g} and {entropy:.3g}"
        )
    return None
