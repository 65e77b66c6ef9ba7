"""Half precision in training, and full precision in what is measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from hesstrace_cli.autodiff.calls import outputs_of

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run_in_precision(model: nn.Module, precision: str, device: torch.device) -> None:
    """Make the model's forward pass run under autocast in training mode, outputs in float32.

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

    def in_half(*args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return forward(*args, **kwargs)
        # Without the cache: it holds weights of another call under functional transforms.
        with torch.autocast(device.type, dtype, cache_enabled=False):
            given = forward(*args, **kwargs)
        outputs = outputs_of(given).float()
        return {**given, "logits": outputs} if "state" in kwargs else outputs

    model.forward = in_half


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 in float32, which GPUs by default do not for convolutions (TF32).

    TF32 rounds factors to 10 bits: residuals and differences of measured curvatures would be those
    of the rounding. The settings are restored afterwards.
    """
    backends: Any = torch.backends
    parts = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [(part, part.fp32_precision) for part in parts]
    convolutions, products = _older_settings()
    # The older settings first: PyTorch refuses to be asked for one that the newer contradicts.
    _set_older_settings(False if convolutions else None, "highest" if products else None)
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        yield
    finally:
        _set_older_settings(convolutions, products)
        for part, precision in before:
            part.fp32_precision = precision


@contextmanager
def deterministic_algorithms(device: torch.device) -> Iterator[None]:
    """Sum in a fixed order on a GPU, where PyTorch knows how; kernels on CPUs do anyway.

    Operations that have no such algorithm run as they are. The settings are restored afterwards.
    """
    if device.type != "cuda":
        yield
        return
    filling: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
    try:
        filling.fill_uninitialized_memory = False  # for who reads what was never written
        torch.set_deterministic_debug_mode(max(1, before[0]))
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        filling.fill_uninitialized_memory = before[1]


def _older_settings() -> tuple[bool | None, str | None]:
    """Of convolutions and of products; None where a newer setting holds that they cannot tell."""
    convolutions = products = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are the older ones
        with suppress(RuntimeError):
            convolutions = torch.backends.cudnn.allow_tf32
        with suppress(RuntimeError):
            products = torch.get_float32_matmul_precision()
    return convolutions, products


def _set_older_settings(convolutions: bool | None, products: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        if products is not None:
            torch.set_float32_matmul_precision(products)
