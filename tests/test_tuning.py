"""The search for a strength: its budget, its optimum, its stops, and the runs it leaves behind."""

from __future__ import annotations

import importlib
import json
import math
import pathlib
import shlex

import pytest
import torch
from optuna.storages.journal import JournalFileBackend

from hesstrace_cli import records
from hesstrace_cli.comparison import tuning
from hesstrace_cli.config import TuneConfig, resolve
from hesstrace_cli.errors import ConfigError, NumericsError
from tests.conftest import TINY, assert_one_line_error, invoke
from tests.test_records import check

tune = importlib.import_module("hesstrace_cli.cli.tune")  # the name is its command's, too
BOUNDS, STEPS = (1e-4, 1.0), [5, 15, 45]


def made(optimum):
    """A loss with its least value at a strength, of which few epochs show little; and its calls."""
    asked = []

    def evaluate(strengths, epochs):
        asked.append((list(strengths), epochs))
        far = [math.log10(s / optimum) for s in strengths]
        return [
            [x**2 * e / 45 + 1 / e for e in range(1, epochs + 1)] if x < 1.9 else None for x in far
        ]

    return evaluate, asked


def searched(folder, evaluate, sizes=(9, 9), seed=0):
    folder.mkdir(exist_ok=True)
    study = tuning.open_study(folder, {"seed": seed}, lambda: 2.0)
    tuning.search(study, BOUNDS, sizes, STEPS, evaluate, seed)
    return study


@pytest.mark.parametrize("optimum", [0.003, 0.02])
def test_the_optimum_is_found(tmp_path, optimum):
    evaluate, asked = made(optimum)
    study = searched(tmp_path / "one", evaluate, sizes=[9])
    found = tuning.strength_of(tuning.best(study))
    nearest = min(tuning.spread(*BOUNDS, 9), key=lambda s: abs(math.log(s / optimum)))
    assert found == nearest
    assert [(len(strengths), epochs) for strengths, epochs in asked] == [(9, 5), (3, 15), (1, 45)]
    study = searched(tmp_path / "more", evaluate, sizes=[9, 9])
    nearer = tuning.strength_of(tuning.best(study))
    assert abs(math.log(nearer / optimum)) <= abs(math.log(found / optimum))
    assert 1 / 1.3 < nearer / optimum < 1.3


def test_few_epochs_do_not_rule_out_larger_strengths(tmp_path):
    """What overfits only later is ahead at first, by little; what is too strong is far behind."""

    def evaluate(strengths, epochs):
        if epochs > STEPS[0]:
            return [[math.log10(s / 0.0316) ** 2] for s in strengths]
        return [[2.0, 1 + 0.03 * math.log10(s / 1e-4) + (s > 0.2)] for s in strengths]

    study = searched(tmp_path, evaluate, sizes=[9])
    assert tuning.strength_of(tuning.best(study)) == 0.0316
    tried = [t["strength"] for t in tuning.trial_records(study) if t["epochs"] > STEPS[0]]
    assert tried == [0.01, 0.0316, 0.1]


def test_where_little_was_learnt_little_is_a_difference(tmp_path):
    """Loss near chance at first, slowly less for small strengths: no strong one goes on."""

    def evaluate(strengths, epochs):
        return [[2.3, 2.3 - 0.02 * epochs / (1 + s)] for s in strengths]

    trials = tuning.trial_records(searched(tmp_path, evaluate, sizes=[9]))
    assert max(t["strength"] for t in trials if t["epochs"] > STEPS[0]) == 0.1
    assert tuning.strength_of(tuning.best(searched(tmp_path, evaluate, sizes=[9]))) == 0.01


def test_what_is_left_is_worse_and_what_diverged_is_never_gone_on_with(tmp_path):
    evaluate, _ = made(0.001)
    trials = tuning.trial_records(searched(tmp_path, evaluate, sizes=[9]))
    assert [t["strength"] for t in trials] == tuning.spread(*BOUNDS, 9)
    assert [t["epochs"] for t in trials] == [5, 15, 45, 15, 5, 5, 5, 5, 5]
    assert [t["pruned"] for t in trials].count(False) == 1
    assert [t["val_loss"] is None for t in trials] == [False] * 6 + [True] * 3
    with pytest.raises(NumericsError, match="every strength diverged"):
        searched(tmp_path / "all", made(1e-9)[0], sizes=[9])


class Killed(BaseException):
    pass


