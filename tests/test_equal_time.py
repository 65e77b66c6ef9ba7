"""Rows of equal time: epochs by measured seconds, kept, repeated and collected."""

from __future__ import annotations

import itertools
import json
import shlex
import time

import pytest
import torch

from hesstrace_cli.config import TrainConfig, resolve
from hesstrace_cli.training import cost
from tests.conftest import TINY, assert_one_line_error, invoke
from tests.test_collected import a_run, grouped

FLAGS = (
    *TINY, "--equal", "time", "--seeds", "0", "--reg", "none", "--reg", "trace", "--reg",
    "ema=0.9,weight-decay=0", "--tune", "trace=0.001:0.01",
)  # fmt: skip
SECONDS = {"none": 1.0, "trace=0.001": 4.2, "ema=0.9,weight-decay=0": 1.5}
EPOCHS = {"none": 4, "trace=0.001": 1, "trace=0.01": 1, "ema=0.9,weight-decay=0": 3}


def config(**settings):
    given = {"train_examples": 100, "model_arg": {"width": 4}, "epochs": 40, **settings}
    return resolve(TrainConfig, given, None)


@pytest.fixture
def measured(monkeypatch):
    """Made seconds; what was asked for, each time."""
    asked = []

    def seconds(configs):
        asked.append({name: run.row().name for (*_, name), run in configs.items()})
        return {cell: SECONDS[cell[-1]] for cell in configs}

    monkeypatch.setattr(cost, "epoch_seconds", seconds)
    return asked


