"""A class for every token of a sequence: softmax cross-entropy of logits (N, T, C)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hesstrace_cli.tasks.base import Meter, Selection
from hesstrace_cli.tasks.places import PlacesTask


@dataclass(frozen=True)
class Tokens(PlacesTask):
    """Classes of tokens, as of a language model."""

    name: ClassVar[str] = "tokens"
    expects: ClassVar[str] = "logits (N, T, C) and class numbers (N, T)"
    loss_name: ClassVar[str] = "cross-entropy of tokens"
    selection: ClassVar[Selection] = Selection("perplexity", higher_is_better=False)
    higher_is_better: ClassVar[Mapping[str, bool]] = {"perplexity": False, "accuracy": True}
    has_logit_scale: ClassVar[bool] = True
    refuses: ClassVar[Mapping[str, str]] = {
        "mixup": "tokens are indices, of which no mean can be taken",
        "cutout": "it erases a square of an image",
    }

    @property
    def class_dim(self) -> int:
        """The last."""
        return 2

    def target_dim(self) -> tuple[int, ...]:
        """(N, T)."""
        return (2,)

    def meter(self) -> Meter:
        """Perplexity and accuracy."""
        is_loss = self.class_weights is None and not self.label_smoothing
        return TokenMeter(self.ignore_index, is_loss=is_loss)


class TokenMeter(Meter):
    """Perplexity, exp of the mean cross-entropy of all tokens that count, and their accuracy.

    Args:
        ignore_index: The target of tokens that do not count.
        is_loss: Whether that mean is the task's loss.
    """

    def __init__(self, ignore_index: int, *, is_loss: bool) -> None:
        self._ignored, self.takes_loss = ignore_index, is_loss
        self._sums: Tensor | None = None

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch of logits (N, T, C)."""
        counts = targets != self._ignored
        loss = torch.nn.functional.cross_entropy(
            outputs.flatten(0, 1), targets.flatten(), ignore_index=self._ignored, reduction="sum"
        )
        right = ((outputs.argmax(-1) == targets) & counts).sum()
        sums = torch.stack([loss.double(), right.double(), counts.sum().double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def result(self) -> dict[str, float]:
        """Over all tokens that count."""
        assert self._sums is not None
        loss, right, count = self._sums.tolist()
        mean = loss / count
        self.loss = mean if self.takes_loss else None
        return {
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "accuracy": right / count,
        }
