"""Augmentation of whole batches on their device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def crop_flip(X: Tensor, *, generator: Generator, padding: int = 4) -> Tensor:
    """Crop each image at random from a zero-padded one, and flip half of them left to right.

    Args:
        X: Images, shape (N, C, H, W).
        generator: Source of all randomness, on the images' device.
        padding: Zeros on each side.

    Returns:
        Images of the same shape.
    """
    n, channels, height, width = X.shape
    padded = F.pad(X, [padding] * 4)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=X.device)

    rows = draw(2 * padding + 1) + torch.arange(height, device=X.device)
    columns = draw(2 * padding + 1) + torch.arange(width, device=X.device)
    columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    index = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).reshape(n, 1, -1)
    cropped = padded.flatten(2).gather(2, index.expand(-1, channels, -1))
    return cropped.reshape(X.shape)