def test_every_row_gets_the_time_of_the_slowest(measured, tmp_path):
    out = tmp_path / "c"
    result = invoke(
        "compare",
        *FLAGS,
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    assert "epochs for equal time: none 4, trace=0.001 1," in result.stderr
    assert measured == [{name: name for name in SECONDS}]  # a strength of each
    kept = json.loads((out / "equal_time.json").read_text())
    assert {row["regularizer"]: row["epochs"] for row in kept["rows"]} == EPOCHS
    for folder in (out / "runs").iterdir():
        if folder.is_dir():
            summary = json.loads((folder / "summary.json").read_text())
            assert summary["epochs"] == EPOCHS[summary["regularizers"]]
            rates = [
                json.loads(x)["lr"] for x in (folder / "metrics.jsonl").read_text().splitlines()
            ]
            assert len(rates) == summary["epochs"]
            assert rates[-1] < 0.02  # the schedule goes down over all of them
    before = json.loads((out / "results.json").read_text())
    assert len(before["rows"]) == 3
    assert all(row["difference_to_none"] for row in before["rows"][1:])
    assert invoke("compare", out).exit_code == 0
    assert json.loads((out / "results.json").read_text())["rows"] == before["rows"]


def test_a_plan_has_the_epochs_and_what_was_measured_holds(measured, tmp_path):
    out = tmp_path / "c"
    plan = invoke("compare", *FLAGS, "--out", out, "--plan").stdout.splitlines()
    assert len(plan) == 4
    asked = [resolve(TrainConfig, {"reg": [w[w.index("--reg") + 1]]}, None).row().name
             for line in plan if (w := shlex.split(line))]  # fmt: skip
    epochs = [int(w[w.index("--epochs") + 1]) for line in plan if (w := shlex.split(line))]
    assert epochs == [EPOCHS[name] for name in asked]
    more = invoke("compare", *FLAGS, "--reg", "sam", "--out", out)
    assert_one_line_error(more, 2, "equal_time.json", "has no sam=0.05", "another --out")
    longer = invoke("compare", *FLAGS, "--out", out, "--epochs", "7")
    assert_one_line_error(longer, 2, "is of --epochs 1")
    larger = invoke("compare", *FLAGS, "--out", out, "--batch-size", "90", "--plan")
    assert_one_line_error(larger, 2, "is of --batch-size 32")
    assert len(measured) == 1
    (out / "equal_time.json").write_text("{")
    assert_one_line_error(invoke("compare", *FLAGS, "--out", out), 2, "is damaged")
    own = invoke("compare", *FLAGS, "--reg", "epochs=3", "--out", tmp_path / "d")
    assert_one_line_error(own, 2, "the row epochs=3 has epochs of its own")


def test_a_folder_is_of_one_kind(measured, tmp_path):
    """Else runs of equal epochs would be said to have the same time, or the other way round."""
    by_time, by_epochs = tmp_path / "t", tmp_path / "e"
    flags = (*TINY, "--seeds", "0", "--reg", "none", "--out")
    assert invoke("compare", *flags, by_time, "--equal", "time", "--plan").exit_code == 0
    for more in ((), ("--plan",)):
        refused = invoke("compare", *flags, by_time, *more)
        assert_one_line_error(refused, 2, "is a comparison of equal time", "another --out")
    (by_epochs / "runs").mkdir(parents=True)
    refused = invoke("compare", *flags, by_epochs, "--equal", "time")
    assert_one_line_error(refused, 2, "is a comparison of equal epochs", "another --out")
    assert not (by_epochs / "equal_time.json").exists()
    assert len(measured) == 1


def test_runs_of_other_times_are_compared_apart(tmp_path, monkeypatch):
    runs = []
    for name, epochs, slowest in (("a", 60, "sam=0.05"), ("b", 6, "sam=0.05"), ("c", 60, "nso=1")):
        rows = [{"dataset": "digits", "model": "small-cnn", "regularizer": row, "epochs": own,
                 "seconds_per_epoch": 60 / own}
                for row, own in (("none", 2 * epochs), (slowest, epochs))]  # fmt: skip
        folder = tmp_path / name
        runs += [a_run(folder / f"runs/{row['regularizer']}", row["regularizer"],
                       epochs=row["epochs"]) for row in rows]  # fmt: skip
        runs.append(a_run(folder / "runs/other", epochs=7))  # not by this file
        content = {"epochs": epochs, "rows": rows}
        (folder / "equal_time.json").write_text(json.dumps(content))
    assert grouped(*runs) == [
        ["none", "sam=0.05"], ["none"] * 3, ["none", "sam=0.05"], ["none", "nso=1"],
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path / "a/runs")  # the file is found from there, too
    assert grouped(*({**run, "folder": run["regularizers"]} for run in runs[:2])) == [
        ["none", "sam=0.05"]
    ]


def test_a_row_that_diverges_at_once_keeps_its_epochs(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "_SECONDS", 1e-3)
    flags = (*TINY, "--equal", "time", "--seeds", "0", "--warmup", "0", "--epochs", "3")
    out = tmp_path / "c"
    result = invoke("compare", *flags, "--reg", "none", "--reg", "trace=1e30", "--out", out)
    assert result.exit_code == 0, result.output
    kept = json.loads((out / "equal_time.json").read_text())["rows"]
    assert kept[1]["seconds_per_epoch"] is None
    assert [row["epochs"] for row in kept] == [3, 3]


@pytest.fixture
def made_steps(monkeypatch):
    """Made steps of one second, and two where the penalty is due; whose they were."""
    clock, taken = [0.0], []
    monkeypatch.setattr(cost, "_SECONDS", 8.0)
    monkeypatch.setattr("hesstrace_cli.training.trainer.time.monotonic", lambda: clock[0])

    def take(trainer, _examples):
        due = "trace=0.01" in trainer.config.reg and trainer.step % trainer.config.every == 0
        clock[0] += 2.0 if due else 1.0
        taken.append(trainer.config.reg)

    monkeypatch.setattr(cost.Trainer, "take_step", take)
    return taken


def test_what_is_measured_is_the_runs_own_clock(made_steps):
    configs = {"none": config(), "trace": config(reg=["trace=0.01"], every=2)}
    state = torch.get_rng_state()
    seconds = cost.epoch_seconds(configs)
    assert torch.equal(state, torch.get_rng_state())
    steps = cost.Trainer.of(configs["none"]).steps_per_epoch
    assert seconds == {"none": steps * 1.0, "trace": steps * 1.5}
    changes = sum(a != b for a, b in itertools.pairwise(made_steps))
    assert changes == 2 * (cost._PASSES + 1) - 1  # in turn


def test_a_short_run_is_timed_beyond_its_end(made_steps):
    """Its few steps are the slow ones of a beginning, if they are enough for a pass at all."""
    configs = {"none": config(epochs=1), "trace": config(epochs=1, reg=["trace=0.01"])}
    steps = cost.Trainer.of(configs["none"]).steps_per_epoch
    assert cost.epoch_seconds(configs) == {"none": steps * 1.0, "trace": steps * 2.0}
    assert len(made_steps) == 2 * (cost._PASSES + 1) * cost._STEPS  # and not for long
    made_steps.clear()
    cost.epoch_seconds({"rare": config(epochs=1, reg=["trace=0.01"], every=1000)})
    assert len(made_steps) < 100


@pytest.mark.slow
def test_measured_seconds_are_within_a_tenth(monkeypatch, tmp_path):
    """Of the planned runs, a part of each in turn, by the clock of this process.

    Other work on the machine, which comes and goes, slows all of them alike then.
    """
    monkeypatch.setattr("hesstrace_cli.training.trainer.time.monotonic", time.process_time)
    flags = ("--train-examples", "400", "--epochs", "30", "--model-arg", "width=8", "--seeds", "0",
             "--equal", "time", "--reg", "none", "--reg", "trace", "--reg", "sam", "--reg", "ema",
             "--out", tmp_path / "c", "--plan")  # fmt: skip
    plan = [shlex.split(line) for line in invoke("compare", *flags).stdout.splitlines()]
    trainers = [
        cost.Trainer.of(config(
            train_examples=400, model_arg={"width": 8}, reg=[words[words.index("--reg") + 1]],
            epochs=int(words[words.index("--epochs") + 1]),
        )) for words in plan
    ]  # fmt: skip
    assert len({trainer.config.epochs for trainer in trainers}) >= 3
    runs = [(trainer, trainer.advance()) for trainer in trainers]
    for part in range(1, 31):
        for trainer, steps in runs:
            until = trainer.total_steps * part // 30
            for _ in itertools.islice(steps, until - trainer.step):
                pass
    assert all(trainer.step == trainer.total_steps for trainer in trainers)
    seconds = [trainer.seconds for trainer in trainers]
    assert max(seconds) < 1.1 * min(seconds), seconds
