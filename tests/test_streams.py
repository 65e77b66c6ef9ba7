"""Streams of randomness: each its own, near seeds and numbers or not."""

from __future__ import annotations

import itertools
from typing import get_args

import torch

from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.randomness import Stream, derived_seed, stream_generator

CPU = torch.device("cpu")
LOW = (1 << 32) - 1


def test_streams_are_distinct_in_the_bits_that_a_cpu_takes():
    numbers = [(), (0, 0), *((i,) for i in range(1, 8)), *itertools.product(range(8), range(1, 8)),
               (0, 0, 1), (0, 1, 0), (1, 0, 0), (1 << 32,), (0, 1 << 32), (1 << 44,)]  # fmt: skip
    seeds = [0, 1, 2, 3, 4, 5, 6, 10, 1 << 31, 1 << 32, (1 << 63) - 1]
    keys = list(itertools.product(seeds, get_args(Stream), numbers))
    found = {derived_seed(seed, stream, *own) & LOW for seed, stream, own in keys}
    expected_collisions = len(keys) ** 2 / (1 << 33)
    assert expected_collisions < 0.02
    assert len(found) == len(keys)
    assert all(0 <= derived_seed(s, stream, *own) < 1 << 63 for s, stream, own in keys)


def test_no_number_is_the_number_0():
    assert derived_seed(3, "order") == derived_seed(3, "order", 0)


def test_probes_of_near_seeds_and_processes_are_unrelated():
    size = 20_000
    probes = torch.stack([
        rademacher(torch.empty(size), generator=stream_generator(seed, CPU, "probes", rank))
        for seed in range(6) for rank in range(6)
    ])  # fmt: skip
    products = probes @ probes.T / size - torch.eye(len(probes))
    assert products.abs().max() < 5 / size**0.5


def test_the_same_key_gives_the_same_numbers():
    first, again = (torch.rand(9, generator=stream_generator(7, CPU, "sketch")) for _ in "ab")
    torch.testing.assert_close(first, again, rtol=0, atol=0)
