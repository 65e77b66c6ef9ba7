"""Cutout: a square at a random place of every image is set to zero, the mean after normalization.

Source:
    DeVries, Taylor, "Improved regularization of convolutional neural networks with cutout",
    arXiv 1708.04552. As there, the centre may lie anywhere in the image, so that the square
    may reach beyond its border.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hesstrace_cli.errors import ConfigError
from hesstrace_cli.regularizers.base import Regularizer


class Cutout(Regularizer):
    """Erases a square of `strength` pixels a side."""

    name = "cutout"
    reads_weights = None
    default = 8
    unit = "side in pixels"
    spacing = "whole"

    def transform(self, X: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Erase a square of every image.

        Raises:
            ConfigError: If the inputs are no images, or the square is larger than they are.
        """
        side = int(self.strength)
        if X.dim() != 4 or not X.is_floating_point() or side > max(X.shape[2:]):
            what = "" if X.is_floating_point() else " of indices"
            raise ConfigError(
                f"cutout={side} erases a square of {side} pixels of images (C, H, W), the inputs "
                f"have shape {tuple(X.shape[1:])}{what}"
            )

        def covered(length: int) -> Tensor:  # (N, length)
            centre = torch.randint(length, (len(X), 1), generator=generator, device=X.device)
            offset = torch.arange(length, device=X.device) - (centre - side // 2)
            return (offset >= 0) & (offset < side)

        rows, columns = covered(X.shape[2]), covered(X.shape[3])
        erased = rows[:, None, :, None] & columns[:, None, None, :]
        return X.masked_fill(erased, 0), targets
