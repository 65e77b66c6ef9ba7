"""The penalty under DistributedDataParallel, which averages gradients over its processes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hesstrace_cli.distributed.parallel import sum_over
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.regularizers import Coupled, Step, Term


@dataclass(frozen=True)
class Parallel:
    """The processes whose gradients are averaged.

    Attributes:
        rank: Of this one, from 0; its examples are every `size`-th of the whole batch, as
            DistributedSampler deals them out.
        size: How many there are.
        group: Of `torch.distributed`.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_ddp(self) -> bool:
        """Whether there is a group."""
        return self.group is not None

    def gathered(self, regularizer: Coupled, step: Step) -> Step:
        """The step with what the regularizer sums over the processes, and the terms of them all."""
        if self.size == 1 or not regularizer.gathers(step.index, step.progress):
            return step
        own = [tensor.detach() for tensor in regularizer.gather(step)]
        num_terms = torch.tensor(step.part.num_terms, device=step.outputs.device)
        sum_over([*own, num_terms], self.group)
        part = dataclasses.replace(step.part, num_terms=int(num_terms.item()))
        return dataclasses.replace(step, part=part, gathered={regularizer.name: own})

    def averaged(self, term: Term) -> Tensor:
        """The term's value, with a gradient whose average over the processes is the whole's."""
        if self.size == 1 or not term.is_whole:
            return term.value  # a mean, as the loss is
        constant = term.value.detach()
        return constant + self.size * (term.value - constant)


def parallel_of(model: nn.Module) -> Parallel:
    """The processes of a model's DistributedDataParallel; this one alone without.

    Raises:
        ConfigError: If its graph is said to be static.
    """
    wrapped = getattr(model, "_orig_mod", model)
    if not isinstance(wrapped, DistributedDataParallel):
        return Parallel()
    if wrapped.static_graph:
        raise ConfigError(
            "DistributedDataParallel(static_graph=True) takes the penalty's own backward pass for "
            "the loss's, and gradients are left as each process has them; leave static_graph out"
        )
    group = wrapped.process_group
    return Parallel(dist.get_rank(group), dist.get_world_size(group), group)
