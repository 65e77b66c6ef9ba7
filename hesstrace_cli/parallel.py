"""The processes of one job, as `torchrun` starts them: each has a share of every batch."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hesstrace_cli.errors import ConfigError, LostProcess
from hesstrace_cli.failures import is_of_the_machine

Item = TypeVar("Item")
_PATIENCE = timedelta(hours=2)  # the others wait while the first rank estimates the trace


@contextmanager
def meeting() -> Iterator[None]:
    """Where processes wait for each other.

    Raises:
        LostProcess: If one of them is gone.
    """
    try:
        yield
    except RuntimeError as problem:
        if is_of_the_machine(problem):  # this one's own
            raise
        raise LostProcess(
            "another process of the job is gone, and this one cannot go on alone; its own message "
            f"says why. Start again with --resume ({' '.join(str(problem).split())[:160]})"
        ) from problem


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job.

    Attributes:
        rank: Its number, from 0; the first writes and speaks.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place; all ranks give the same."""
        if self.size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for own in by_type.values():
            flat = torch.cat([tensor.flatten() for tensor in own])
            with meeting():
                dist.all_reduce(flat)
            for tensor, total in zip(own, flat.split([t.numel() for t in own]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number, device=device)
        with meeting():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers.item())

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """All ranks' items, those of the first rank first; of one process as they come."""
        if self.size == 1:
            yield from items
            return
        gathered: list[list[Item]] = [[] for _ in range(self.size)]
        mine = list(items)
        with meeting():
            dist.all_gather_object(gathered, mine)
        for own in gathered:
            yield from own

    def from_first(self, thing: Any) -> Any:
        """What the first rank gave."""
        if self.size == 1:
            return thing
        things = [thing]
        with meeting():
            dist.broadcast_object_list(things)
        return things[0]


ALONE = Ranks()


def under_torchrun() -> bool:
    """Whether there are several processes, by the environment that `torchrun` makes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """The number of this process on its machine, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@functools.cache
def join(device: torch.device) -> Ranks:
    """Meet the other processes; without `torchrun` this one is alone.

    Args:
        device: Of this process; it decides how they talk, NCCL or gloo.

    Raises:
        ConfigError: If the others cannot be met.
    """
    if not under_torchrun():
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as problem:
        if is_of_the_machine(problem):
            raise
        reason = " ".join(str(problem).split())[:200]
        raise ConfigError(f"the other processes of torchrun cannot be met: {reason}") from problem
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Say goodbye, so that the job ends without a warning."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
