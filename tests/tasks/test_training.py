"""Training for every task: plain and penalized, whole batches and parts, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from hesstrace_cli.config import TASK_NAMES
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.tasks import TASKS
from tests.conftest import assert_one_line_error, invoke, make_run, train_to_end
from tests.test_parts import assert_close

MODELS = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, X):
        hidden = self.table(X)
        hidden = nn.functional.gelu(self.mix(hidden + hidden.mean(1, keepdim=True)))
        return {"logits": self.head(hidden)}

def tagger(num_classes):
    return Tagger(num_classes)

def painter(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.GELU(), nn.Conv2d(5, num_classes, 1)
    )

def net(num_classes, in_shape):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_shape[-1], 8), nn.LayerNorm(8), nn.Tanh(),
        nn.Linear(8, num_classes),
    )
"""
rng = np.random.default_rng(0)
N = 46


def some_ignored(targets):
    """Unevenly: of the first examples hardly any count, and one has none."""
    targets = targets.copy()
    targets[: len(targets) // 3, 1:] = -100
    targets[5] = -100
    return targets


TOKENS, IMAGES = rng.integers(0, 7, (N, 5)), rng.random((N, 1, 6, 6)).astype("f4")
X = rng.standard_normal((N, 4)).astype("f4")
DATA = {
    "classification": (X, rng.integers(0, 3, N), "net"),
    "tokens": (TOKENS, some_ignored((TOKENS + 1) % 3), "tagger"),
    "segmentation": (IMAGES, some_ignored((IMAGES[:, 0] * 3).astype(int)), "painter"),
    "regression": (X, X[:, :2].astype("f8"), "net"),
    "multilabel": (X, (X[:, :3] > 0).astype(int), "net"),
}


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "models.py").write_text(MODELS)

    def of(task, **more):
        inputs, targets, model = DATA[task]
        file = tmp_path / f"{task}.npz"
        np.savez(file, x_train=inputs, y_train=targets, x_test=inputs[:9], y_test=targets[:9])
        return {
            "dataset": str(file), "model": f"{tmp_path}/models.py:{model}", "task": task,
            "epochs": 2, "batch_size": 20, "train_examples": N, "model_arg": {}, "lr": 0.1,
            "val_fraction": 0.2, "warmup": 0, **more,
        }  # fmt: skip

    return of


def test_every_task_has_a_name():
    assert tuple(TASKS) == TASK_NAMES
    assert set(DATA) == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "penalty",
    [
        {"reg": "none"},
        {"reg": "trace=0.003", "num_probes": 2},
        {"reg": "trace=0.001", "curvature": "hessian"},
    ],
    ids=["none", "G", "H"],
)
def test_parts_equal_the_big_batch(task, penalty, settings, tmp_path):
    """A mean over terms: parts with few of them weigh little."""
    runs = [
        train_to_end(tmp_path / str(rounds), **settings(task, accumulate=rounds, **penalty))
        for rounds in (1, 3)
    ]
    assert_close(*(dict(run.trainer.model.state_dict()) for run in runs))
    records = [
        json.loads((tmp_path / str(n) / "metrics.jsonl").read_text().splitlines()[-1])
        for n in (1, 3)
    ]
    for key in ("train_loss", "train_accuracy", "penalty_trace", "val_loss"):
        expected = records[0][key]
        assert records[1][key] == (None if expected is None else pytest.approx(expected, rel=1e-3))


@pytest.mark.parametrize("task", TASKS)
def test_the_penalty_lowers_the_trace(task, settings, tmp_path):
    summaries = [
        train_to_end(tmp_path / reg, **settings(task, reg=reg, epochs=15)).finish()
        for reg in ("none", "trace=0.1")
    ]
    traces = [summary["trace"]["trace"] for summary in summaries]
    assert traces[1] < traces[0]
    for summary in summaries:
        assert summary["task"] == task
        assert set(summary["metrics"]) == set(summary["train_metrics"]) == set(
            summary["val_metrics"]
        )  # fmt: skip
        assert (
            summary["num_terms"] == TASKS[task]().num_terms(torch.as_tensor(DATA[task][1]))
            or summary["num_terms"] < DATA[task][1].size
        )
        assert (summary["input_jacobian"] is None) == (task == "tokens")
        assert (summary["test_accuracy"] is None) == (task == "regression")
    assert json.loads((tmp_path / "none" / "summary.json").read_text())["task"] == task


