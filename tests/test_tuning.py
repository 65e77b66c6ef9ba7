"""The search for a strength: its budget, its optimum, its stops, and the runs it leaves behind."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import pathlib
import shlex

import pytest
import torch
from optuna.storages.journal import JournalFileBackend

from hesstrace_cli import records
from hesstrace_cli.comparison import tuning
from hesstrace_cli.comparison.tuning import Validation
from hesstrace_cli.config import TuneConfig, resolve, scale_of
from hesstrace_cli.errors import ConfigError, NumericsError
from tests.conftest import TINY, assert_one_line_error, invoke
from tests.test_records import check

tune = importlib.import_module("hesstrace_cli.cli.tune")  # the name is its command's, too
BOUNDS, START, EPOCHS = (1e-4, 1.0), 0.01, 45
PLAN = tuning.Plan(7, EPOCHS)


def made(optimum):
    """A loss with its least value at a strength, and what was asked; too large ones diverge."""
    asked = []

    def evaluate(strengths):
        asked.append(list(strengths))
        far = [math.log10(s / optimum) for s in strengths]
        return [Validation([x**2, x**2 + 1], [3, 1]) if x < 1.9 else None for x in far]

    return evaluate, asked


def searched(folder, evaluate, size=3, start=START, bounds=BOUNDS):
    folder.mkdir(exist_ok=True)
    study = tuning.open_study(folder, {}, lambda: 2.0)
    tuning.search(study, tuning.Plan(size, EPOCHS), bounds, start, evaluate)
    return study


def found(study, start=START):
    return tuning.strength_of(tuning.chosen(study, start))


@pytest.mark.parametrize(
    ("optimum", "asked"),
    [
        (0.009, [[0.01], [0.00316], [0.0178]]),
        (0.0009, [[0.01], [0.00316], [0.001]]),
        (0.04, [[0.01], [0.00316], [0.0178]]),
    ],
)
def test_it_walks_to_where_it_is_better(tmp_path, optimum, asked):
    evaluate, known = made(optimum)
    study = searched(tmp_path, evaluate)
    assert known == asked
    assert found(study) == min(itertools.chain(*asked), key=lambda s: abs(math.log(s / optimum)))


@pytest.mark.parametrize("optimum", [0.0005, 0.003, 0.0141, 0.05])
def test_the_optimum_is_found(tmp_path, optimum):
    evaluate, asked = made(optimum)
    strength = found(searched(tmp_path, evaluate, size=7))
    assert [len(each) for each in asked] == [1, 2, 2, 1, 1]
    assert 1 / 1.6 < strength / optimum < 1.6


def test_of_those_as_good_the_nearest_to_the_first_is_taken(tmp_path):
    """The one of the least loss is not, where the next differs by less than its standard error."""

    def by(differences):
        """The losses of 0.00316, and those that are 0.01's for a mean difference of 0.1."""
        losses = {0.00316: [0.5, 0.6, 0.7, 0.8]}
        losses[0.01] = [a + b for a, b in zip(losses[0.00316], differences, strict=True)]
        return lambda strengths: [Validation(losses.get(s, [9.0] * 4), [1] * 4) for s in strengths]

    study = searched(tmp_path / "noise", by([0.5, -0.3, 0.5, -0.3]))  # stderr 0.23
    assert found(study) == 0.01
    assert tuning._completed(study)[0].params["strength"] == 0.00316
    assert found(searched(tmp_path / "clear", by([0.15, 0.05, 0.15, 0.05]))) == 0.00316  # 0.03


