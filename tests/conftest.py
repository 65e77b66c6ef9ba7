"""Small real inputs, and one thread so that two cores are enough."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hesstrace_cli.cli import app, signals
from hesstrace_cli.config import TrainConfig, resolve
from hesstrace_cli.training.run import Run

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # child processes too: sums depend on the number of threads
TINY = ["--epochs", "1", "--train-examples", "100", "--model-arg", "width=4"]
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_signal_has_come(monkeypatch):
    """A test that sends one to its own process is not the next one's."""
    monkeypatch.setattr(signals, "_came", [])


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


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    result = invoke("train", *TINY, "--reg", "trace", "--lambda", "0.01", "--out", out)
    assert result.exit_code == 0, result.output
    return out / "last.pt"


def assert_one_line_error(result, code, *words):
    assert result.exit_code == code, result.output + repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