@pytest.mark.parametrize("reg", ["trace=0.003", "trace-held=0.003"])
def test_parts_of_token_sequences_by_example_equal_the_big_batch(reg, settings, tmp_path):
    """Whose output layer is taken apart: the signs are those that examples have in their batch."""
    runs = [
        train_to_end(
            tmp_path / str(rounds), **settings("tokens", accumulate=rounds, reg=reg, form="example")
        )
        for rounds in (1, 3)
    ]
    assert_close(*(dict(run.trainer.model.state_dict()) for run in runs))
    ways = runs[0].trainer.regularizers[0].description()["form_reason"]
    assert ways == "3 of 5 tensors by example; 2 in closed form"


def test_the_summary_says_which_factor_of_the_trace_fell(settings, tmp_path):
    run = train_to_end(tmp_path / "a", **settings("tokens", reg="trace-held=0.01", form="example"))
    change = run.finish()["trace_change"]
    assert change["reason"] is None
    assert change["num_examples"] == 32
    parts = change["of_curvature"] + change["of_jacobian"]
    assert parts == pytest.approx(math.log(change["after"] / change["before"]))
    start = make_run(tmp_path / "b", **settings("tokens", init=str(tmp_path / "a" / "last.pt")))
    again = start.finish()["trace_change"]
    assert again["before"] == again["after"] == pytest.approx(change["after"], rel=1e-5)
    assert again["of_curvature"] == again["of_jacobian"] == 0
    (tmp_path / "a" / "last.pt").unlink()
    assert "does not exist" in start.finish()["trace_change"]["reason"]
    assert train_to_end(tmp_path / "c", **settings("regression")).finish()["trace_change"] is None


