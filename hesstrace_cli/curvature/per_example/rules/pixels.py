"""Gram matrices of a convolution's patches, as sums over its window of parts of one of pixels.

The patch at position l holds the pixels s l + d j for the places j of the window, so that

    x_l . x_l'  =  sum_j a(s l + d j, s l' + d j)

with a(p, p') the product of two pixels' channels: no patch is made, and there are fewer products by
the size of the window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PixelWindows:
    """The windows of a convolution at the positions of what it gives.

    Attributes:
        size: Of the window, by dimension.
        stride: s, by dimension.
        dilation: d, by dimension.
        padding: Before the first pixel, by dimension.
        places: How many positions there are, by dimension.
        num_images: Of one example.
    """

    size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[int]
    places: Sequence[int]
    num_images: int

    @property
    def is_point(self) -> bool:
        """Whether a patch is a pixel."""
        return math.prod(self.size) == 1

    @property
    def reach(self) -> list[int]:
        """The pixels that some window sees, by dimension, padding included."""
        return [
            s * (n - 1) + d * (k - 1) + 1
            for k, s, d, n in zip(self.size, self.stride, self.dilation, self.places, strict=True)
        ]

    @property
    def num_pixels(self) -> int:
        """Of one example."""
        return self.num_images * math.prod(self.places if self.is_point else self.reach)

    def pixels(self, images: Tensor) -> Tensor:
        """The images (R, C, ...) with what is around them, and without what no window sees."""
        ends = zip(images.shape[2:], self.padding, self.reach, strict=True)
        around = [n for size, before, reach in ends for n in (reach - size - before, before)]
        padded = F.pad(images, around[::-1])
        if not self.is_point:
            return padded
        steps = tuple(slice(None, None, s) for s in self.stride)
        at = (slice(None), slice(None), *steps)
        return padded[at]

    def sums(self, gram: Tensor) -> Tensor:
        """From (B, pixels, pixels) to (B, positions, positions)."""
        if self.is_point:
            return gram
        parts = self._parts(gram)
        total = next(parts).clone()
        for part in parts:
            total += part
        positions = self.num_images * math.prod(self.places)
        return total.reshape(-1, positions, positions)

    def spread(self, gram: Tensor) -> Tensor:
        """The derivative of `sums`: back from the positions to the pixels."""
        if self.is_point:
            return gram
        whole = gram.new_zeros(len(gram), self.num_pixels, self.num_pixels)
        shape = (self.num_images, *self.places)
        gram = gram.unflatten(2, shape).unflatten(1, shape)
        for part in self._parts(whole):
            part += gram
        return whole

    def _parts(self, gram: Tensor) -> Iterator[Tensor]:
        """Views of the pixels' matrix, one for each place of the window."""
        shape = (self.num_images, *self.reach)
        gram = gram.unflatten(2, shape).unflatten(1, shape)
        for offsets in itertools.product(*map(range, self.size)):
            seen = tuple(
                slice(d * j, d * j + s * (n - 1) + 1, s)
                for j, d, s, n in zip(
                    offsets, self.dilation, self.stride, self.places, strict=True
                )
            )  # fmt: skip
            whole = slice(None)
            at = (whole, whole, *seen, whole, *seen)
            yield gram[at]
