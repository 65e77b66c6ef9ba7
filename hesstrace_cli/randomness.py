"""Streams of randomness by name, and the global state that a model's own Dropout draws from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

# One stream of randomness each, so that one more draw in one does not move the others.
_STREAMS = ("weights", "order", "augmentation", "regularizers", "model")


def derived_seed(seed: int, stream: str, index: int = 0) -> int:
    """A seed of its own for each stream of a run, and each epoch or step in it."""
    number = _STREAMS.index(stream)
    # SplitMix64: near seeds give unrelated streams.
    z = (seed * len(_STREAMS) + number) * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03
    z &= (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (z ^ (z >> 31)) >> 1


def stream_generator(seed: int, device: torch.device, stream: str, index: int) -> Generator:
    """The generator of a stream and number, on a device."""
    return Generator(device).manual_seed(derived_seed(seed, stream, index))


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
