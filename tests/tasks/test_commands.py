"""`verify` of clean models for every task, and what of a data set has no term that counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hesstrace_cli.analysis import verify
from hesstrace_cli.analysis.evaluation import evaluate
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import DataError
from tests.conftest import invoke
from tests.tasks.cases import (
    IMAGES,
    LABELS,
    MASKS,
    NEXT,
    NUMBERS,
    SOFT,
    TOKENS,
    VECTORS,
    case_of,
)

MODELS = """
from torch import nn
from tests.tasks.cases import Sequences, Wrapped, batch_norm, mlp, pixels

def vectors(width):
    return mlp(width, nn.Tanh(), nn.LayerNorm(4))

def tokens(first=False):
    return Wrapped(Sequences(nn.GELU(), nn.LayerNorm(4), sequence_first=first), dict)

def images():
    return pixels(nn.ReLU(), nn.BatchNorm2d(4))
"""

RUNS = {
    "classification": (VECTORS, SOFT, "vectors", "width=3"),
    "tokens": (TOKENS, NEXT, "tokens", "first=true"),
    "segmentation": (IMAGES, MASKS, "images", None),
    "regression": (VECTORS, NUMBERS, "vectors", "width=2"),
    "multilabel": (VECTORS, LABELS, "vectors", "width=2"),
}


def saved(X, y):
    """As a file, with the models' beside it."""
    x = X.numpy() if X.dtype == torch.int64 else X.float().numpy()
    y = y.numpy() if y.dtype == torch.int64 else y.float().numpy()
    np.savez("data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    Path("models.py").write_text(MODELS)
    return "data.npz"


@pytest.mark.parametrize("task", RUNS)
def test_verify_finds_clean_models_right(task, monkeypatch):
    X, y, model, argument = RUNS[task]
    flags = ["--model", f"models.py:{model}", "--dataset", saved(X, y), "--task", task]
    flags += ["--model-arg", argument] if argument else []
    flags += ["--ignore-index", "255"] if task == "segmentation" else []
    flags += ["--batch-size", "8"]
    result = invoke("verify", *flags, "--json", "-")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["right"]
    forms = [row for row in record["rows"] if "v'Hv" in row["check"] and "value" in row["check"]]
    assert forms


def test_examples_without_a_term_are_the_datas_fault():
    case = case_of("tokens, relu")
    few = case.split.subset(torch.tensor([0, 8, 9]))
    objective = Objective(case.model, trainable(case.model), case.task)
    with pytest.raises(DataError, match="every target of these 3 examples is the ignored index"):
        evaluate(case.model, few, 2)
    with pytest.raises(DataError, match="every target of these 3 examples is the ignored index"):
        DataLoss.counted(objective, lambda: few.batches(2))


def test_verify_takes_a_batch_with_terms():
    """The loss of one without is the constant 0, of which all derivatives are right."""
    case = case_of("tokens, relu")
    assert case.task.num_terms(case.y[:1]) == 0
    _, y = verify._first_batch(case.split, 1)
    assert case.task.num_terms(y) > 0
