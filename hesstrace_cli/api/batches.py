"""A user's own loader as examples to estimate on: read again and again, the same each time."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from hesstrace_cli.analysis.loading import tried_outputs
from hesstrace_cli.api.models import device_of
from hesstrace_cli.api.tasks import check_fit, resolve_task
from hesstrace_cli.autodiff.arguments import Arguments
from hesstrace_cli.autodiff.calls import eval_mode, native_outputs
from hesstrace_cli.errors import DataError, ModelError
from hesstrace_cli.randomness import random_state_kept
from hesstrace_cli.tasks import Task, Tokens

Batch = tuple[Tensor, Tensor]
_TARGETS = ("labels", "label", "targets", "target")
_CLOSE = 1e-4  # of a model's own loss


@dataclass(frozen=True)
class Loader:
    """The batches of a loader on the model's device, every pass held against the first.

    Attributes:
        data: Gives batches, the same ones each time.
        device: Where they go.
        task: What they are for.
        num_examples: N.
        num_terms: M.
        is_shifted: Whether targets are the next inputs, as causal language models take them.
        marks: Of the batches of the first pass.
    """

    data: Iterable[Any]
    device: torch.device
    task: Task
    num_examples: int
    num_terms: int
    is_shifted: bool
    marks: list[int] = field(repr=False)

    def __len__(self) -> int:
        return self.num_examples

    def batches(self, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Inputs and targets as they come, those of more examples than asked for in parts.

        Raises:
            DataError: If they are not those of the first pass.
        """
        number = 0
        for X, y in self._same_again():
            for part, targets in zip(X.split(batch_size), y.split(batch_size), strict=True):
                if number >= first and (number - first) % stride == 0:
                    yield part, targets
                number += 1

    def _same_again(self) -> Iterator[Batch]:
        count = 0
        for X, y in _pairs(self.data):
            if count == len(self.marks) or _mark(X, y) != self.marks[count]:
                raise _differs(count, self.data)
            count += 1
            y = y.to(self.device)
            yield X.to(self.device), _next_ones(y, self.task) if self.is_shifted else y
        if count < len(self.marks):
            raise _differs(count, self.data)


def open_loader(model: nn.Module, data: Iterable[Any], task: str | Task) -> Loader:
    """Read a loader once, see what it gives, and that it gives it again.

    Args:
        model: Takes its inputs.
        data: Gives (X, y), or mappings with the model's arguments and labels; more than once.
        task: A name, "auto" or a task.

    Raises:
        DataError: If a batch is no such thing, or a second look differs from the first.
        ConfigError: If the task cannot be told.
        ModelError: If the model's outputs are not as the task expects them.
    """
    if not isinstance(data, Iterable):
        raise DataError(f"data is {_kind(data)}, expected a DataLoader or a list of batches (X, y)")
    if iter(data) is data:
        raise DataError(
            f"data is a {type(data).__name__}, which can be read only once; give a DataLoader or a "
            "list of batches, as it is read in several passes"
        )
    device = device_of(model)
    found: Task | None = None
    marks: list[int] = []
    num_examples, num_terms, width, is_shifted = 0, 0, 0, False
    for X, y in _pairs(data):
        marks.append(_mark(X, y))
        if found is None:
            found = resolve_task(task, y)
            found.check_targets(y, "data")
            is_shifted, width = _check_outputs(model, X.to(device), y.to(device), found)
        found.check_targets(y, "data")
        if found.num_terms(y) and found.num_outputs(y) > width:
            raise DataError(f"batch {len(marks) - 1} has targets up to {found.num_outputs(y) - 1}, "
                            f"and the model gives {width} outputs")  # fmt: skip
        num_examples += len(y)
        num_terms += found.num_terms(_next_ones(y, found) if is_shifted else y)
    if found is None:
        raise DataError("data gives no batch, expected batches (X, y)")
    loader = Loader(data, device, found, num_examples, num_terms, is_shifted, marks)
    next(loader.batches(num_examples))  # the second look, before any work
    return loader


