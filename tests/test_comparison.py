"""The grid, its choices, and the statistics of its table."""

from __future__ import annotations

import importlib
import json
import math
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from hesstrace_cli.analysis.estimation import top_eigenvalue
from hesstrace_cli.analysis.evaluation import evaluate
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.comparison import grid
from hesstrace_cli.comparison.table import holm, paired_difference, tabulate
from hesstrace_cli.config import CompareConfig, resolve
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.training import cost
from hesstrace_cli.training.cost import StepCost
from tests.conftest import TINY, invoke, make_run, train_to_end
from tests.curvature import oracles
from tests.curvature.zoo import make

compare = importlib.import_module("hesstrace_cli.cli.compare")  # the name is its command's, too


def config(**settings):
    return resolve(CompareConfig, settings, None)


def summary(name, seed, loss, accuracy=0.9, **more):
    return {
        "dataset": "digits", "model": "mlp", "regularizers": name, "seed": seed,
        "test_accuracy": accuracy, "test_loss": loss, "train_loss": 0.1,
        "trace": {"trace": 2.0, "stderr": 0.3}, "calibration_error": 0.01, "folder": "f", **more,
    }  # fmt: skip


def test_holm():
    p = [0.01, 0.04, None, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, None, 0.06, 0.02], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_paired_difference_is_the_t_test():
    g = np.random.default_rng(0)
    a, b = dict(enumerate(g.normal(size=6))), dict(enumerate(g.normal(size=6)))
    result, truth = paired_difference(a, b), stats.ttest_rel(list(a.values()), list(b.values()))
    assert result["p_value"] == pytest.approx(truth.pvalue)
    assert result["ci95"] == pytest.approx(list(truth.confidence_interval(0.95)))


def test_winners_only_where_the_difference_is_real():
    clear = [0.5, 0.51, 0.49, 0.5]
    rows = [summary("none", s, loss) for s, loss in enumerate(clear)]
    rows += [summary("trace=1", s, loss - 0.2 + 0.001 * s) for s, loss in enumerate(clear)]
    rows += [summary("sam=1", s, loss - 0.05 * (s % 2)) for s, loss in enumerate(clear)]
    none, trace, sam = tabulate(rows)["rows"]
    assert (none["wins"], trace["wins"], sam["wins"]) == ([], ["test_loss"], [])
    differences = [trace["difference_to_none"], sam["difference_to_none"]]
    plain = [d["test_loss"]["p_value"] for d in differences]
    assert [d["test_loss"]["p_holm"] for d in differences] == holm(plain)
    assert none["generalization_gap"]["mean"] == pytest.approx(0.4)
    assert none["trace"]["stderr"] == pytest.approx(0.3 / 2)
    close = [summary("none", s, loss) for s, loss in enumerate(clear)]
    close += [summary("trace=1", s, loss - 0.01 * (s % 3 - 1)) for s, loss in enumerate(clear)]
    assert all(row["wins"] == [] for row in tabulate(close)["rows"])


def test_runs_that_diverged_have_their_row():
    note = {"dataset": "digits", "model": "mlp", "regularizers": "trace=9", "seed": 0}
    none, diverged = tabulate([summary("none", 0, 0.5)], [note])["rows"]
    assert (none["num_diverged"], diverged["num_diverged"], diverged["num_seeds"]) == (0, 1, 0)
    assert diverged["test_loss"]["mean"] is None


def test_a_steps_cost_is_of_its_own_model(monkeypatch, tmp_path):
    def rows(costs, *models):
        runs = [summary(name, 0, 0.5, model=m) for m in models for name in ("none", "trace=1")]
        return [row["step_cost"] for row in tabulate(runs, (), costs)["rows"]]

    def timed(configs):
        return {name: StepCost(len(c.model) / 3, 1.0) for name, c in configs.items()}

    monkeypatch.setattr(cost, "step_costs", timed)
    runs = grid.plan(config(reg=["none", "trace=1"], model="mlp,lenet5", seeds=[0]))
    costs = compare._step_costs(tmp_path, runs, measure=True)
    assert compare._read_costs(tmp_path) == costs
    assert rows(costs, "mlp", "lenet5") == [1, 1, 1, 2]
    by_name = {"none": 1.0, "trace=1": 4.0}  # as once, of the last model alone
    assert rows(by_name, "mlp") == [1, 4]
    assert rows(by_name, "mlp", "lenet5") == [None] * 4