def test_killed_at_any_write_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    evaluate, _ = made(0.02)
    truth = tuning.trial_records(searched(tmp_path / "whole", evaluate, seed=3))
    append = JournalFileBackend.append_logs
    left = [0]

    def dies(self, logs):
        left[0] -= 1
        if left[0] < 0:
            if kills % 2:  # in the middle of a line
                with pathlib.Path(self._file_path).open("ab") as file:
                    file.write(json.dumps(logs[0]).encode()[:20])
            raise Killed
        append(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", dies)
    folder, kills = tmp_path / "killed", 0
    while True:
        left[0] = 2 + kills % 5
        try:
            study = searched(folder, evaluate, seed=3)
            break
        except Killed:
            kills += 1
            (folder / f"{tuning.STUDY}.lock").symlink_to("nothing")  # it held the lock
    assert kills > 20
    assert tuning.trial_records(study) == truth


def test_a_budget_pays_for_what_it_says():
    for budget, cost in [(5, 2.2), (5, 1.0), (4, 2.5), (20, 3.0)]:
        sizes = tuning.brackets(budget, cost, STEPS)
        spent = sum(tuning._epochs(n, STEPS) for n in sizes) * cost / STEPS[-1]
        assert spent <= budget < spent + (4 / 3) * cost
    assert tuning.brackets(5, 1.0, STEPS)[0] == 9
    assert tuning._epochs(9, STEPS) == 9 * 5 + 3 * 10 + 30
    with pytest.raises(ConfigError, match=r"give at least --budget 2\.5"):
        tuning.brackets(1, 2.0, STEPS)
    tuning.brackets(2.5, 2.0, STEPS)
    assert [tuning.rungs(n) for n in (1, 2, 4, 45)] == [[1], [1, 2], [1, 2, 4], STEPS]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reg": ["trace=0.1"]}, "one regularizer"),
        ({"reg": ["trace", "sam"]}, "trace, sam"),
        ({"reg": ["none"]}, "one regularizer"),
        ({"range": "1"}, "LOW:HIGH"),
        ({"range": "1:0.1"}, "LOW:HIGH"),
        ({"range": "0:1"}, "LOW:HIGH"),
        ({"range": "0.1:x"}, "'x'"),
        ({"lambda_": 0.1}, "--lambda"),
        ({"val_fraction": 0}, "--val-fraction is 0"),
        ({"reg": ["mine.py:Own"]}, "--range"),
        ({"budget": 0}, "--budget"),
    ],
)
def test_what_cannot_be_searched(settings, words):
    if "mine.py:Own" in settings.get("reg", ()):
        with pathlib.Path("mine.py").open("w") as file:
            file.write("class Own:\n    default = None\n")
    with pytest.raises(ConfigError, match=words):
        resolve(TuneConfig, settings, None)


def test_the_usual_range():
    assert resolve(TuneConfig, {}, None).bounds() == (1e-4, 1.0)
    assert resolve(TuneConfig, {"reg": ["label-smoothing"]}, None).bounds() == (1e-3, 1.0)
    both = resolve(TuneConfig, {"reg": ["cutout=4,trace"], "range": "0.1:0.5"}, None)
    assert (both.tuned(), both.bounds()) == ("trace", (0.1, 0.5))
    run = tuning.planned(both, 0.25, 3)
    assert run.regularizer == "cutout=4,trace=0.25"
    assert run.until == 3


FLAGS = (*TINY[2:], "--epochs", "4", "--reg", "label-smoothing", "--budget", "2")


def tuned(out, *flags):
    result = invoke("tune", *FLAGS, "--out", out, "--json", "-", *flags)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(tune, "_step_cost", lambda settings: 1.0)


def test_the_command(tmp_path, monkeypatch, measured):
    """Killed after each rung, resumed, and in other processes: one result; its run is `train`'s."""
    whole, said = tuned("whole")
    check(whole, records.Tuning)
    assert whole["spent"] <= whole["budget"] == 2
    assert "compared by validation loss after 1, 2, 4 epochs" in said.stderr
    assert f"train with: {whole['command']}" in said.stderr
    for trial in whole["trials"]:  # each was left where it says
        run = f"whole/runs/digits-small-cnn-label-smoothing{trial['strength']:g}-seed0"
        lines = pathlib.Path(run, "metrics.jsonl").read_text().splitlines()
        assert len(lines) == trial["epochs"]
    train = tune.train_all

    def dies(*arguments):
        train(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "train_all", dies)
    for _ in range(2):
        assert invoke("tune", *FLAGS, "--out", "killed").exit_code != 0
    monkeypatch.setattr(tune, "train_all", train)
    place = {"command": None, "run": None}
    assert {**tuned("killed")[0], **place} == {**whole, **place}
    again, said = tuned("killed")
    assert {**again, **place} == {**whole, **place}
    assert "after epoch" not in said.stderr  # nothing is trained twice

    words = shlex.split(whole["command"])[1:]
    assert invoke(*words, "--out", "alone").exit_code == 0
    one, other = (torch.load(f"{folder}/last.pt", weights_only=True)["state_dict"]
                  for folder in (whole["run"], "alone"))  # fmt: skip
    assert all(torch.equal(one[name], other[name]) for name in one)
    last = pathlib.Path("alone/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["val_loss"] == whole["val_loss"]

    changed = invoke("tune", *FLAGS, "--out", "whole", "--lr", "0.01")
    assert_one_line_error(changed, 2, "lr was 0.05, is 0.01")
    table = invoke("tune", *FLAGS, "--out", "whole").stdout
    assert "chosen" in table
    assert "left" in table


@pytest.mark.slow
def test_runs_side_by_side_are_the_same(tmp_path, measured):
    one, other = (tuned(f"jobs{jobs}", "--jobs", jobs)[0] for jobs in (1, 2))
    assert one["trials"] == other["trials"]


def test_an_edge_is_said(tmp_path, measured, monkeypatch):
    three = ("--epochs", "1", "--budget", "3")
    monkeypatch.setattr(tuning, "val_losses", lambda run, epochs: [-0.05])  # all are equal
    found, said = tuned("edge", *three)
    assert found["at_edge"]
    assert found["strength"] == 0.001
    assert "0.001 is at an edge of what was tried" in said.stderr
    monkeypatch.setattr(
        tuning, "val_losses", lambda run, epochs: [-float("=0.0316" in run.regularizer)]
    )
    found, said = tuned("inside", *three)
    assert (found["strength"], found["at_edge"]) == (0.0316, False)
    assert "edge" not in said.stderr
