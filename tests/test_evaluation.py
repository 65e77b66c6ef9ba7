"""The input Jacobian against PyTorch's own, and the report."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hesstrace_cli.analysis.evaluation import MOST_COLUMNS, input_jacobian
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from tests.conftest import invoke, train_to_end


def split_of(n, *shape):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return TensorSplit(X, torch.zeros(n, dtype=torch.long), Preprocess(), X.dtype)


def truth_of(model, X):
    rows = [torch.func.jacrev(lambda x: model(x[None])[0])(x) for x in X]
    return torch.stack([row.square().sum() for row in rows])


@pytest.mark.parametrize("batch_size", [3, 10])
def test_input_jacobian_is_that_of_jacrev(batch_size):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(),
                          nn.Dropout(), nn.Linear(48, 5)).double().train()  # fmt: skip
    split = split_of(10, 2, 6, 6)
    found = input_jacobian(model, split, batch_size)
    assert model.training
    truth = truth_of(model.eval(), next(split.batches(10))[0])
    assert found.value == pytest.approx(truth.mean().item())
    assert found.stderr == pytest.approx(truth.std().item() / 10**0.5)


def test_many_classes_by_signs():
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, MOST_COLUMNS + 30)).double()
    split = split_of(300, 6)
    found = input_jacobian(model, split, 100)
    truth = truth_of(model, next(split.batches(300))[0]).mean().item()
    assert found.value == pytest.approx(truth, rel=0.02)
    assert found.value != truth


def test_a_model_that_ignores_its_inputs():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, X):
            return self.bias.expand(len(X), 3)

    assert input_jacobian(Constant(), split_of(4, 6), 2).value == 0


def test_report(tmp_path):
    run = train_to_end(tmp_path / "r")
    summary = run.finish()
    file = str(run.folder.last)
    arguments = ["estimate-trace", file, "--report", "--json", str(tmp_path / "t.json")]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "input Jacobian" in result.stdout
    assert "proves none" in result.stderr
    record = json.loads((tmp_path / "t.json").read_text())
    report = record["report"]
    assert report["generalization_gap"] == report["test_loss"] - report["train_loss"]
    assert report["train_loss"] == pytest.approx(summary["train_loss"], rel=1e-5)
    assert report["input_jacobian"] == pytest.approx(summary["input_jacobian"], rel=1e-5)
    assert report["trace"] == record["trace"]
    assert report["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
