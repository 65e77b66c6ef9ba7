"""A class for every token of a sequence: softmax cross-entropy of logits (N, T, C)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hesstrace_cli.tasks.base import Meter, Selection
from hesstrace_cli.tasks.softmax import SoftmaxTask


@dataclass(frozen=True)
class Tokens(SoftmaxTask):
    """Classes of tokens, as of a language model; a mean over the tokens that count.

    Attributes:
        ignore_index: The target of tokens that do not count.
    """

    name: ClassVar[str] = "tokens"
    counts_all: ClassVar[bool] = False
    expects: ClassVar[str] = "logits (N, T, C) and class numbers (N, T)"
    loss_name: ClassVar[str] = "cross-entropy of tokens"
    selection: ClassVar[Selection] = Selection("perplexity", higher_is_better=False)
    higher_is_better: ClassVar[Mapping[str, bool]] = {"perplexity": False, "accuracy": True}
    refuses: ClassVar[Mapping[str, str]] = {
        "mixup": "tokens are indices, of which no mean can be taken",
        "cutout": "it erases a square of an image",
    }
    ignore_index: int = -100

    @property
    def class_dim(self) -> int:
        """The last."""
        return 2

    @property
    def ignored(self) -> int:
        """The ignored index."""
        return self.ignore_index

    def target_dim(self) -> tuple[int, ...]:
        """(N, T)."""
        return (2,)

    def num_right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Those that count and whose largest logit is that of their class."""
        right = outputs.argmax(self.class_dim) == targets
        return (right & (targets != self.ignore_index)).sum()

    def meter(self) -> Meter:
        """Perplexity and accuracy."""
        return TokenMeter(self.ignore_index)


class TokenMeter(Meter):
    """Perplexity, exp of the mean cross-entropy of all tokens that count, and their accuracy."""

    def __init__(self, ignore_index: int) -> None:
        self._ignored = ignore_index
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
        return {
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "accuracy": right / count,
        }
