"""What a run may go on from, and what it refuses before a weight moves."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from torch import nn

from hesstrace_cli.errors import ConfigError, HesstraceError, ModelError, Stopped
from hesstrace_cli.storage.checkpoints import read_checkpoint
from hesstrace_cli.storage.runs import RunFolder
from tests.conftest import TINY, assert_one_line_error, invoke, make_run, train_to_end

SETTINGS = {"epochs": 2, "momentum": 0.9, "batch_size": 50}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped in the middle of its second epoch."""
    out = tmp_path_factory.mktemp("stopped") / "r"
    run = make_run(out, **SETTINGS)
    with pytest.raises(Stopped):
        list(run.advance(lambda: 15 if run.trainer.step == 6 else None))
    return out


@pytest.fixture
def folder(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "r")
    return tmp_path / "r"


def content_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def assert_nothing_moves(folder, monkeypatch, match, error=ModelError, **settings):
    """The refusal comes before any state is loaded, and leaves the folder as it was."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def loaded(*_):
        raise AssertionError("state was loaded")

    for kind in (nn.Module, torch.optim.Optimizer, torch.optim.SGD):
        monkeypatch.setattr(kind, "load_state_dict", loaded)
    with pytest.raises(error, match=match) as caught:
        make_run(folder, resume=True, **{**SETTINGS, **settings})
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_as_it_is_it_goes_on(folder):
    assert make_run(folder, resume=True, **SETTINGS).trainer.step == 6


OTHERS = {
    "seed": {"seed": 1}, "reg": {"reg": "mixup=0.2"}, "optimizer": {"optimizer": "adamw"},
    "lr": {"lr": 0.1}, "momentum": {"momentum": 0.5}, "train-examples": {"train_examples": 190},
    "model-arg": {"model_arg": {"width": 3}}, "epochs": {"epochs": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_run(folder, tmp_path, monkeypatch, name):
    other = make_run(tmp_path / "other", **{**SETTINGS, **OTHERS[name]})
    with pytest.raises(Stopped):
        list(other.advance(lambda: 15))
    shutil.copy(tmp_path / "other" / "last.pt", folder / "last.pt")
    assert_nothing_moves(folder, monkeypatch, f"{name} was")


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 3), ("lr", 0.5), ("schedule", "step"), ("weight-decay", 0.0)]
)
def test_an_edited_config_is_not_the_runs_own(folder, name, value):
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, name: value}))
    result = invoke("train", "--resume", "--out", folder)
    assert_one_line_error(result, 4, "last.pt", "config.yaml", f"{name} was", f"is {value}")


def _change(content, where, value):
    *path, last = where
    for key in path:
        content = content[key]
    content[last] = value


STATES = {
    "too far": (("step",), 9, "after step 9"),
    "of another epoch": (("epoch",), 0, "after step 6 and epoch 0"),
    "of fewer parameters": (("optimizer", "param_groups", 0, "params"), [0, 1], "parameters"),
    "with other settings": (("optimizer", "param_groups", 0, "momentum"), 0.1, "momentum 0.1"),
    "of another shape": (
        ("optimizer", "state", 0, "momentum_buffer"), torch.zeros(2), "parameter 0"
    ),
    "complex": (
        ("optimizer", "state", 0, "momentum_buffer"),
        torch.zeros(4, 1, 3, 3, dtype=torch.complex64), "parameter 0",
    ),
    "sparse": (
        ("optimizer", "state", 0, "momentum_buffer"),
        torch.zeros(4, 1, 3, 3).to_sparse(), "parameter 0",
    ),
    "a word": (("optimizer", "state", 0, "momentum_buffer"), "x", "parameter 0"),
    "of Adam": (("optimizer", "state", 0), {"exp_avg": torch.zeros(4, 1, 3, 3)}, "not one of SGD"),
    "of a parameter too many": (("optimizer", "state", 99), {}, "not one of SGD"),
    "with a scaler": (("scaler", "scale"), 2.0, "precision"),
    "of other data": (("num_classes",), 11, "num_classes"),
    "of other shapes": (("in_shape",), [1, 9, 9], "in_shape"),
    "of other inputs": (("preprocess", "mean"), [0.1], "preprocess"),
    "of other weights": (("state_dict", "0.weight"), torch.zeros(2), "0.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_does_not_fit(folder, monkeypatch, name):
    where, value, words = STATES[name]
    content = content_of(folder)
    _change(content, where, value)
    torch.save(content, folder / "last.pt")
    assert_nothing_moves(folder, monkeypatch, words)


@pytest.mark.parametrize(
    "field", ["optimizer", "step", "epoch", "seconds", "best_score", "sums", "scaler",
              "preprocess", "num_classes", "in_shape"]
)  # fmt: skip
def test_a_state_that_lacks_a_field(folder, monkeypatch, field):
    content = content_of(folder)
    del content[field]
    torch.save(content, folder / "last.pt")
    assert_nothing_moves(folder, monkeypatch, f"no {field}")


def test_a_foreign_checkpoint_is_no_state(folder, monkeypatch):
    torch.save(content_of(folder)["state_dict"], folder / "last.pt")
    assert_nothing_moves(folder, monkeypatch, "no state of a run")


def test_a_checkpoint_that_is_gone(tmp_path, monkeypatch):
    train_to_end(tmp_path / "r", **SETTINGS).finish()
    (tmp_path / "r" / "last.pt").unlink()
    assert_nothing_moves(tmp_path / "r", monkeypatch, "is missing")


def test_metrics_of_another_run(tmp_path, monkeypatch):
    train_to_end(
        tmp_path / "r",
        **SETTINGS,
    ).finish()
    (tmp_path / "r" / "metrics.jsonl").write_text("")
    assert_nothing_moves(tmp_path / "r", monkeypatch, "0 lines", ConfigError)


# --- what the flags say


@pytest.mark.parametrize("more", [[], ["--epochs", "1"], ["--lr", "0.1"]])
def test_resume_of_nothing(tmp_path, more):
    (tmp_path / "empty").mkdir()
    for name, words in (("NOPE", "does not exist"), ("empty", "holds no run")):
        result = invoke("train", "--resume", "--out", tmp_path / name, *more)
        assert_one_line_error(result, 2, words, "--resume-or-start")
    assert [file.name for file in tmp_path.iterdir()] == ["empty"]
    assert not list((tmp_path / "empty").iterdir())


def test_resume_or_start(tmp_path):
    flags = ("train", *TINY, "--out", tmp_path / "r", "--resume-or-start")
    assert invoke(*flags).exit_code == 0
    again = invoke(*flags)
    assert again.exit_code == 0
    assert "nothing to do" in again.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    result = invoke("train", *TINY, "--out", tmp_path / "mine", "--resume-or-start")
    assert_one_line_error(result, 2, "not empty", "no run")


def test_resume_without_flags_takes_the_runs_own_config(tmp_path):
    assert invoke("train", *TINY, "--lr", "0.01", "--out", "r").exit_code == 0
    for flag in ("--resume", "--resume-or-start"):
        assert invoke("train", flag, "--out", "r", "--device", "cpu").exit_code == 0
    assert invoke("train", *TINY, "--lr", "0.01", "--resume", "--out", "r").exit_code == 0
    result = invoke("train", *TINY, "--lr", "0.02", "--resume", "--out", "r")
    assert_one_line_error(result, 2, "lr was 0.01, is 0.02")
    assert invoke("train", *TINY).exit_code == 0  # where a default run goes
    assert "nothing to do" in invoke("train", "--resume").stderr


@pytest.mark.parametrize(
    "flag", ["--config", "--out", "--dataset", "--init", "--data-dir", "--reg"]
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_an_empty_text_names_nothing(tmp_path, command, flag):
    assert_one_line_error(invoke(command, *TINY, flag, ""), 2, "''")
    assert not list(tmp_path.iterdir())


# --- longer runs

LONGER = {
    "on a plateau": {"schedule": "plateau", "lr": 0.5},
    "constant": {"schedule": "constant"},
    "constant, penalty without a warm-up": {
        "schedule": "constant", "reg": "trace=0.01", "warmup": 0,
    },
    "constant, adamw and dropout": {
        "schedule": "constant", "optimizer": "adamw", "reg": "dropout=0.2,mixup=0.2",
    },
    "constant, a warm-up of nothing": {"schedule": "constant", "reg": "sam=0.05"},
}  # fmt: skip


def assert_same_run(a, b):
    for name in ("last.pt", "best.pt"):
        first, second = (read_checkpoint(f / name).state_dict for f in (a, b))
        assert all(torch.equal(first[k], second[k]) for k in first), name
    lines = [
        [{**json.loads(x), "seconds": 0} for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (a, b)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("name", LONGER)
def test_a_finished_run_is_made_longer(tmp_path, name):
    settings = LONGER[name]
    train_to_end(tmp_path / "whole", epochs=3, **settings)
    train_to_end(tmp_path / "r", epochs=2, **settings).finish()
    run = make_run(tmp_path / "r", epochs=3, resume=True, **settings)
    assert not run.finished
    assert RunFolder(tmp_path / "r").summary() is None  # no longer
    steps = run.advance()
    next(steps)
    del steps
    run.lock.release()  # killed, before it has saved anything
    train_to_end(tmp_path / "r", epochs=3, resume=True, **settings).finish()
    assert_same_run(tmp_path / "whole", tmp_path / "r")
    assert RunFolder(tmp_path / "r").summary()["epochs"] == 3


def test_made_longer_while_the_schedule_had_not_begun_to_fall(tmp_path):
    settings = {"schedule": "step"}
    train_to_end(tmp_path / "whole", epochs=5, **settings)
    run = make_run(tmp_path / "r", epochs=4, **settings)  # the first fall is at 30 %
    with pytest.raises(Stopped):
        list(
            run.advance(lambda: 15 if run.trainer.step == run.trainer.steps_per_epoch + 1 else None)
        )
    train_to_end(tmp_path / "r", epochs=5, resume=True, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "r")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "--schedule cosine"),
        ({"schedule": "step"}, "--schedule step"),
        ({"schedule": "constant", "reg": "trace=0.01"}, "--warmup 0.5"),
    ],
)
def test_where_a_longer_run_had_been_another(tmp_path, monkeypatch, settings, words):
    train_to_end(tmp_path / "r", **settings)
    assert_nothing_moves(
        tmp_path / "r", monkeypatch, words, ConfigError, batch_size=32, epochs=3, **settings
    )


def test_a_plugin_may_depend_on_the_length(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from hesstrace_cli.regularizers import Regularizer\n"
        "class Own(Regularizer):\n    def __init__(self, strength, config):\n        pass\n"
    )
    settings = {"schedule": "constant", "reg": f"{tmp_path}/own.py:Own=1"}
    train_to_end(tmp_path / "r", **settings)
    assert_nothing_moves(
        tmp_path / "r", monkeypatch, "own.py:Own", ConfigError, batch_size=32, epochs=3, **settings
    )


def test_fewer_epochs_or_more_than_epochs_are_other_settings(tmp_path):
    train_to_end(tmp_path / "r", schedule="constant")
    for changed in ({"epochs": 1}, {"epochs": 3, "lr": 0.1}):
        with pytest.raises(HesstraceError, match="other settings") as caught:
            make_run(tmp_path / "r", resume=True, **{"schedule": "constant", **changed})
        assert caught.value.exit_code == 2


def test_the_command_that_makes_a_run_longer(tmp_path):
    assert invoke("train", *TINY, "--schedule", "constant", "--out", "r").exit_code == 0
    longer = invoke("train", "--resume", "--out", "r", "--epochs", "2")
    assert longer.exit_code == 0, longer.output
    assert "epochs: 2\n" in (tmp_path / "r" / "config.yaml").read_text()
    assert invoke("train", *TINY, "--out", "s").exit_code == 0
    refused = invoke("train", "--resume", "--out", "s", "--epochs", "2")
    assert_one_line_error(refused, 2, "epochs was 1, is 2", "--schedule cosine")
