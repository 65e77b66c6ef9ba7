"""Weights rounded to few bits: symmetric, to the nearest level, a scale for each group of them.

    Q(w) = s round(w / s),   |round(w / s)| <= 2^(b - 1) - 1

so that b bits hold the level: two bits -1, 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scaling = Literal["max", "least-squares"]
SCALE_BITS = 16
"""That a scale takes up, as a half-precision number."""

_SHARES = 64  # of the largest scale that least squares tries


@dataclass(frozen=True)
class Groups:
    """Which weights of a tensor have a scale in common.

    Attributes:
        kind: All ("tensor"), those of one index of the first dimension ("channel"), or `size`
            of these that follow each other ("group").
        size: Of a group; the last one of a channel may be smaller.
    """

    kind: Literal["tensor", "channel", "group"]
    size: int = 0

    def number(self, weight: Tensor) -> int:
        """The number of scales of a tensor."""
        return len(self._rows(weight))

    def _rows(self, weight: Tensor) -> Tensor:
        """A row a group; zeros, which are rounded to themselves, fill the smaller ones up."""
        if self.kind == "tensor":
            return weight.reshape(1, -1)
        rows = weight.flatten(1) if weight.dim() > 1 else weight.reshape(-1, 1)
        if self.kind == "channel":
            return rows
        size = min(self.size, rows.shape[1])  # a longer group is the channel
        return F.pad(rows, (0, -rows.shape[1] % size)).reshape(-1, size)

    def _shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        if self.kind != "group":
            return rows.reshape(like.shape)
        channels = like.shape[0]
        return rows.reshape(channels, -1)[:, : like.numel() // channels].reshape(like.shape)


def quantize(weight: Tensor, bits: int, groups: Groups, scaling: Scaling = "max") -> Tensor:
    """Q(w), in the precision that w has.

    Args:
        weight: w, of any shape.
        bits: b >= 2.
        groups: What shares a scale.
        scaling: s = max |w| / (2^(b - 1) - 1), so that nothing is cut off; or, of as many as 64
            smaller ones too, that with the least ||Q(w) - w||^2.
    """
    rows = groups._rows(weight.detach())
    levels = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True) / levels
    best = _rounded(rows, largest, levels)
    if scaling == "least-squares":
        least = (best - rows).square().sum(1, keepdim=True)
        for step in range(1, _SHARES):
            tried = _rounded(rows, largest * (1 - step / _SHARES), levels)
            error = (tried - rows).square().sum(1, keepdim=True)
            best = torch.where(error < least, tried, best)
            least = torch.minimum(error, least)
    return groups._shaped(best, weight)


def _rounded(rows: Tensor, scale: Tensor, levels: int) -> Tensor:
    scale = torch.where(scale > 0, scale, 1)
    return (rows / scale).round().clamp(-levels, levels) * scale


def squared_error(weight: Tensor, rounded: Tensor) -> float:
    """||Q(w) - w||^2."""
    return (rounded.double() - weight.detach().double()).square().sum().item()


def megabytes(bits: float) -> float:
    """Bits as megabytes of 10^6 bytes."""
    return bits / 8e6
