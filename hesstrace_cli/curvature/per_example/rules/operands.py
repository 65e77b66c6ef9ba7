"""What autograd has saved of a convolution, PyTorch's own or that of second derivatives."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from hesstrace_cli.autodiff.convolution import BOTH, OF_WEIGHTS, Kernel
from hesstrace_cli.curvature.per_example.linearity import operation

CONVOLUTIONS = ("Convolution", f"autograd.Function {OF_WEIGHTS}")
"""The names of their nodes."""


def kernel_of(node: Any) -> Kernel:
    """The settings of a convolution."""
    if isinstance(node, BackwardCFunction):
        own: Kernel = node.kernel  # type: ignore[attr-defined]
        return own
    return Kernel(
        list(node._saved_stride), list(node._saved_padding), list(node._saved_dilation),
        node._saved_transposed, list(node._saved_output_padding), node._saved_groups,
    )  # fmt: skip


def operands(node: Any) -> tuple[Tensor | None, Tensor]:
    """The input, saved only where the weight needs a gradient, and the weight."""
    if isinstance(node, BackwardCFunction):
        saved: Any = node.saved_tensors
        X, W, _ = saved
        return (X if W.requires_grad else None), W
    return node._saved_input, node._saved_weight


def with_weights(node: Any) -> Any:
    """The node behind some outputs, or that of a convolution which has its weights."""
    if node is not None and operation(node) == f"autograd.Function {BOTH}":
        return node.next_functions[1][0]
    return node