def test_calibration_error():
    class Known(torch.nn.Module):
        def forward(self, X):
            return X.log()

    p = torch.tensor([[0.9, 0.1], [0.92, 0.08], [0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 1])  # right, wrong; right; wrong
    split = TensorSplit(p, y, Preprocess(), torch.float64)
    truth = (abs(1 - 0.9 - 0.92) + abs(1 - 0.7) + 0.6) / 4
    found = evaluate(Known(), split, 3)
    assert found.metrics["calibration_error"] == pytest.approx(truth)


def test_top_eigenvalue():
    model, X, y = make("gelu", train=False)
    H = oracles.dense_hessian(Objective(model, trainable(model)), X, y)
    split = TensorSplit(X, y, Preprocess(), torch.float64)
    truth = torch.linalg.eigvalsh(H)[-1].item()
    assert top_eigenvalue(model, split, 4, 0) == pytest.approx(truth, rel=1e-3)


def test_plan_is_the_whole_grid():
    runs = grid.plan(config(
        reg=["none", "trace", "sam=0.1"], tune=["trace=0.1:0.2"], seeds=[0, 1],
        model="mlp,small-cnn",
    ))  # fmt: skip
    assert len(runs) == 2 * 2 * 4
    assert len({run.config.out for run in runs}) == len(runs)
    for run in runs:
        words = grid.arguments(run.config)
        assert "--resume-or-start" in words
        assert shlex.split(shlex.join(words)) == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tune": ["trace=0.1"], "reg": ["none"]}, "no --reg has it"),
        ({"tune": ["trace=0.1"], "reg": ["trace=0.3"]}, "no --reg has it"),
        ({"tune": ["trace=0.1:0.2", "sam=0.1"], "reg": ["trace", "sam"]}, "as many"),
        ({"tune": ["trace"], "reg": ["trace"]}, "NAME=V1"),
        ({"tune": ["trace=a:b"], "reg": ["trace"]}, "'a'"),
        ({"tune": ["trace=0.1:0.2"], "reg": ["trace"], "val_fraction": 0}, "validation"),
        ({"tune": ["trace=0.1:0.2"], "reg": ["trace,val-fraction=0"]}, "val-fraction=0 has none"),
        ({"tune": ["val-fraction=0.1:0.2"], "reg": ["val-fraction"]}, "every val-fraction has"),
        ({"tune": ["train-examples=50:60"], "reg": ["train-examples"]}, "train-examples has"),
        ({"reg": ["trace=0.1", "trace"], "lambda_": 0.1}, "same"),
        ({"reg": ["trace"], "lambda_": 0.3, "tune": ["trace=0.1:0.2"]}, "--lambda is given"),
    ],
)
def test_what_cannot_be_planned(settings, words):
    with pytest.raises(ConfigError, match=words):
        config(**settings)