@pytest.mark.parametrize("task", TASKS)
def test_the_estimate_of_the_checkpoint_is_that_of_the_run(task, settings, tmp_path):
    flags = settings(task)
    summary = train_to_end(tmp_path / "r", **flags).finish()
    result = invoke(
        "estimate-trace", tmp_path / "r" / "last.pt", "--model", flags["model"], "--json", "-"
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["task"] == task
    assert record["loss"] == pytest.approx(summary["train_loss"], rel=1e-5)
    if record["stderr"] == 0:
        assert record["trace"] == pytest.approx(summary["trace"]["trace"], rel=1e-4)


@pytest.mark.parametrize(
    ("task", "reg"),
    [
        ("tokens", "mixup"), ("tokens", "cutout"),
        ("segmentation", "mixup"), ("segmentation", "cutout"), ("segmentation", "dropout"),
        ("regression", "label-smoothing"), ("regression", "confidence"),
        ("multilabel", "label-smoothing"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(task, reg, settings, tmp_path):
    with pytest.raises(ConfigError, match=reg) as caught:
        make_run(tmp_path / "r", **settings(task, reg=reg))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "reg", ["jacobian", "confidence", "grad-norm", "label-smoothing", "mixup", "dropout", "sam",
            "nso"],
)  # fmt: skip
def test_every_other_regularizer_trains(task, reg, settings, tmp_path):
    if reg in TASKS[task].refuses:
        return
    plain = make_run(tmp_path / "a", **settings(task)).trainer.model.state_dict()
    run = train_to_end(tmp_path / "b", **settings(task, reg=reg, epochs=1))
    assert all(bool(p.isfinite().all()) for p in run.trainer.model.parameters())
    moved = run.trainer.model.state_dict()
    assert any(not torch.equal(plain[name], moved[name]) for name in plain)


def test_class_weights(settings, tmp_path):
    rare = DATA["classification"][1].copy()
    rare[:] = 0
    rare[::8] = 1
    np.savez(tmp_path / "d.npz", x_train=X, y_train=rare, x_test=X, y_test=rare)
    flags = settings("classification", dataset=str(tmp_path / "d.npz"), num_classes=2)
    run = make_run(tmp_path / "r", **flags, class_weights="balanced")
    task = run.trainer.data.task
    targets = run.trainer.data.train.targets
    counts = torch.bincount(targets, minlength=2)
    expected = len(targets) / (2 * counts)
    assert torch.tensor(task.class_weights) == pytest.approx(expected.numpy(), rel=1e-6)
    result = invoke(
        "train", "--dataset", tmp_path / "d.npz", "--model", "mlp", "--class-weights", "1,2,3"
    )
    assert_one_line_error(result, 2, "--class-weights has 3 weights", "2 classes")


BAD = [
    ("tokens", "classification", 3, "--task classification expects"),
    ("classification", "tokens", 3, "--task tokens expects"),
    ("regression", "multilabel", 3, "targets go from"),
    ("multilabel", "regression", 3, "--task regression expects"),
]


@pytest.mark.parametrize(("data", "task", "code", "words"), BAD)
def test_targets_of_another_task_are_refused(data, task, code, words, settings):
    flags = settings(data)
    result = invoke(
        "train", "--dataset", flags["dataset"], "--model", flags["model"], "--task", task
    )
    assert_one_line_error(result, code, words)


def test_outputs_of_another_task_are_refused(settings):
    flags = settings("multilabel")  # whole numbers (N, D), which auto takes for tokens
    result = invoke("train", "--dataset", flags["dataset"], "--model", flags["model"])
    assert_one_line_error(result, 4, "--task tokens expects", "(N, T, C)")


TEXT = """
import torch
from torch import nn

class Text(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 6), nn.Linear(6, num_classes)

    def forward(self, X):
        assert X.dtype == torch.int64
        return {"logits": self.head(torch.tanh(self.table(X)).mean(1))}
"""


@pytest.fixture
def of_indices(tmp_path):
    """Classes of whole sequences: the inputs are indices, the targets class numbers."""
    (tmp_path / "text.py").write_text(TEXT)
    y = TOKENS[:, 0] % 3
    np.savez(tmp_path / "text.npz", x_train=TOKENS, y_train=y, x_test=TOKENS, y_test=y)
    return ("train", "--dataset", tmp_path / "text.npz", "--model", f"{tmp_path}/text.py:Text",
            "--epochs", "1", "--out", tmp_path / "r")  # fmt: skip


@pytest.mark.parametrize("flags", [["--reg", "trace"], ["--precision", "bf16", "--reg", "trace"],
                                   ["--channels-last"]])  # fmt: skip
def test_indices_stay_indices(flags, of_indices):
    result = invoke(*of_indices, *flags)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--reg", "mixup"], 2, "mixup mixes inputs, and these are indices"),
        (["--reg", "cutout=1"], 2, "cutout=1 erases a square of 1 pixels of images"),
        (["--augment", "crop-flip"], 2, "--augment crop-flip moves what is in images"),
        (["--image-size", "4"], 2, "--image-size resizes images (N, C, H, W)"),
        (["--mean", "0.5", "--std", "1"], 2, "are indices; leave them out"),
    ],
)
def test_what_indices_do_not_take_is_refused(flags, code, words, of_indices):
    assert_one_line_error(invoke(*of_indices, *flags), code, words)


@pytest.mark.parametrize("more", [{"augment": "crop-flip"}, {"image_size": 3}])
def test_masks_do_not_stay_where_images_move(more, settings, tmp_path):
    with pytest.raises(ConfigError, match="targets of"):
        make_run(tmp_path / "r", **settings("segmentation", **more))