def _check_outputs(model: nn.Module, X: Tensor, y: Tensor, task: Task) -> tuple[bool, int]:
    """Try the model on a batch; whether targets are the next inputs, and the outputs' width.

    Raises:
        ModelError: If its outputs do not fit, or its own loss is another one than the task's.
    """
    name = type(model).__name__
    with eval_mode(model), random_state_kept():
        with random_state_kept():
            outputs = tried_outputs(model, X, y, task, name, "eval mode")
        check_fit(task, outputs, y, name)
        outputs, width = outputs.detach(), task.width(outputs)
        if not torch.allclose(native_outputs(model, X).detach(), outputs, 1e-3, 1e-6, True):
            raise ModelError(
                f"{name} gives other outputs when it is called on the same inputs again, so that "
                "its loss has no one Hessian"
            )
        with torch.no_grad():
            own = _own_loss(model, X, y)
        if own is None:
            return False, width
        tried = {False: task.loss(outputs, y).item()}
        if isinstance(task, Tokens):
            tried[True] = task.loss(outputs, _next_ones(y, task)).item()
    for is_shifted, loss in tried.items():
        if abs(loss - own) <= _CLOSE * max(abs(own), 1e-3):
            return is_shifted, width
    raise ModelError(
        f"{name} says that its loss on the first batch is {own:.6g}, the task {task.name} gives "
        f"{tried[False]:.6g}; give the task that it is trained for, or batches (X, y)"
    )


def _own_loss(model: nn.Module, X: Tensor, y: Tensor) -> float | None:
    """The loss that a model gives when it is called with labels; None where it gives none."""
    if not isinstance(X, Arguments) or X.args:
        return None
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        output = torch.func.functional_call(model, buffers, (), {**X.kwargs, "labels": y})
    except TypeError:  # it takes no labels
        return None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss.item() if isinstance(loss, Tensor) and loss.dim() == 0 else None


def _next_ones(y: Tensor, task: Task) -> Tensor:
    """Each token's target is the one after it; the last one's does not count."""
    assert isinstance(task, Tokens)
    last = torch.full_like(y[:, :1], task.ignore_index)
    return torch.cat([y[:, 1:], last], 1)


def _pairs(data: Iterable[Any]) -> Iterator[Batch]:
    """Inputs and targets of every batch.

    Raises:
        DataError: If one is no batch.
    """
    for index, batch in enumerate(data):
        yield as_batch(*_parts(batch, index), f"batch {index}")


def as_batch(X: Any, y: Any, name: str) -> Batch:
    """Inputs and targets of some examples; several inputs pass for a tensor, see `Arguments`.

    Args:
        X: A tensor, or the model's arguments by position or by name.
        y: A tensor.
        name: What to call them in an error.

    Raises:
        DataError: If they are no such things, or not as many of each.
    """
    if any(isinstance(each, Tensor) and each.is_meta for each in (X, y)):
        raise DataError(f"{name} is on the meta device, which holds no data")
    if not isinstance(y, Tensor) or not y.dim():
        raise DataError(f"{name} has targets of {_kind(y)}, expected a tensor (N, ...)")
    if isinstance(X, Mapping):
        X = Arguments((), X, len(y))
    elif isinstance(X, (tuple, list)):
        X = Arguments(tuple(X), {}, len(y))
    elif not isinstance(X, Tensor):
        raise DataError(f"{name} has inputs of {_kind(X)}, expected a tensor (N, ...), or several "
                        "as a tuple or dict")  # fmt: skip
    if not len(y) or not X.dim() or len(X) != len(y):
        given = len(X) if X.dim() else "no rows of"
        raise DataError(f"{name} has {given} inputs and {len(y)} targets, expected as many of "
                        "each, and some")  # fmt: skip
    return cast(Tensor, X), y


def _parts(batch: Any, index: int) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        key = next((name for name in _TARGETS if name in batch), None)
        if key is None:
            raise DataError(
                f"batch {index} is a dict of {', '.join(map(str, batch))}, expected one of "
                f"{', '.join(_TARGETS)} beside the model's arguments"
            )
        return {name: each for name, each in batch.items() if name != key}, batch[key]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise DataError(f"batch {index} is {_kind(batch)}, expected a pair (X, y), or a dict of the "
                    "model's arguments and labels")  # fmt: skip


def _kind(thing: Any) -> str:
    name = type(thing).__name__
    return f"a {name} of {len(thing)}" if isinstance(thing, (tuple, list)) else f"a {name}"


def _mark(X: Tensor, y: Tensor) -> int:
    """A number that another batch, or another order of its examples, has not."""
    mark = 0
    for tensor in (*(X.tensors() if isinstance(X, Arguments) else [X]), y):
        own = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        mark = zlib.crc32(own.data, zlib.crc32(str(tensor.shape).encode(), mark))
    return mark


def _differs(index: int, data: Any) -> DataError:
    return DataError(
        f"batch {index} of the {type(data).__name__} is another one in its second pass, expected "
        "the same batches each time; shuffle=False, a fixed sampler and no random augmentation, or "
        "list(loader) where that fits into memory"
    )
