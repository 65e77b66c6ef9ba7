"""Activation checkpointing (`torch.utils.checkpoint`) switched off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint


class _PlainCall:
    """In the place of the autograd.Function behind `use_reentrant=True`."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve_random_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Run what is inside as if nothing in it was checkpointed; values are the same.

    A checkpointed part is run again in the backward pass, where other operations would run than
    those of `differentiable_ops`; and the reentrant form has no `autograd.grad` at all.
    """
    # One frame's hooks on saved tensors, for `use_reentrant=False`.
    replaced = {
        "CheckpointFunction": _PlainCall,
        "_checkpoint_hook": lambda _frame: contextlib.nullcontext(),
    }
    own = {name: getattr(checkpoint, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(checkpoint, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(checkpoint, name, value)
