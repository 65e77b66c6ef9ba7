"""Streams of randomness by name, and the global state that a model's own Dropout draws from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

# One for each purpose, so that one more draw in one does not move the others.
Stream = Literal[
    "weights", "order", "augmentation", "regularizers", "model", "parts",  # of training
    "probes", "sketch", "eigenvalues", "directions", "slice", "input-jacobian",  # of estimating
    "quantization",
    "statistics",  # of an averaged network
    "label-noise",
]  # fmt: skip
_STREAMS: tuple[Stream, ...] = get_args(Stream)
_SIDE_BY_SIDE = 5  # of every seed; the others lie far from all of them, as any to come will
_BITS = (1 << 64) - 1


def derived_seed(seed: int, stream: Stream, *numbers: int) -> int:
    """A seed of its own for each stream of a seed, and for each step, process or part in it.

    Near seeds and numbers give unrelated ones, in the lower 32 bits too, which are all that
    PyTorch's generators on CPUs take.

    Args:
        seed: The user's.
        stream: What is drawn.
        numbers: Which of it: as many for every use of the stream, 0 where none is given.
    """
    place = _STREAMS.index(stream)
    place = place if place < _SIDE_BY_SIDE else place << 48
    first, *others = numbers or (0,)
    z = _mixed(seed * _SIDE_BY_SIDE + place, first)
    for number in others:
        z = _mixed(z ^ _BITS, number)  # as of 0 alone `_mixed` makes 0
    return z >> 1


def _mixed(state: int, number: int) -> int:
    """SplitMix64 of a pair."""
    z = (state * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) & _BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _BITS
    return z ^ (z >> 31)


def stream_generator(seed: int, device: torch.device, stream: Stream, *numbers: int) -> Generator:
    """The generator of a stream and its numbers, on a device."""
    return Generator(device).manual_seed(derived_seed(seed, stream, *numbers))


def random_state(device: torch.device) -> Tensor:
    """The state of the device's default generator."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Set it to what `random_state` gave."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """The default generators, of the CPU and of all GPUs in use, are afterwards as before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def seed_defaults(seed: int) -> None:
    """Seed them; `torch.manual_seed` also leaves a seed for GPUs that are first used later."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
