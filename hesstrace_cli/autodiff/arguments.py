"""What a model is called with: one tensor of examples, or several arguments that belong together.

    model(X)        model(input_ids=..., attention_mask=...)        model(first, second)

Whoever takes inputs X only cuts them by rows, asks where they are, and gives them to the model, so
that `Arguments` pass for a tensor there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hesstrace_cli.errors import DataError


class Arguments:
    """Several arguments of a model call; those with a row for each example are cut together.

    Args:
        args: By position.
        kwargs: By name.
        num_examples: N; a tensor whose first dimension is something else is the same for all
            examples, as is what is no tensor.

    Attributes:
        device: Of the first tensor.
        shape: Of the first tensor with rows.
        dtype: Of the same.

    Raises:
        DataError: If no tensor has rows.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_examples: int) -> None:
        self.args, self.kwargs, self._num_examples = args, dict(kwargs), num_examples
        rows = self.tensors()
        if not rows:
            raise DataError(f"the model is called without a tensor of {num_examples} rows, one an "
                            "example")  # fmt: skip
        self.device, self.shape, self.dtype = rows[0].device, rows[0].shape, rows[0].dtype

    def _has_rows(self, thing: Any) -> bool:
        return isinstance(thing, Tensor) and thing.dim() > 0 and len(thing) == self._num_examples

    def _all(self) -> list[Any]:
        return [*self.args, *self.kwargs.values()]

    def tensors(self) -> list[Tensor]:
        """Those with rows."""
        return [each for each in self._all() if self._has_rows(each)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        args = tuple(change(each) if self._has_rows(each) else each for each in self.args)
        kwargs = {
            name: change(each) if self._has_rows(each) else each
            for name, each in self.kwargs.items()
        }
        first = next(n for n, each in enumerate(self._all()) if self._has_rows(each))
        return Arguments(args, kwargs, len([*args, *kwargs.values()][first]))

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, rows: Any) -> Arguments:
        return self._each(lambda tensor: tensor[rows])

    def split(self, size: int) -> list[Arguments]:
        """Cut into parts of so many examples; the last may be smaller."""
        return [self[first : first + size] for first in range(0, len(self), size)]

    def to(self, *where: Any, **how: Any) -> Arguments:
        """On another device."""
        return self._each(lambda tensor: tensor.to(*where, **how))

    def detach(self) -> Arguments:
        """Without a graph."""
        return self._each(Tensor.detach)

    def dim(self) -> int:
        """Of the first tensor with rows."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """Never: as a whole they have no derivative, as little as indices."""
        return False

    def is_complex(self) -> bool:
        """Never."""
        return False


def arguments_of(X: Tensor | Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a model with, by position and by name."""
    return (X.args, X.kwargs) if isinstance(X, Arguments) else ((X,), {})


def same(first: Tensor | Arguments, second: Tensor | Arguments) -> bool:
    """Whether two inputs are equal in every entry."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    pairs = zip(first.tensors(), second.tensors(), strict=False)
    return len(first.tensors()) == len(second.tensors()) and all(
        torch.equal(a, b) for a, b in pairs
    )
