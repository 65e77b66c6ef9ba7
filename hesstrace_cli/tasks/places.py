"""A class for every place of an example, of which some do not count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hesstrace_cli.tasks.softmax import SoftmaxTask


@dataclass(frozen=True)
class PlacesTask(SoftmaxTask):
    """Classes of tokens or pixels; a mean over those that count.

    Attributes:
        ignore_index: The target of places that do not count.
    """

    counts_all: ClassVar[bool] = False
    ignore_index: int = -100

    @property
    def ignored(self) -> int:
        """The ignored index."""
        return self.ignore_index

    def num_right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Those that count and whose largest logit is that of their class."""
        right = outputs.argmax(self.class_dim) == targets
        return (right & (targets != self.ignore_index)).sum()