def test_what_diverged_is_never_chosen_and_only_smaller_ones_follow(tmp_path):
    evaluate, asked = made(0.00004)
    study = searched(tmp_path, evaluate)
    assert asked == [[0.01], [0.00316], [0.001]]
    trials = tuning.trial_records(study, PLAN, resolve(TuneConfig, {"epochs": EPOCHS}, None))
    assert [t["strength"] for t in trials] == [0.001, 0.00316, 0.01]
    assert [t["pruned"] for t in trials] == [False, False, True]
    assert [t["val_loss"] is None for t in trials] == [False, False, True]
    assert [t["epochs"] for t in trials] == [EPOCHS, EPOCHS, 0]
    assert found(study) == 0.001
    with pytest.raises(NumericsError, match="every strength diverged"):
        searched(tmp_path / "all", made(1e-9)[0])


def test_within_bounds(tmp_path):
    evaluate, asked = made(1e-3)
    searched(tmp_path / "low", evaluate, size=6, bounds=(0.002, 0.02))
    tried = [*itertools.chain(*asked)]
    assert min(tried) == 0.002
    assert len(set(tried)) == 6
    assert all(0.002 <= strength <= 0.02 for strength in tried)
    narrow = searched(tmp_path / "narrow", made(1e-3)[0], size=6, bounds=(0.01, 0.01001))
    assert found(narrow) == 0.01


def test_the_difference_is_of_pairs():
    one = Validation([1.0, 2.0, 4.0], [1, 1, 2])
    other = Validation([0.5, 2.0, 3.0], [1, 1, 2])
    assert one.loss == pytest.approx(11 / 4)
    every = torch.tensor([0.5, 0.0, 1.0, 1.0])  # by term
    mean, stderr = one.above(other)
    assert mean == pytest.approx(every.mean().item())
    blocks = torch.tensor([0.5, 0.0, 2.0]) - torch.tensor([1.0, 1.0, 2.0]) * mean
    assert stderr == pytest.approx(math.sqrt(3 * blocks.var().item()) / 4)
    assert one.above(one) == (0, 0)
    assert Validation([1.0], [9]).above(Validation([2.0], [9])) == (-1, math.inf)


class Killed(BaseException):
    pass


def test_killed_at_any_write_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    evaluate, _ = made(0.02)
    config = resolve(TuneConfig, {}, None)
    truth = tuning.trial_records(searched(tmp_path / "whole", evaluate, size=7), PLAN, config)
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
        left[0] = 1 + kills % 3
        try:
            study = searched(folder, evaluate, size=7)
            break
        except Killed:
            kills += 1
            (folder / f"{tuning.STUDY}.lock").symlink_to("nothing")  # it held the lock
    assert kills > 9
    assert tuning.trial_records(study, PLAN, config) == truth


