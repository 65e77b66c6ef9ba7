"""Tensors and models in another floating-point precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


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


_DOUBLED = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}


class _InDouble(TorchFunctionMode):
    """Casts to a lower precision, which a model makes itself, become casts to double.

    Tensors of a lower precision that no module holds, as a table in a closure, are widened as they
    are read.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func in _CASTS else func
        kwargs = {name: _double_type(each) for name, each in (kwargs or {}).items()}
        args = tuple(_double_type(each) for each in args)
        if _only_reads(func) and "out" not in kwargs:
            args, kwargs = _widened(args), {name: _widened(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)


def _only_reads(func: Any) -> bool:
    """Whether a call neither writes to its operands nor is about the tensor object itself."""
    name: str = func.__name__
    if name.startswith("__"):
        return not name.startswith(("__i", "__set", "__get__", "__del"))
    return not name.endswith("_")


def _widened(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return thing.to(_DOUBLED[thing.dtype]) if thing.dtype in _DOUBLED else thing
    return type(thing)(map(_widened, thing)) if type(thing) in (list, tuple) else thing


def _double_type(argument: Any) -> Any:
    return _DOUBLED.get(argument, argument) if isinstance(argument, torch.dtype) else argument


@contextmanager
def on_copies(model: nn.Module, *, double: bool) -> Iterator[None]:
    """For a while the model's tensors hold copies of their data, in double precision if asked for.

    The tensors stay the same objects, so that whatever else refers to them sees the copies too;
    afterwards they hold what they held, to the bit. In double precision everything that the model
    computes is in double, what it creates or casts to float32 itself included, so that
    differences of it are not drowned in rounding.

    Args:
        model: Its parameters, buffers and other tensor attributes.
        double: Whether floating-point and complex data is widened.
    """
    before = [(tensor, tensor.data, tensor.grad) for tensor in _tensors(model)]
    default = torch.get_default_dtype()
    try:
        for tensor, data, grad in before:
            if grad is not None:
                tensor.grad = None
            tensor.data = cast(data.clone(), torch.float64) if double else data.clone()
        if not double:
            yield
            return
        torch.set_default_dtype(torch.float64)
        with _InDouble():
            yield
    finally:
        torch.set_default_dtype(default)
        for tensor, data, grad in before:
            tensor.data = data
            if grad is not None:
                tensor.grad = grad


def _tensors(model: nn.Module) -> list[Tensor]:
    found: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        found |= {id(t): t for t in vars(module).values() if isinstance(t, Tensor) and t.is_leaf}
    return list(found.values())
