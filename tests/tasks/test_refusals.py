"""Outputs and targets of the wrong shape, type or range: a line that says what is expected."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hesstrace_cli.analysis.loading import check_fit, check_training_output
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.data import load_data
from hesstrace_cli.errors import DataError, ModelError
from hesstrace_cli.tasks import TASKS
from tests.conftest import assert_one_line_error, invoke

rng = np.random.default_rng(0)
N = 12
X, IMAGES = rng.standard_normal((N, 4)).astype("f4"), rng.random((N, 1, 4, 4)).astype("f4")
DATA = {
    "classification": (X, rng.integers(0, 2, N), lambda: nn.Linear(4, 2)),
    "tokens": (
        rng.integers(0, 5, (N, 6)), rng.integers(0, 3, (N, 6)),
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)),
    ),
    "segmentation": (IMAGES, rng.integers(0, 3, (N, 4, 4)), lambda: nn.Conv2d(1, 3, 1)),
    "regression": (X, rng.standard_normal((N, 2)), lambda: nn.Linear(4, 2)),
    "multilabel": (X, rng.integers(0, 2, (N, 3)), lambda: nn.Linear(4, 3)),
}  # fmt: skip
LABELS = ("classification", "tokens", "segmentation")  # class numbers


def with_one(y, value):
    y = np.array(y, dtype=np.result_type(y.dtype, np.min_scalar_type(value)))
    y.flat[5] = value
    return y


TARGETS = {  # what becomes of good targets, and of which tasks these are good still
    "one number": (lambda y: np.array(1), ()),
    "none": (lambda y: y[:0], ()),
    "one less": (lambda y: y[:-1], ()),
    "one more": (lambda y: np.concatenate([y, y[:1]]), ()),
    "no numbers in each": (lambda y: np.zeros((N, 0)), ()),
    "no whole numbers in each": (lambda y: np.zeros((N, 0), int), ()),
    "another axis": (lambda y: y[..., None], ("regression",)),
    "five axes": (lambda y: y.reshape(N, 1, 1, 1, -1), ("regression",)),
    "one class an example": (lambda y: rng.integers(0, 3, N), ("classification",)),
    "one number an example": (lambda y: rng.random(N), ("regression", "multilabel")),
    "numbers": (lambda y: y + 0.25, ("regression",)),
    "no distributions": (lambda y: rng.random((N, 3)), ("regression", "multilabel")),
    "below 0": (lambda y: np.tile([1.5, -0.5, 0.0], (N, 1)), ("regression",)),
    "bool": (lambda y: y > 0, ()),
    "complex": (lambda y: y * 1j, ()),
    "text": (lambda y: np.array(["a"] * N), ()),
    "objects": (lambda y: np.array([None] * N, dtype=object), ()),
    "dates": (lambda y: np.array(["2020-01-01"] * N, dtype="M8[D]"), ()),
    "long floats": (lambda y: y.astype(np.longdouble), ()),
    "nan": (lambda y: with_one(y.astype("f4"), np.nan), ()),
    "infinite": (lambda y: with_one(y.astype("f4"), np.inf), ()),
    "minus infinite": (lambda y: with_one(y.astype("f4"), -np.inf), ()),
    "minus one": (lambda y: with_one(y, -1), ("regression",)),
    "huge": (lambda y: with_one(y, 10**9), ("regression",)),
    "larger than any": (lambda y: np.full(y.shape, 2**63 + 1, "u8"), ()),
    "the ignored index alone": (lambda y: np.full(y.shape, -100), ()),
}
OUTPUTS = {  # what becomes of good outputs, and of which tasks these are good still
    "a tuple": (lambda f: (f,), ()),
    "a list": (lambda f: [f], ()),
    "nothing": (lambda f: None, ()),
    "text": (lambda f: "x", ()),
    "a number": (lambda f: 1.0, ()),
    "an array": (lambda f: f.detach().numpy(), ()),
    "a dict without logits": (lambda f: {"out": f}, ()),
    "an object without logits": (lambda f: SimpleNamespace(out=f), ()),
    "no logits in a dict": (lambda f: {"logits": None}, ()),
    "a list in a dict": (lambda f: {"logits": [f]}, ()),
    "whole numbers": (lambda f: f.long(), ()),
    "bool": (lambda f: f > 0, ()),
    "complex": (lambda f: f * 1j, ()),
    "sparse": (lambda f: f.to_sparse(), ()),
    "meta": (lambda f: f.to("meta"), ()),
    "detached": (lambda f: f.detach(), ()),
    "constant": (torch.zeros_like, ()),
    "one number": (lambda f: f.sum(), ()),
    "one axis": (lambda f: f.flatten(), ()),
    "an axis more": (lambda f: f[..., None], ()),
    "an axis less": (lambda f: f.sum(-1), ()),
    "one example less": (lambda f: f[:-1], ()),
    "one example more": (lambda f: torch.cat([f, f[:1]]), ()),
    "no examples": (lambda f: f[:0], ()),
    "examples last": (lambda f: f.transpose(0, -1), ()),
    "classes elsewhere": (
        lambda f: f.movedim(1, -1), ("classification", "regression", "multilabel")
    ),
    "one less": (lambda f: f[:, :-1], ()),
    "no classes": (lambda f: f[..., :0], ()),
    "one more": (lambda f: torch.cat([f, f[..., :1]], -1), ("classification", "tokens")),
    "half": (lambda f: f.half(), tuple(DATA)),
}  # fmt: skip


def loaded(task, y=None):
    inputs, targets, _ = DATA[task]
    y = targets if y is None else y
    np.savez("data.npz", x_train=inputs, y_train=y, x_test=inputs, y_test=y)
    return load_data(TrainConfig(dataset="data.npz", task=task), torch.device("cpu"))


def assert_said(problem, *words):
    said = str(problem.value)
    assert "\n" not in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("what", TARGETS)
def test_targets(what, task):
    change, fine = TARGETS[what]
    y = change(DATA[task][1])
    if task in fine:
        assert len(loaded(task, y).train) > 0
        return
    with pytest.raises(DataError) as problem:
        loaded(task, y)
    assert_said(problem, "data.npz")


class Giving(nn.Module):
    def __init__(self, model, change, training):
        super().__init__()
        self.model, self.change, self.in_training = model, change, training

    def forward(self, inputs):
        f = self.model(inputs)
        return self.change(f) if self.in_training in (None, self.training) else f


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("what", OUTPUTS)
def test_outputs(what, task):
    (change, fine), data = OUTPUTS[what], loaded(task)
    for check, training in ((check_fit, False), (check_training_output, True)):
        model = Giving(DATA[task][2](), change, training)
        for each in (check_fit, check_training_output):
            if task in fine or each is not check:
                each(model, data, "net")
            elif training and what in ("one less", "no classes") and task in LABELS:
                pass  # how many classes a model has is found in eval mode
            else:
                with pytest.raises(ModelError) as problem:
                    each(model, data, "net")
                assert_said(problem, "model 'net'")


FLAT = """
import math
from torch import nn

def numbers(in_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(in_shape), 3), nn.Flatten(0))

def tokens():
    return nn.Sequential(nn.Embedding(5, 3), nn.Flatten(0))
"""


@pytest.mark.parametrize("task", TASKS)
def test_a_line_and_its_exit_code(task):
    loaded(task)
    Path("models.py").write_text(FLAT)
    model = f"models.py:{'tokens' if task == 'tokens' else 'numbers'}"
    flags = ("--dataset", "data.npz", "--task", task, "--model", model)
    for command in ("train", "verify"):
        assert_one_line_error(invoke(command, *flags), 4, model, f"--task {task} expects")
    inputs, y, _ = DATA[task]
    np.savez("data.npz", x_train=inputs, y_train=y[..., None, None], x_test=inputs, y_test=y)
    for command in ("train", "verify"):
        code = 4 if task == "regression" else 3  # to which any shape is one
        assert_one_line_error(invoke(command, *flags), code, f"--task {task} expects")