@pytest.mark.slow
def test_side_by_side_is_the_same_as_one_by_one(tmp_path):
    """Tuned, planned, diverging, stopped and collected: the same results in the end."""
    flags = (
        *TINY, "--reg", "none", "--reg", "trace", "--reg", "trace=1e30", "--warmup", "0",
        "--tune", "trace=0.001:0.01", "--seeds", "0,1",
    )  # fmt: skip
    one = invoke("compare", *flags, "--out", tmp_path / "one")
    assert one.exit_code == 0, one.output
    assert "chosen by validation accuracy" in one.stderr
    two = invoke("compare", *flags, "--jobs", "2", "--out", tmp_path / "two")
    assert two.exit_code == 0, two.output

    def rows(name):
        found = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        return [(r["regularizer"], r["num_diverged"], r["test_loss"], r["trace"]) for r in found]

    assert rows("one") == rows("two")
    assert [r[1] for r in rows("one")] == [0, 0, 2]
    for name in ("accuracy-trace.png", "curves.png", "layers.png", "results.csv", "results.md"):
        assert (tmp_path / "one" / name).stat().st_size > 0
    costs = [
        r["step_cost"] for r in json.loads((tmp_path / "one/results.json").read_text())["rows"]
    ]
    assert costs[0] == 1
    assert costs[1] > 0
    plan = invoke("compare", *flags, "--out", tmp_path / "one", "--plan").stdout.splitlines()
    assert len(plan) == 8
    done = invoke(*shlex.split(plan[0])[1:])
    assert done.exit_code == 0, done.output
    assert "nothing to do" in done.stderr
    before = rows("one")
    assert invoke("compare", tmp_path / "one").exit_code == 0  # collects the chosen strength alone
    assert sorted(rows("one"), key=str) == sorted(before, key=str)


def test_a_half_written_run_goes_on(tmp_path):
    flags = (*TINY, "--reg", "none", "--seeds", "0", "--out", tmp_path / "c")
    plan = shlex.split(invoke("compare", *flags, "--plan").stdout)[1:]
    assert invoke(*plan).exit_code == 0
    folder = tmp_path / "c" / "runs" / "digits-small-cnn-none-seed0"
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "half')
    assert invoke("compare", *flags).exit_code == 0
    assert (folder / "summary.json").is_file()
    assert math.isfinite(json.loads((tmp_path / "c/results.json").read_text())["rows"][0][
        "test_loss"]["mean"])  # fmt: skip


def finished_rows(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [
        {k: v for k, v in row.items() if k not in ("step_cost", "runs")} for row in rows
    ]  # fmt: skip


@pytest.mark.slow
def test_plan_through_a_shell_and_a_kill_in_the_middle(tmp_path):
    flags = [*TINY, "--reg", "none", "--reg", "trace=0.01", "--seeds", "0,1"]
    assert invoke("compare", *flags, "--out", tmp_path / "a").exit_code == 0
    program = shlex.join([sys.executable, "-m", "hesstrace_cli"])
    plan = invoke("compare", *flags, "--out", tmp_path / "b", "--plan").stdout
    script = plan.replace("hesstrace train", f"{program} train")
    subprocess.run(["sh", "-e", "-c", script], check=True, capture_output=True)
    assert invoke("compare", *flags, "--out", tmp_path / "b").exit_code == 0
    assert finished_rows(tmp_path / "b") == finished_rows(tmp_path / "a")

    command = [*shlex.split(program), "compare", *flags, "--out", str(tmp_path / "c")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "1/4" in process.stderr.readline()
        second = invoke("compare", *flags, "--out", tmp_path / "c")
        assert second.exit_code == 2
        assert "in use by another process" in second.stderr
        process.kill()
    assert invoke("compare", *flags, "--out", tmp_path / "c").exit_code == 0
    assert finished_rows(tmp_path / "c") == finished_rows(tmp_path / "a")


def test_a_run_folder_in_use_is_refused(tmp_path):
    run = make_run(tmp_path / "r")
    again = invoke("train", *TINY, "--out", tmp_path / "r", "--resume", "--epochs", "2")
    assert again.exit_code == 2
    run.lock.release()


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("compare", *TINY, "--out", tmp_path / "file" / "c")
    assert result.exit_code == 2
    assert "cannot be used" in result.stderr


def test_strength_zero_is_the_plain_run(tmp_path):
    runs = [train_to_end(tmp_path / reg, reg=reg) for reg in ("none", "cutout=0", "trace=0")]
    for other in runs[1:]:
        for key, value in runs[0].trainer.model.state_dict().items():
            assert torch.equal(value, other.trainer.model.state_dict()[key])
