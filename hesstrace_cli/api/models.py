"""The model itself in what wraps it: data-parallel, compiled."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hesstrace_cli.errors import ConfigError, ModelError


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel, DataParallel or `torch.compile` wraps.

    Raises:
        ConfigError: If it is no module, or its parameters are sharded.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return unwrapped(compiled)
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        inner: nn.Module = model.module
        return unwrapped(inner)
    if any("FSDP" in kind.__name__ or "FullySharded" in kind.__name__
           for module in model.modules() for kind in type(module).__mro__):  # fmt: skip
        raise ConfigError("the model's parameters are sharded (FSDP), which second derivatives of "
                          "them do not follow; use DistributedDataParallel")  # fmt: skip
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether a call of the model runs compiled code, through which there is one derivative."""
    return any(
        isinstance(getattr(module, "_orig_mod", None), nn.Module)
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def eager() -> Iterator[None]:
    """Run what is compiled operation by operation, so that it has derivatives of every order."""
    if "torch._dynamo" not in sys.modules:  # which takes seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def apart(model: nn.Module) -> nn.Module:
    """The model to move weights of for a while: a copy where autograd holds on to the original's.

    A parameter that was in double precision for a while has another gradient accumulator
    afterwards: a graph recorded before would no longer find it, nor would
    DistributedDataParallel's hooks be called.
    """
    if not any(_is_held(p) for p in model.parameters() if p.requires_grad):
        return model
    # Tensors that a module computed, as weight_norm's weight, cannot be copied with their graph.
    computed = {
        id(t): t.detach().clone()
        for module in model.modules()
        for t in vars(module).values()
        if isinstance(t, Tensor) and not t.is_leaf
    }
    return copy.deepcopy(model, dict[int, Any](computed))


def _is_held(p: Tensor) -> bool:
    """Whether someone holds the parameter's gradient accumulator: it is made anew where not."""
    _accumulator(p).metadata[_MARK] = True
    held = _MARK in _accumulator(p).metadata
    _accumulator(p).metadata.pop(_MARK, None)
    return held


_MARK = "hesstrace"


def _accumulator(p: Tensor) -> Any:
    with torch.enable_grad():
        node: Any = p.view_as(p).grad_fn
    return node.next_functions[0][0]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are.

    Raises:
        ModelError: If there is none, or it has no data.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise ModelError("the model has no parameter, so its Hessian is empty")
    if first.is_meta:
        raise ModelError("the model's parameters are on the meta device, which holds no data")
    return first.device
