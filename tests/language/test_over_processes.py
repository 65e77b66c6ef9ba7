"""A state carried along a text by two processes, each with its rows: as by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hesstrace_cli.distributed.sharding import whole
from tests.conftest import make_run
from tests.jobs import joined, run_job
from tests.language.test_training import WORDS
from tests.test_parts import assert_close

RUNS = {
    "plain": {"batch_size": 5},
    "in rounds, with a penalty": {"batch_size": 4, "accumulate": 2, "reg": "trace=0.01"},
    "split": {"batch_size": 5, "shard": True},
}


def trained(name, folder):
    """The weights after an epoch, and the state in the middle of the next."""
    run = make_run(
        folder / name, **{
            "dataset": f"text:{folder}", "model": "lstm", "model_arg": {"width": 6}, "seq_len": 5,
            "train_examples": None, "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0,
            "schedule": "constant", "val_fraction": 0, "epochs": 2, **RUNS[name],
        },
    )  # fmt: skip
    steps = run.advance()
    for _ in range(run.trainer.steps_per_epoch + 2):
        next(steps)
    return {**whole(run.trainer.model.state_dict()), "carried": run.trainer.carried.state}


def job(rank, ports):
    joined(rank, 2, ports)
    folder = Path.cwd() / "two"
    folder.mkdir(exist_ok=True)
    write(folder)
    return {name: trained(name, folder) for name in RUNS}


def write(folder):
    for part, times in (("train", 12), ("test", 2)):
        (folder / f"{part}.txt").write_text(WORDS * times)


@pytest.mark.slow
def test_two_processes_carry_the_state_of_one(tmp_path):
    write(tmp_path)
    one = {name: trained(name, tmp_path) for name in RUNS}
    two = run_job(2, job, tmp_path)
    for name, alone in one.items():
        assert alone["carried"].abs().sum() > 0
        for own in two:
            assert_close(alone, own[name])
        torch.testing.assert_close(two[0][name]["carried"], two[1][name]["carried"])
