"""What an example may be: the one place for arrays, files and what a user's code gives.

Inputs are floating point, used as they are, or uint8, scaled to [0, 1]; a label is a class number.
Anything else would have to be changed to be used, and is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesstrace_cli.config import shortened
from hesstrace_cli.errors import DataError

_INPUTS = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ARRAYS = ("uint8", "float16", "float32", "float64")
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
    if value.dtype not in _INPUTS:
        raise _wrong_inputs(str(value.dtype).removeprefix("torch."), name)
    if value.layout is not torch.strided or value.is_nested or value.is_meta:
        what = "on the meta device" if value.is_meta else "that are sparse or nested"
        raise DataError(f"{name}: inputs are tensors {what}, expected dense ones with data")
    if value.dim() == 0 or value.numel() == 0:
        raise DataError(f"{name}: inputs have shape {tuple(value.shape)}, expected numbers in them")
    return value.detach()


def _wrong_inputs(kind: str, name: str) -> DataError:
    return DataError(
        f"{name}: inputs are {kind}, expected native floating point, used as it is, or uint8, "
        "scaled to [0, 1]; convert them where they are made"
    )


def same_kind(first: torch.dtype, second: torch.dtype) -> bool:
    """Whether inputs of both types are preprocessed alike: uint8 is scaled, the others are not."""
    return (first == torch.uint8) == (second == torch.uint8)


def label_of(value: Any, name: str) -> int:
    """The class number of one example.

    Raises:
        DataError: If it is no whole number.
    """
    number = value
    hidden = isinstance(value, Tensor) and (value.is_meta or value.layout is not torch.strided)
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0 and not hidden:
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, int) or abs(number) > _LARGEST:
        kind = getattr(value, "dtype", type(value).__name__)
        raise DataError(
            f"{name}: a label is {shortened(value)} ({kind}), expected a class number: a whole "
            "number from 0"
        )
    return number


def labels_of(values: Any, name: str) -> Tensor:
    """The class numbers of many examples, int64, shape (N,).

    Args:
        values: A tensor, an array or a sequence.
        name: What to call the data in an error.

    Raises:
        DataError: If one is no whole number.
    """
    if isinstance(values, (Tensor, np.ndarray)):
        kind = str(values.dtype).removeprefix("torch.")
        whole = kind.startswith(("int", "uint", ">i", "<i", ">u", "<u"))
        if values.ndim != 1 or not whole:
            raise DataError(
                f"{name}: labels have type {kind} and shape {tuple(values.shape)}, expected whole "
                "numbers (N,), a class number an example"
            )
        numbers = values.cpu().numpy() if isinstance(values, Tensor) else values
        if len(numbers) and int(numbers.max()) > _LARGEST:
            raise DataError(f"{name}: a label is {int(numbers.max())}, expected a class number")
        return torch.from_numpy(numbers.astype(np.int64))
    return torch.tensor([label_of(value, name) for value in values], dtype=torch.int64)


def example_of(example: Any, name: str) -> tuple[Tensor, int]:
    """The input and the class number of an example.

    Raises:
        DataError: If it is no pair of them.
    """
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise DataError(
            f"{name}: an example is a {type(example).__name__}, expected an input and a label"
        )
    inputs, label = example
    return inputs_of(inputs, name), label_of(label, name)
