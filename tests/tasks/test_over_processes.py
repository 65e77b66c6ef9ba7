"""Training with class weights and ignored terms, spread unevenly over processes and parts."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import make_run
from tests.jobs import joined, run_job
from tests.test_parts import assert_close

MODELS = """
from torch import nn
from tests.tasks.cases import Sequences, mlp, pixels

def vectors(width):
    return mlp(width, nn.Tanh(), nn.LayerNorm(4))

def tokens():
    return Sequences(nn.GELU(), nn.LayerNorm(4))

def images():
    return pixels(nn.Tanh(), nn.GroupNorm(2, 4))
"""
N = 12
BATCHES = (range(N), range(2, 10), (7, 8), (7,), (4, 9, 11))  # the last has no term that counts
WEIGHTS = "0.25,2,1"
rng = np.random.default_rng(0)


def uneven(targets):
    """Of even examples, the first process's, nearly all terms count; of odd ones hardly any.

    Example 4 has none, nor has the last part of the second process, nor a batch's of its own.
    """
    targets = targets.copy()
    rows = targets.reshape(N, -1)
    rows[1::2, 1:] = -100
    rows[[4, 9, 11]] = -100
    rows[2, :2] = -100
    return targets


X = rng.standard_normal((N, 3))
TOKENS, IMAGES = rng.integers(0, 5, (N, 4)), rng.standard_normal((N, 1, 3, 2))
DATA = {
    "classification": (X, np.array([0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1]), "vectors", 3),
    "tokens": (TOKENS, uneven(rng.integers(0, 3, TOKENS.shape)), "tokens", None),
    "segmentation": (IMAGES, uneven(rng.integers(0, 3, (N, 3, 2))), "images", None),
    "regression": (X, rng.standard_normal((N, 2)), "vectors", 2),
    "multilabel": (X, rng.integers(0, 2, (N, 2)), "vectors", 2),
}
WEIGHED = ("classification", "tokens", "segmentation")
PENALTIES = {
    "G": {"reg": "trace=0.1"},
    "G by example": {"reg": "trace=0.1", "form": "example", "num_probes": 2},
    "H": {"reg": "trace=0.01", "curvature": "hessian"},
    "H smoothed": {"reg": "trace=0.01,label-smoothing=0.1", "curvature": "hessian"},
}
CASES = [
    (task, penalty, accumulate)
    for task, penalty, accumulate in itertools.product(DATA, PENALTIES, (1, 3))
    if (penalty == "G" or accumulate == 3) and (task in WEIGHED or "smoothed" not in penalty)
]


def save(folder):
    """The data and models of every task."""
    (folder / "models.py").write_text(MODELS)
    for task, (X, y, *_) in DATA.items():
        np.savez(folder / f"{task}.npz", x_train=X, y_train=y, x_test=X, y_test=y)


def stepped(folder, task, penalty, accumulate):
    """The weights in float64 after each step, and then what the epoch adds up."""
    inputs, targets, model, width = DATA[task]
    run = make_run(
        folder / f"{task}-{penalty}-{accumulate}", dataset=str(folder / f"{task}.npz"),
        task=task, model=f"{folder}/models.py:{model}",
        model_arg={} if width is None else {"width": width}, train_examples=N, batch_size=N,
        val_fraction=0, warmup=0, lr=0.1, accumulate=accumulate,
        class_weights=WEIGHTS if task in WEIGHED else None,
        **PENALTIES[penalty],
    )  # fmt: skip
    trainer = run.trainer
    trainer.model.double()
    # As they are in the file: a split has an order of its own.
    train = dataclasses.replace(
        trainer.data.train, inputs=torch.as_tensor(inputs), targets=torch.as_tensor(targets),
        dtype=torch.float64,
    )  # fmt: skip
    trainer.data = dataclasses.replace(trainer.data, train=train)
    after = []
    for batch in BATCHES:
        (examples,) = trainer.examples([torch.tensor(batch)])
        trainer.take_step(examples)
        trainer.step += 1
        after.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    sums = trainer.reduce()
    figures = {"loss": sums.loss, "correct": sums.correct, "penalty": sums.penalty}
    return [*after, {**figures, "terms": torch.tensor(sums.examples)}]


def work(rank, ports):
    joined(rank, 2, ports)
    return {case: stepped(Path.cwd(), *case) for case in CASES}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    save(folder)
    return run_job(2, work, folder)


@pytest.mark.parametrize("task", DATA)
def test_two_processes_give_the_weights_of_one(task, job, tmp_path):
    save(tmp_path)
    own = [penalty for penalty in PENALTIES if (task, penalty, 3) in CASES]
    one = {penalty: stepped(tmp_path, task, penalty, 1) for penalty in own}
    for case in CASES:
        if case[0] != task:
            continue
        steps = zip(one[case[1]], *(result[case] for result in job), strict=True)
        for number, (whole, first, second) in enumerate(steps):
            try:
                assert_close(first, second, rtol=0, atol=0)
                assert_close(whole, first, rtol=1e-9, atol=1e-11)
            except AssertionError as problem:
                raise AssertionError(f"{case}, {number}: {problem}") from None
