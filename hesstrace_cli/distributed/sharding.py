"""Weights, gradients and the optimizer's state split over the processes of a job, by FSDP2.

In a step every process gathers the weights once, and keeps them until its backward passes are
done: the penalty by example differentiates what the forward pass has recorded, and a second
backward pass must find the weights there. Gradients are summed as they are split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hesstrace_cli.distributed.parallel import Ranks


def shard(model: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Split a model's parameters over the processes, each with the same ones before.

    As one unit, since models may read a layer's weight without calling the layer.

    Args:
        model: Changed in place; its parameters are then DTensors on the device.
        device: Of this process.
        ranks: The processes of the job.
    """
    mesh = init_device_mesh(device.type, (ranks.size,))
    unit = fully_shard(model, mesh=mesh, reshard_after_forward=False)
    unit.set_reshard_after_backward(False)
    # The parts' losses have their shares of the batch already: gradients add up.
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)


def let_go(model: nn.Module) -> None:
    """Drop the gathered weights, before the optimizer moves the split ones."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(thing: Any) -> Any:
    """A state with every split tensor gathered onto the CPU, by all processes together."""
    if isinstance(thing, DTensor):
        return thing.full_tensor().detach().cpu()
    if isinstance(thing, dict):
        return type(thing)({key: whole(each) for key, each in thing.items()})
    if isinstance(thing, list):
        return [whole(each) for each in thing]
    return thing


def place_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole weights into a split model."""
    own = model.state_dict()
    model.load_state_dict({name: _as(each, own[name]) for name, each in weights.items()})


def place_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's whole state into that of split parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    placed = {
        number: {
            name: _as(each, params[number]) if isinstance(each, Tensor) and each.dim() else each
            for name, each in entries.items()
        }
        for number, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": placed})


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
