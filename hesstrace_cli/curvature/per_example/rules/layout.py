"""How rows belong to examples, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Norms = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How the R = N L rows of an operation belong to the N examples.

    Attributes:
        num_examples: N.
        strided: Whether example i has the rows i, i + N, ... (sequence first) and not
            i L, ..., i L + L - 1 (batch first).
    """

    num_examples: int
    strided: bool = False

    def group(self, rows: Tensor) -> Tensor:
        """From (R, ...) to (N, L, ...)."""
        if self.strided:
            return rows.unflatten(0, (-1, self.num_examples)).transpose(0, 1)
        return rows.unflatten(0, (self.num_examples, -1))


Scales = Mapping[str, Tensor | None]
"""The roles whose norms are wanted, and what multiplies each entry of a gradient first, if any."""
NormsOf = Callable[[Tensor, Layout, Scales], Norms]
JointNormsOf = Callable[[Sequence[Tensor], Layout, Scales], Norms]
"""The same of several operations that share their parameters."""


Rows = Callable[[Tensor], Tensor]
"""From what autograd has saved to the rows (N, L, d) of every example."""


def in_full(tensor: Tensor) -> Tensor:
    """In single precision at least: squares of half-precision numbers overflow."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def total_squares(gradients: Tensor, scale: Tensor | None) -> Tensor:
    """||s P_i||^2 for every example's gradient P_i, from (N, ...) to (N,)."""
    gradients = in_full(gradients)
    scaled = gradients if scale is None else gradients * scale
    return scaled.flatten(1).square().sum(1)


def is_recorded(*tensors: Tensor) -> bool:
    """Whether what is done with them will be differentiated."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def output_shape(node: Any) -> list[int]:
    """The shape of what an operation gave."""
    return list(node._input_metadata[0].shape)
