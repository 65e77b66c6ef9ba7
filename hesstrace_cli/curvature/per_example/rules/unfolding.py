"""Patches of images, unfolded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hesstrace_cli.autodiff.convolution import Kernel


def _two(values: Sequence[int], default: int) -> tuple[int, int]:
    return (default, int(values[0])) if len(values) == 1 else (int(values[0]), int(values[1]))


def unfolded(images: Tensor, size: Sequence[int], kernel: Kernel, places: Sequence[int]) -> Tensor:
    """The patches (R, numbers in a patch, places) of images in one or two dimensions.

    Args:
        images: Shape (R, C, ...).
        size: Of the window.
        kernel: Its settings.
        places: How many are asked for, by dimension; output padding leaves some after them that
            meet none.
    """
    window: dict[str, Any] = {
        "kernel_size": _two(size, 1),
        "dilation": _two(kernel.dilation, 1),
        "padding": _two(kernel.padding, 0),
        "stride": _two(kernel.stride, 1),
    }
    by_axis = [window[name] for name in ("padding", "dilation", "kernel_size", "stride")]
    images = images.unsqueeze(2) if len(size) == 1 else images
    grid = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(images.shape[2:], *by_axis, strict=True)
    ]
    columns = F.unfold(images, **window)
    if math.prod(grid) == math.prod(places):
        return columns
    height, width = _two(places, 1)
    return columns.unflatten(2, grid)[:, :, :height, :width].flatten(2)
