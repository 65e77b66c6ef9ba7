"""Batch norm with the statistics of all processes' examples, as of one process with them all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hesstrace_cli.autodiff.differentiable import affine_per_channel, held, per_channel
from hesstrace_cli.distributed.parallel import Ranks, meeting

_BATCH_NORMS = (F.batch_norm, torch.batch_norm)


class _Sum(torch.autograd.Function):
    """The sum over the processes; its derivative is the same sum, so it has every order."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # none where statistics are held: nothing to meet for
        total = tensor.clone(memory_format=torch.contiguous_format)
        with meeting():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:
        return None if grads[0] is None else _Sum.apply(grads[0])


class SyncedNorms(TorchFunctionMode):
    """Replaces batch norm in training mode, in the model's forward pass.

    PyTorch's own SyncBatchNorm runs on GPUs alone and has no second derivative.

    Attributes:
        weight: 0 while this process has no examples of its own; its part then does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = 1.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run batch norm over all processes, everything else as it is."""
        kwargs = kwargs or {}
        if func not in _BATCH_NORMS:
            return func(*args, **kwargs)
        if func is torch.batch_norm:  # it takes the weights before the statistics
            input, weight, bias, mean, variance, *rest = args
            args = (input, mean, variance, weight, bias, *rest)
            func = F.batch_norm
        return self._batch_norm(func, *args, **kwargs)

    def _batch_norm(
        self,
        native: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        *rest: Any,
    ) -> Tensor:
        if not training:
            output: Tensor = native(
                input, running_mean, running_var, weight, bias, training, momentum, eps, *rest
            )
            return output
        X, dims = input.float() if input.element_size() < 4 else input, [0, *range(2, input.dim())]
        ones = X.new_full((1,), self.weight * X.numel() / X.shape[1])
        sums = _Sum.apply(torch.cat([self.weight * X.sum(dims), ones]))
        count = sums[-1]
        mean = held(per_channel(sums[:-1] / count, X))
        centered = X - mean
        variance = _Sum.apply(self.weight * (centered * centered).sum(dims)) / count
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.flatten(), momentum)
                running_var.lerp_(variance * count / (count - 1), momentum)
        normalized = centered * held(per_channel(torch.rsqrt(variance + eps), X))
        return affine_per_channel(normalized, weight, bias).to(input.dtype)


def sync_norms(model: nn.Module, ranks: Ranks) -> SyncedNorms | None:
    """Make the model's forward pass in training mode take the statistics of all processes.

    Args:
        model: Changed in place.
        ranks: None of it matters where there is one.
    """
    if ranks.size == 1:
        return None
    forward, norms = model.forward, SyncedNorms()

    def synced(*args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return forward(*args, **kwargs)
        with norms:
            return forward(*args, **kwargs)

    model.forward = synced
    return norms
