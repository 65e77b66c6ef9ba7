"""How much a rule that is not differentiated works on at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Numbers in the largest temporary tensor of a rule (64 MiB in float32)."""


def at_once(numbers: int) -> int:
    """How many examples are worked on at a time, each one's temporary having so many numbers."""
    return max(1, CHUNK // max(1, numbers))


def in_chunks(function: Callable[..., Tensor], numbers: int, *tensors: Tensor) -> Tensor:
    """Apply it to chunks of examples; each example's temporary has so many numbers."""
    chunks = zip(*(t.split(at_once(numbers)) for t in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])
