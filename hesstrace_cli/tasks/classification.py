"""One class for every example: softmax cross-entropy of logits (N, C)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hesstrace_cli.tasks.base import Meter, Selection, wrong_outputs, wrong_targets
from hesstrace_cli.tasks.softmax import SoftmaxTask, check_probabilities

_BINS = 15


@dataclass(frozen=True)
class Classification(SoftmaxTask):
    """Classes, or probabilities of classes, of whole examples."""

    name: ClassVar[str] = "classification"
    expects: ClassVar[str] = "logits (N, C) and class numbers (N,) or probabilities (N, C)"
    selection: ClassVar[Selection] = Selection("accuracy", higher_is_better=True)

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

    def meter(self) -> Meter:
        """Accuracy, its mean over the classes, and the calibration error."""
        return ClassMeter()

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
        self._correct: Tensor | None = None  # by class
        self._count: Tensor | None = None
        self._gap: Tensor | None = None  # by bin

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch of logits (M, C); probabilities count for their largest class."""
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        confidence, predicted = F.softmax(outputs.double(), 1).max(1)
        right = (predicted == labels).double()
        if self._correct is None or self._count is None or self._gap is None:
            self._correct = outputs.new_zeros(outputs.shape[1], dtype=torch.float64)
            self._count = torch.zeros_like(self._correct)
            self._gap = outputs.new_zeros(_BINS, dtype=torch.float64)
        self._correct.index_add_(0, labels, right)
        self._count.index_add_(0, labels, torch.ones_like(right))
        bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
        self._gap.index_add_(0, bins, right - confidence)

    def result(self) -> dict[str, float]:
        """Over all terms, over the classes that occur, and over the bins."""
        assert self._correct is not None
        assert self._count is not None
        assert self._gap is not None
        total, present = self._count.sum(), self._count > 0
        recalls = self._correct[present] / self._count[present]
        values = torch.stack([
            self._correct.sum() / total, recalls.mean(), self._gap.abs().sum() / total
        ]).tolist()  # fmt: skip
        return dict(
            zip(("accuracy", "balanced_accuracy", "calibration_error"), values, strict=True)
        )
