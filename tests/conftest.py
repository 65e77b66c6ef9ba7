"""Small real inputs, and one thread so that two cores are enough."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hesstrace_cli.config import TrainConfig, resolve
from hesstrace_cli.training import Run

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # child processes too: sums depend on the number of threads
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(out, **settings) -> Run:
    defaults = {"epochs": 2, "train_examples": 200, "model_arg": {"width": 4}}
    return Run(resolve(TrainConfig, {**defaults, "out": str(out), **settings}, None))


def train_to_end(out, **settings) -> Run:
    run = make_run(out, **settings)
    for _ in run.advance():
        pass
    return run


@pytest.fixture(scope="session")
def fashion_mnist():
    if not (SHARED_DATA / "FashionMNIST").is_dir():
        pytest.skip("Fashion-MNIST is not at hand")
    return str(SHARED_DATA)
