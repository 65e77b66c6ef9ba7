"""Tensors and models in another floating-point precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the precision of `dtype`: complex numbers stay complex, integers as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def cast_model(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Put a model's parameters and buffers on a device, in the precision of `dtype`.

    `Module.to(dtype)` would drop the imaginary parts of complex ones.

    Args:
        model: Changed in place.
        device: Where to.
        dtype: A real floating-point type.
    """
    return model.to(device)._apply(lambda tensor: cast(tensor, dtype))
