"""Half precision in training: the model's forward pass, while its mode is `train`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run_in_precision(model: nn.Module, precision: str, device: torch.device) -> None:
    """Make the model's forward pass run under autocast in training mode, logits in float32.

    Whoever calls the model, a penalty's derivatives included, gets the same; weights, gradients
    and evaluation stay in float32.

    Args:
        model: Changed in place.
        precision: "float32" changes nothing; "bf16" or "fp16".
        device: Where it runs.
    """
    if precision == "float32":
        return
    forward, dtype = model.forward, _TYPES[precision]

    def in_half(*args: Any, **kwargs: Any) -> Tensor:
        if not model.training:
            output: Tensor = forward(*args, **kwargs)
            return output
        # Without the cache: it holds weights of another call under functional transforms.
        with torch.autocast(device.type, dtype, cache_enabled=False):
            output = forward(*args, **kwargs)
        return output.float()

    model.forward = in_half
