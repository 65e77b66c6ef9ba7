"""Several labels at once, each there or not: binary cross-entropy of logits (N, D)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hesstrace_cli.errors import DataError
from hesstrace_cli.tasks.base import (
    Meter,
    Selection,
    Task,
    check_finite_targets,
    wrong_outputs,
    wrong_targets,
)


@dataclass(frozen=True)
class Multilabel(Task):
    """A mean over N and D, so that A = diag(p (1 - p)) / D with p = sigmoid(f)."""

    name: ClassVar[str] = "multilabel"
    expects: ClassVar[str] = "logits (N, D) and targets (N, D) of 0 and 1 or between them"
    loss_name: ClassVar[str] = "binary cross-entropy"
    selection: ClassVar[Selection] = Selection("loss", higher_is_better=False)
    higher_is_better: ClassVar[Mapping[str, bool]] = {
        "accuracy": True,
        "exact_match": True,
        "f1": True,
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "label-smoothing": "its targets are no single class to take a share from",
    }

    def check_targets(self, targets: Tensor, where: str) -> None:
        """Numbers from 0 to 1, (N, D)."""
        if targets.dim() != 2 or targets.is_complex():
            raise wrong_targets(self, targets, where)
        if targets.is_floating_point():
            check_finite_targets(targets, where)
        low, high = float(targets.min()), float(targets.max())
        if low < 0 or high > 1:
            raise DataError(
                f"{where}: targets go from {low:g} to {high:g}; --task {self.name} expects "
                f"{self.expects}"
            )

    def check_outputs(self, outputs: Tensor, targets: Tensor, model: str) -> None:
        """A logit a label."""
        if not outputs.is_floating_point() or outputs.shape != targets.shape:
            raise wrong_outputs(self, outputs, targets, model)

    def num_outputs(self, targets: Tensor) -> int:
        """D."""
        return targets.shape[1]

    def width(self, outputs: Tensor) -> int:
        """D."""
        return outputs.shape[1]

    def num_terms(self, targets: Tensor) -> int:
        """The examples."""
        return len(targets)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(1 / (N D)) sum of the binary cross-entropies."""
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))

    def num_right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The share of labels that are right, summed over examples."""
        return ((outputs > 0) == (targets > 0.5)).double().mean(1).sum()

    def meter(self) -> Meter:
        """Accuracy over labels, share of examples with all labels right, and F1."""
        return LabelMeter()

    def root(self, outputs: Tensor, targets: Tensor, e: Tensor) -> Tensor:
        """B e = (p (1 - p) / D)^(1/2) e, the root by logarithms, finite where p underflows."""
        root = torch.exp((F.logsigmoid(outputs) + F.logsigmoid(-outputs)) / 2)
        return root * e / math.sqrt(outputs.shape[1])

    def label_root(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        """(p - y) / D^(1/2), every label y drawn with its p."""
        p = torch.sigmoid(outputs)
        return (p - (noise < p).to(p.dtype)) / math.sqrt(outputs.shape[1])

    def curve(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        """A v = p (1 - p) v / D."""
        p = torch.sigmoid(outputs)
        return p * (1 - p) * vector / outputs.shape[1]

    def num_columns(self, outputs: Tensor) -> int:
        """D."""
        return outputs.shape[1]

    def columns(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """B times the D unit vectors."""
        eye = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        return self.root(outputs, targets, eye[:, None])

    def any_targets(self, outputs: Tensor) -> Tensor | None:
        """Zeros, as A knows nothing of them."""
        return torch.zeros_like(outputs)

    def curvature_traces(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """sum_d p (1 - p) / D."""
        p = torch.sigmoid(outputs)
        return (p * (1 - p)).mean(1)

    def mixable(self, targets: Tensor, num_outputs: int) -> Tensor:
        """Numbers between 0 and 1."""
        return targets if targets.is_floating_point() else targets.to(torch.get_default_dtype())

    def entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over examples of the labels' entropies together."""
        p = torch.sigmoid(outputs)
        entropies = torch.special.entr(p) + torch.special.entr(1 - p)
        return entropies.sum(1).mean()


class LabelMeter(Meter):
    """Accuracy over labels, share of examples with every label right, F1 over all labels."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch; a label is there where its probability is above one half."""
        truth, found = targets > 0.5, outputs > 0
        right = truth == found
        sums = torch.stack([
            right.sum(), torch.tensor(right.numel(), device=right.device), right.all(1).sum(),
            torch.tensor(len(right), device=right.device), (truth & found).sum(),
            truth.sum() + found.sum(),
        ]).double()  # fmt: skip
        self._sums = sums if self._sums is None else self._sums + sums

    def result(self) -> dict[str, float]:
        """Over all labels and examples."""
        assert self._sums is not None
        right, labels, whole, examples, both, either = self._sums.tolist()
        return {
            "accuracy": right / labels,
            "exact_match": whole / examples,
            "f1": 2 * both / either if either else 1.0,
        }
