"""A class for every pixel: softmax cross-entropy of logits (N, C, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hesstrace_cli.tasks.base import Meter, Selection
from hesstrace_cli.tasks.places import PlacesTask


@dataclass(frozen=True)
class Segmentation(PlacesTask):
    """Classes of pixels."""

    name: ClassVar[str] = "segmentation"
    expects: ClassVar[str] = "logits (N, C, H, W) and class numbers (N, H, W)"
    loss_name: ClassVar[str] = "cross-entropy of pixels"
    selection: ClassVar[Selection] = Selection("mean_iou", higher_is_better=True)
    higher_is_better: ClassVar[Mapping[str, bool]] = {"accuracy": True, "mean_iou": True}
    refuses: ClassVar[Mapping[str, str]] = {
        "mixup": "a pixel has one class, and mixed images have two",
        "cutout": "it would leave classes to erased pixels",
        "dropout": "the last layer is no linear layer on whole examples",
    }

    def target_dim(self) -> tuple[int, ...]:
        """(N, H, W)."""
        return (3,)

    def meter(self) -> Meter:
        """Pixel accuracy and the mean intersection over union."""
        return PixelMeter(self.ignore_index)


class PixelMeter(Meter):
    """Accuracy over pixels, and intersection over union, a mean over the classes that occur."""

    def __init__(self, ignore_index: int) -> None:
        self._ignored = ignore_index
        self._confusion: Tensor | None = None  # (true, predicted)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch of logits (N, C, H, W)."""
        num_classes = outputs.shape[1]
        counts = targets != self._ignored
        pairs = torch.where(counts, targets * num_classes + outputs.argmax(1), num_classes**2)
        found = torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)[:-1]
        found = found.reshape(num_classes, num_classes).double()
        self._confusion = found if self._confusion is None else self._confusion + found

    def result(self) -> dict[str, float]:
        """Over all pixels that count."""
        assert self._confusion is not None
        both = self._confusion.diagonal()
        either = self._confusion.sum(0) + self._confusion.sum(1) - both
        occurs = self._confusion.sum(1) > 0
        return {
            "accuracy": (both.sum() / self._confusion.sum()).item(),
            "mean_iou": (both[occurs] / either[occurs]).mean().item(),
        }