def test_a_budget_pays_for_what_it_says():
    for budget, cost, size, until in [
        (5, 1.0, 6, 37), (5, 1.5, 4, 37), (5, 2.5, 2, 45), (5, 3.7, 2, 30), (60, 3.0, 7, 45),
    ]:  # fmt: skip
        plan = tuning.plan(budget, cost, EPOCHS)
        assert plan == tuning.Plan(size, until)
        assert sum(plan.rounds()) == size
        assert size * until * cost / EPOCHS <= budget
    assert tuning.plan(5, 1.0, EPOCHS) == tuning.Plan(6, 37)
    assert tuning.plan(5, 1.0, EPOCHS, whole=True) == tuning.Plan(5, EPOCHS)
    with pytest.raises(ConfigError, match=r"give at least --budget 4"):
        tuning.plan(3, 2.0, EPOCHS, whole=True)
    with pytest.raises(ConfigError, match=r"give at least --budget 2\.7"):
        tuning.plan(1, 2.0, EPOCHS)
    assert tuning.plan(2.7, 2.0, EPOCHS) == tuning.Plan(2, 30)
    assert tuning.plan(2, 1.0, 1) == tuning.Plan(2, 1)
    assert [tuning.Plan(n, 1).rounds() for n in (2, 3, 4, 7)] == [
        [1, 1], [1, 1, 1], [1, 2, 1], [1, 2, 2, 1, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reg": ["trace=0.1"]}, "one regularizer"),
        ({"reg": ["trace", "sam"]}, "trace, sam"),
        ({"reg": ["none"]}, "one regularizer"),
        ({"reg": ["trace,weight-decay=0.1"]}, "give --weight-decay beside it"),
        ({"reg": ["weight-decay"]}, "compare --tune weight-decay="),
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


def test_what_acts_late_is_compared_at_the_end():
    """Three quarters on, an average of the last quarter has not begun: all would be alike."""
    for reg, until in (("swa", 45), ("trace,swa=0.25", 45), ("sam", 37)):
        asked = resolve(TuneConfig, {"reg": [reg], "epochs": EPOCHS}, None)
        assert tuning.plan_of(asked, 1.0).until == until


@pytest.mark.parametrize(
    ("reg", "bounds", "strengths"),
    [
        # By the steps that the mean is about of: 100, 31.6, 178, 10, 3.16.
        ("ema", (0.2, 0.9999), [[0.99], [0.968354, 0.994382], [0.9], [0.68354]]),
        ("cutout", (1, 800), [[8], [3, 14], [1], [2]]),
    ],
)
def test_strengths_of_other_scales(tmp_path, reg, bounds, strengths):
    asked = resolve(TuneConfig, {"reg": [reg]}, None)
    scale, asked_for = scale_of(reg), []
    assert asked.bounds() == pytest.approx(bounds)

    def evaluate(some):
        asked_for.append([float(f"{s:.6g}") for s in some])
        for s in some:
            assert scale.strength(scale.place(s)) == s  # to be known again
        far = [scale.distance(s, strengths[2][0]) for s in some]
        return [Validation([x**2, x**2 + 1], [3, 1]) for x in far]

    study = tuning.open_study(tmp_path, {}, lambda: 1.0)
    plan = tuning.Plan(5, EPOCHS)
    tuning.search(study, plan, asked.bounds(), tuning.start(asked), evaluate, scale)
    assert asked_for == strengths
    best = tuning.chosen(study, tuning.start(asked), scale)
    assert tuning.strength_of(best) == strengths[2][0]


def test_of_a_few_whole_numbers_all_are_tried(tmp_path):
    asked = resolve(TuneConfig, {"reg": ["cutout"], "range": "2:5"}, None)
    evaluate, tried = made(4)
    study, first = tuning.open_study(tmp_path, {}, lambda: 1.0), tuning.start(asked)
    plan = tuning.Plan(4, EPOCHS)
    tuning.search(study, plan, asked.bounds(), first, evaluate, scale_of("cutout"))
    assert sorted(itertools.chain(*tried)) == [2, 3, 4, 5]


def test_a_spacing_that_there_is_not():
    with pathlib.Path("mine.py").open("w") as file:
        file.write("class Own:\n    default = 1.0\n    spacing = 'even'\n")
    with pytest.raises(ConfigError, match="is 'even', expected one of log, whole, decay"):
        resolve(TuneConfig, {"reg": ["mine.py:Own"]}, None)


def test_a_strength_that_the_data_have_no_room_for(tmp_path, measured):
    flags = (*TINY[2:], "--epochs", "2", "--reg", "cutout", "--budget", "8", "--out", tmp_path)
    result = invoke("tune", *flags)
    assert result.exit_code == 2, result.output
    assert "cutout=14 erases" in result.stderr
    assert "came to 3, 14: a --range, and another --out" in result.stderr.splitlines()[-1]
    assert_one_line_error(invoke("train", "--reg", "cutout=3.5"), 2, "expected a whole number")


def test_the_usual_range():
    trace = resolve(TuneConfig, {}, None)
    assert (trace.bounds(), tuning.start(trace)) == ((1e-4, 1.0), 0.01)
    assert resolve(TuneConfig, {"reg": ["label-smoothing"]}, None).bounds() == (1e-3, 1.0)
    both = resolve(TuneConfig, {"reg": ["cutout=4,trace"], "range": "0.1:0.5"}, None)
    assert (both.tuned(), both.bounds(), tuning.start(both)) == ("trace", (0.1, 0.5), 0.224)
    run = tuning.planned(both, 0.25, 3)
    assert (run.regularizer, run.until) == ("cutout=4,trace=0.25", 3)
    assert tuning.plain(both).reg == ["none"]


FLAGS = (*TINY[2:], "--epochs", "4", "--reg", "label-smoothing", "--budget", "2.25")


def tuned(out, *flags):
    result = invoke("tune", *FLAGS, "--out", out, "--json", "-", *flags)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(tune, "_step_cost", lambda settings: 1.0)


def test_the_command(tmp_path, measured, monkeypatch):
    """Killed after each run, resumed: one result; its run, gone on with, is `train`'s own."""
    whole, said = tuned("whole")
    check(whole, records.Tuning)
    assert [trial["epochs"] for trial in whole["trials"]] == [3, 3, 3]
    assert whole["spent"] == whole["budget"] == 2.25
    assert "compared after epoch 3 of 4" in said.stderr
    assert f"train with: {whole['command']}" in said.stderr
    train = tune.train_all

    def dies(pending, jobs):
        train(pending, jobs)
        if pending:
            raise KeyboardInterrupt

    monkeypatch.setattr(tune, "train_all", dies)
    for _ in range(2):
        assert invoke("tune", *FLAGS, "--out", "killed").exit_code != 0
    monkeypatch.setattr(tune, "train_all", train)
    place = {"command": None, "run": None}
    assert {**tuned("killed")[0], **place} == {**whole, **place}
    again, said = tuned("killed")
    assert {**again, **place} == {**whole, **place}
    assert "after epoch 3\n" not in said.stderr  # nothing is trained twice

    last = json.loads(pathlib.Path(whole["run"], "metrics.jsonl").read_text().splitlines()[-1])
    assert whole["val_loss"] == pytest.approx(last["val_loss"])
    words = shlex.split(whole["command"])[1:]
    assert invoke(*words, "--out", "alone").exit_code == 0
    assert invoke("train", "--resume", "--out", whole["run"]).exit_code == 0
    one, other = (torch.load(f"{folder}/last.pt", weights_only=True)["state_dict"]
                  for folder in (whole["run"], "alone"))  # fmt: skip
    assert all(torch.equal(one[name], other[name]) for name in one)

    changed = invoke("tune", *FLAGS, "--out", "whole", "--lr", "0.01")
    assert_one_line_error(changed, 2, "lr was 0.05, is 0.01")
    assert "chosen" in invoke("tune", *FLAGS, "--out", "whole").stdout


@pytest.mark.slow
def test_runs_side_by_side_are_the_same(tmp_path, measured):
    one, other = (tuned(f"jobs{jobs}", "--jobs", jobs, "--budget", "3")[0] for jobs in (1, 2))
    assert len(one["trials"]) == 4
    assert one["trials"] == other["trials"]


def test_where_all_diverge_it_is_said(tmp_path, measured):
    result = invoke("tune", *FLAGS, "--lr", "1e30", "--out", "lost")
    assert result.exit_code == 5
    assert "error: every strength diverged" in result.stderr


def test_an_edge_is_said(tmp_path, measured, monkeypatch):
    three = ("--epochs", "1", "--budget", "3")

    def least_at(strength):
        def validation(run):
            far = abs(math.log(float(run.regularizer.rpartition("=")[2]) / strength))
            return Validation([far, far], [1, 1])

        monkeypatch.setattr(tuning, "validation", validation)

    least_at(0.001)
    found, said = tuned("edge", *three)
    assert (found["strength"], found["at_edge"]) == (0.01, True)
    assert "0.01 is at an edge of what was tried" in said.stderr
    least_at(0.03)
    found, said = tuned("inside", *three)
    assert (found["strength"], found["at_edge"]) == (0.0316, False)
    assert "edge" not in said.stderr
