"""Numbers to be met: the mean squared error of outputs (N, D)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hesstrace_cli.tasks.base import (
    Meter,
    Selection,
    Task,
    check_finite_targets,
    wrong_outputs,
    wrong_targets,
)


@dataclass(frozen=True)
class Regression(Task):
    """The squared error, a mean over N and D as PyTorch's own, so that A = (2 / D) I."""

    name: ClassVar[str] = "regression"
    expects: ClassVar[str] = "outputs and floating-point targets of one shape (N, D)"
    loss_name: ClassVar[str] = "squared error"
    selection: ClassVar[Selection] = Selection("rmse", higher_is_better=False)
    higher_is_better: ClassVar[Mapping[str, bool]] = {"rmse": False, "r2": True}
    refuses: ClassVar[Mapping[str, str]] = {
        "label-smoothing": "its targets are no classes",
        "confidence": "its outputs are no distributions",
    }

    def check_targets(self, targets: Tensor, where: str) -> None:
        """Finite numbers, (N, D)."""
        if not targets.is_floating_point() or targets.dim() < 2:
            raise wrong_targets(self, targets, where)
        check_finite_targets(targets, where)

    def check_outputs(self, outputs: Tensor, targets: Tensor, model: str) -> None:
        """As many numbers as the targets have; PyTorch would broadcast others."""
        if not outputs.is_floating_point() or outputs.shape != targets.shape:
            raise wrong_outputs(self, outputs, targets, model)

    def num_outputs(self, targets: Tensor) -> int:
        """D."""
        return self._size(targets)

    def width(self, outputs: Tensor) -> int:
        """D."""
        return self._size(outputs)

    def num_terms(self, targets: Tensor) -> int:
        """The examples."""
        return len(targets)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(1 / (N D)) sum ||f - y||^2."""
        return F.mse_loss(outputs, targets.to(outputs.dtype))

    def meter(self) -> Meter:
        """Root mean squared error and the share of the variance that is explained."""
        return ErrorMeter()

    def _size(self, outputs: Tensor) -> int:
        return math.prod(outputs.shape[1:])

    def root(self, outputs: Tensor, targets: Tensor, e: Tensor) -> Tensor:
        """(2 / D)^(1/2) e."""
        return (e * math.sqrt(2 / self._size(outputs))).expand_as(outputs)

    def curve(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        """(2 / D) v."""
        return vector * (2 / self._size(outputs))

    def num_columns(self, outputs: Tensor) -> int:
        """D."""
        return self._size(outputs)

    def columns(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(2 / D)^(1/2) times the D unit vectors."""
        D = self._size(outputs)
        eye = torch.eye(D, dtype=outputs.dtype, device=outputs.device) * math.sqrt(2 / D)
        return eye[:, None].expand(D, len(outputs), D).reshape(D, *outputs.shape)

    def any_targets(self, outputs: Tensor) -> Tensor | None:
        """Zeros, as A knows nothing of them."""
        return torch.zeros_like(outputs)

    def curvature_traces(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """2."""
        return outputs.new_full((len(outputs),), 2.0)

    def mixable(self, targets: Tensor, num_outputs: int) -> Tensor:
        """As they are."""
        return targets


class ErrorMeter(Meter):
    """rmse over all numbers, and r2 = 1 - residual / total variance, a mean over the D outputs."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (4, D): 1, y, y^2, (f - y)^2

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch."""
        f, y = outputs.double().flatten(1), targets.double().flatten(1)
        sums = torch.stack([
            torch.ones_like(y).sum(0), y.sum(0), y.square().sum(0), (f - y).square().sum(0)
        ])  # fmt: skip
        self._sums = sums if self._sums is None else self._sums + sums

    def result(self) -> dict[str, float]:
        """An output whose targets are all the same has no variance to explain and is left out."""
        assert self._sums is not None
        count, total, squares, errors = self._sums
        spread = squares - total.square() / count
        varies = spread > 1e-12 * squares
        explained = (1 - errors[varies] / spread[varies]).mean()
        return {
            "rmse": (errors.sum() / count.sum()).sqrt().item(),
            "r2": explained.item() if varies.any() else 0.0,
        }
