"""The default generators, of the CPU and of GPUs, are the user's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hesstrace_cli
from hesstrace_cli.models import build_model
from hesstrace_cli.randomness import random_state_kept, seed_defaults


@pytest.fixture
def later(monkeypatch):
    """What is left to be done when a GPU is first used."""
    calls = []
    monkeypatch.setattr(torch.cuda.random, "_lazy_call", lambda call, **_: calls.append(call))
    return calls


def test_building_leaves_nothing_behind(later):
    before = torch.get_rng_state()
    weights = [
        next(
            build_model("mlp", num_classes=3, in_shape=(4,), model_args={}, seed=seed).parameters()
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)
    assert not later


def test_seed_defaults_is_manual_seed_where_no_gpu_is_in_use(later):
    with random_state_kept():
        seed_defaults(7)
        ours = nn.Linear(3, 3).weight
        torch.manual_seed(7)
        assert torch.equal(nn.Linear(3, 3).weight, ours)
    assert len(later) == 1  # the second one's


def test_the_package_seeds_nothing_else():
    """`torch.manual_seed` would seed GPUs that are not in use, and others than are restored."""
    package = Path(hesstrace_cli.__file__).parent
    found = [
        f"{file.name}: {line.strip()}"
        for file in package.rglob("*.py")
        for line in file.read_text().splitlines()
        if re.search(r"torch\.(manual_seed\(|random\.fork_rng|cuda\.manual_seed|seed\()", line)
        and file.name != "randomness.py"
    ]
    assert not found
