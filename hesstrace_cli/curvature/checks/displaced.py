"""Weights moved in place, so that whatever reads them by another name sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.graph import Params


def typical_size(params: Params) -> float:
    """The mean absolute entry of a tensor of weights, those that are all 0 left out."""
    sizes = [mean_size(p) for p in params.values() if p.numel()]
    present = [size for size in sizes if size > 0]
    return sum(present) / len(present) if present else 1.0


def move_aside(params: Params, generator: Generator) -> None:
    """Move the weights a little: with biases of 0 many a unit sits on its kink.

    What is nearly 0, as a gate that begins closed, is moved by a typical weight's size: what is
    behind it would not be seen otherwise.
    """
    typical = typical_size(params)
    for p in params.values():
        is_closed = mean_size(p) < 0.03 * typical
        size = 0.3 * typical if is_closed else 0.01 * max(1.0, mean_size(p))
        p.data.add_(normal(p, generator), alpha=size)


def mean_size(p: Tensor) -> float:
    """The mean absolute entry; 0 where there is none."""
    return p.detach().abs().mean().item() if p.numel() else 0.0


def normal(like: Tensor, generator: Generator) -> Tensor:
    """Drawn in double precision, so that every precision sees the same."""
    return torch.randn(
        like.shape, generator=generator, device=like.device, dtype=torch.float64
    ).to(like)  # fmt: skip


@contextmanager
def holding(params: Params, values: Params) -> Iterator[None]:
    """For a while the parameters hold other values, in the memory that they have."""
    before = {n: params[n].detach().clone() for n in values}
    try:
        for n, value in values.items():
            params[n].data.copy_(value)
        yield
    finally:
        for n, p in before.items():
            params[n].data.copy_(p)


def seeded(like: Tensor, seed: int) -> Generator:
    """A generator on the device of a tensor."""
    return Generator(like.device).manual_seed(seed)
