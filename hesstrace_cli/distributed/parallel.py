"""The processes of one job, as `torchrun` starts them: each has a share of every batch."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from hesstrace_cli.distributed import launcher
from hesstrace_cli.errors import ConfigError, HesstraceError, LostProcess
from hesstrace_cli.failures import is_of_the_machine

Item = TypeVar("Item")
_PATIENCE = timedelta(hours=2)  # the others wait while the first rank estimates the trace
_ARRIVAL = timedelta(minutes=10)  # until all processes have started


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


def sum_over(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor by its sum over a group's processes, in place.

    Args:
        tensors: As many and alike in every process; those of a type travel together.
        group: The default one where it is None.
    """
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for own in by_type.values():
        flat = torch.cat([tensor.flatten() for tensor in own])
        with meeting():
            dist.all_reduce(flat, group=group)
        for tensor, total in zip(own, flat.split([t.numel() for t in own]), strict=True):
            tensor.copy_(total.view_as(tensor))


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
        if self.size == 1 or not tensors:
            return
        self._meet(tensors[0].device)
        sum_over(tensors)

    def take_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of the first rank, in place."""
        if self.size == 1 or not tensors:
            return
        self._meet(tensors[0].device)
        # As bytes, since not every type can travel.
        flat = torch.cat([tensor.detach().flatten().view(torch.uint8) for tensor in tensors])
        with meeting():
            dist.broadcast(flat, 0)
        for tensor, first in zip(tensors, flat.split([t.nbytes for t in tensors]), strict=True):
            tensor.detach().copy_(first.clone().view(tensor.dtype).view_as(tensor))

    @staticmethod
    def _meet(device: torch.device) -> None:
        """Meet on the CPU before NCCL does: it waits for a process that is gone, gloo says so."""
        if device.type == "cuda":
            with meeting():
                dist.all_reduce(torch.zeros(()))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        with meeting():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers.item())

    def total(self, number: int) -> int:
        """The sum of the ranks' numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        with meeting():
            dist.all_reduce(numbers)
        return int(numbers.item())

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """All ranks' items, those of the first rank first; of one process as they come."""
        if self.size == 1:
            yield from items
            return
        for own in self._gather(lambda: list(items)):
            yield from own

    def together(self, work: Callable[[], Item]) -> Item:
        """What `work` gives here; where it fails in one process, it fails in all of them.

        Else some would wait for one that has turned to something else.

        Args:
            work: What needs no other process.

        Raises:
            HesstraceError: That of the first process that has one.
        """
        if self.size == 1:
            return work()
        results: list[Item] = []
        self._gather(lambda: results.append(work()))
        return results[0]

    def _gather(self, work: Callable[[], Item]) -> list[Item]:
        mine: Item | None = None
        problem: HesstraceError | None = None
        try:
            mine = work()
        except LostProcess:
            raise
        except HesstraceError as own:
            problem = own
        gathered: list[Any] = [None] * self.size
        with meeting():
            dist.all_gather_object(gathered, (mine, problem))
        for _, problem in gathered:
            if problem is not None:
                raise problem
        return [thing for thing, _ in gathered]

    def from_first(self, thing: Any) -> Any:
        """What the first rank gave."""
        if self.size == 1:
            return thing
        things = [thing]
        with meeting():
            dist.broadcast_object_list(things)
        return things[0]


ALONE = Ranks()


@functools.cache
def join(device: torch.device) -> Ranks:
    """Meet the other processes; without `torchrun` this one is alone.

    Args:
        device: Of this process; what is on a GPU is exchanged by NCCL, all else by gloo.

    Raises:
        ConfigError: If the others cannot be met.
    """
    place = launcher.place()
    if place.size == 1:
        return ALONE
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(rendezvous("env://", timeout=_ARRIVAL))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store, rank=rank, world_size=size, timeout=_PATIENCE,
            device_id=device if on_gpu else None,
        )  # fmt: skip
    except (RuntimeError, ValueError) as problem:
        if is_of_the_machine(problem):
            raise
        reason = " ".join(str(problem).split())[:200]
        raise ConfigError(f"the other processes of torchrun cannot be met: {reason}") from problem
    return Ranks(rank, size)


def leave() -> None:
    """Say goodbye, so that the job ends without a warning."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a split model holds on to the group, whose threads must end before Python
        dist.destroy_process_group()
