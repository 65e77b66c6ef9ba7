"""What an example may be: the one place for arrays, files and what a user's code gives.

Inputs are floating point, used as they are, uint8, scaled to [0, 1], or other integers, which are
indices and stay what they are. Targets are whole numbers or floating point; what they must look
like is for the task to say. Anything else would have to be changed to be used, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesstrace_cli.config import shortened
from hesstrace_cli.errors import DataError

_INDICES = (torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ARRAYS = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_LARGEST = 2**63 - 1


def inputs_of(value: Any, name: str) -> Tensor:
    """The inputs of one example or of many as a tensor, of the type that they have.

    Args:
        value: A tensor or an array.
        name: What to call the data in an error.

    Raises:
        DataError: If they are of another type, sparse, without data, or empty.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.name not in _ARRAYS or not value.dtype.isnative:
            raise _wrong_inputs(str(value.dtype), name)
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise DataError(
            f"{name}: an input is a {type(value).__name__}, expected a tensor; torchvision's "
            "v2.PILToTensor makes one of an image"
        )
    if value.dtype not in (torch.uint8, *_INDICES, *_FLOATS):
        raise _wrong_inputs(str(value.dtype).removeprefix("torch."), name)
    if value.layout is not torch.strided or value.is_nested or value.is_meta:
        what = "on the meta device" if value.is_meta else "that are sparse or nested"
        raise DataError(f"{name}: inputs are tensors {what}, expected dense ones with data")
    if value.dim() == 0 or value.numel() == 0:
        raise DataError(f"{name}: inputs have shape {tuple(value.shape)}, expected numbers in them")
    return value.detach().long() if value.dtype in _INDICES else value.detach()


def _wrong_inputs(kind: str, name: str) -> DataError:
    return DataError(
        f"{name}: inputs are {kind}, expected native floating point, used as it is, uint8, scaled "
        "to [0, 1], or signed integers, which are indices; convert them where they are made"
    )


def same_kind(first: torch.dtype, second: torch.dtype) -> bool:
    """Whether inputs of both types are treated alike: scaled, used as they are, or indices."""
    return _kind(first) == _kind(second)


def _kind(dtype: torch.dtype) -> str:
    return "uint8" if dtype == torch.uint8 else "floats" if dtype in _FLOATS else "indices"


def count_of(value: Any, name: str) -> int:
    """A number that a user's code says.

    Raises:
        DataError: If it is no whole number above 0.
    """
    target = target_of(value, name)
    if target.dim() or target.is_floating_point() or target < 1:
        raise DataError(f"{name} is {shortened(value)}, expected a whole number above 0")
    return int(target)


def target_of(value: Any, name: str) -> Tensor:
    """The target of one example: int64 or floating point, of any shape.

    Raises:
        DataError: If it is of another type.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _numbers(value, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(
            f"{name}: a target is {shortened(value)} ({type(value).__name__}), expected a class "
            "number, or a tensor of whole or floating-point numbers"
        )
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise DataError(f"{name}: a target is {shortened(value)}, expected a class number")
    return torch.tensor(value)


def targets_of(values: Any, name: str) -> Tensor:
    """Targets as a tensor, whole numbers as int64.

    Args:
        values: A tensor or an array, of one example or many; or a sequence with one for each.
        name: What to call the data in an error.

    Raises:
        DataError: If they are neither whole numbers nor floating point, or differ in shape.
    """
    if isinstance(values, (Tensor, np.ndarray)):
        if values.ndim == 0:
            raise DataError(f"{name}: the targets are a single number, expected one an example")
        return _of_examples(_numbers(values, name), name)
    return stacked([target_of(value, name) for value in values], name)


def _numbers(value: Tensor | np.ndarray[Any, Any] | np.generic, name: str) -> Tensor:
    """A tensor or array of whole numbers, as int64, or of floating point."""
    if isinstance(value, Tensor):
        if value.is_meta or value.is_nested or value.layout is not torch.strided:
            raise DataError(f"{name}: targets are sparse, nested or without data, expected numbers")
        if value.dtype in (torch.uint16, torch.uint32, torch.uint64):
            return _numbers(value.cpu().numpy(), name)
        if value.dtype in (torch.uint8, *_INDICES):
            return value.detach().cpu().long()
        if value.dtype in _FLOATS:
            return value.detach().cpu()
        raise _wrong_targets(str(value.dtype).removeprefix("torch."), value.shape, name)
    array = np.asarray(value)
    if array.dtype.kind in "iu":
        if array.size and int(array.max()) > _LARGEST:
            raise DataError(f"{name}: a target is {int(array.max())}, expected a class number")
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        native = array.astype(array.dtype.newbyteorder("="))
        return torch.from_numpy(np.ascontiguousarray(native)).reshape(array.shape)
    raise _wrong_targets(str(array.dtype), array.shape, name)


def _wrong_targets(kind: str, shape: Sequence[int], name: str) -> DataError:
    return DataError(
        f"{name}: targets have type {kind} and shape {tuple(shape)}, expected whole numbers, as "
        "(N,) class numbers, or floating point"
    )


def stacked(targets: Sequence[Tensor], name: str) -> Tensor:
    """One target an example as one tensor; a single number to be met is one of one output.

    Raises:
        DataError: If they differ in shape or kind.
    """
    kinds = {(t.is_floating_point(), tuple(t.shape)) for t in targets}
    if len(kinds) > 1:
        (a, shape), (b, other) = sorted(kinds)[:2]
        names = ["floating point" if f else "whole numbers" for f in (a, b)]
        raise DataError(
            f"{name}: targets differ: {names[0]} of shape {shape}, {names[1]} of shape {other}"
        )
    if not targets:
        return torch.zeros(0, dtype=torch.int64)
    return _of_examples(torch.stack([t.to(targets[0].dtype) for t in targets]), name)


def _of_examples(targets: Tensor, name: str) -> Tensor:
    if len(targets) and not targets.numel():
        raise DataError(
            f"{name}: targets have shape {tuple(targets.shape)}, expected numbers in them"
        )
    floats = targets.is_floating_point()
    return targets[:, None] if floats and targets.dim() == 1 else targets


def example_of(example: Any, name: str) -> tuple[Tensor, Tensor]:
    """The input and the target of an example.

    Raises:
        DataError: If it is no pair of them.
    """
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise DataError(
            f"{name}: an example is a {type(example).__name__}, expected an input and a label"
        )
    inputs, target = example
    return inputs_of(inputs, name), target_of(target, name)
