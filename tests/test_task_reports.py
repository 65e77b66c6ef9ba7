"""What is said of runs of every task: summaries, tables, plots, choices, sentences."""

from __future__ import annotations

import copy
import csv
import json
import math
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch

from hesstrace_cli.analysis.evaluation import evaluate, generalization_report
from hesstrace_cli.cli.train import _epoch_line
from hesstrace_cli.comparison import choice, grid
from hesstrace_cli.comparison.found import Found
from hesstrace_cli.comparison.groups import with_settings
from hesstrace_cli.comparison.table import MEASURES, tabulate, write
from hesstrace_cli.config import CompareConfig, TrainConfig, resolve, to_yaml
from hesstrace_cli.data import load_data
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.models import build_model
from hesstrace_cli.reporting import comparisons, plots, tables
from hesstrace_cli.reporting.events import Events
from hesstrace_cli.storage.checkpoints import save_checkpoint
from hesstrace_cli.storage.records import read_summary, selected
from hesstrace_cli.storage.state import FORMAT
from hesstrace_cli.tasks import TASKS
from hesstrace_cli.training.summary import summarize
from tests.conftest import invoke

BEST = {"classification": "accuracy", "tokens": "perplexity", "segmentation": "mean_iou",
        "regression": "rmse", "multilabel": "loss"}  # fmt: skip
DATA = {  # inputs, targets, of 24 examples
    "classification": lambda g: (g.normal(size=(24, 4)), g.integers(0, 3, 24)),
    "tokens": lambda g: (g.integers(0, 5, (24, 6)), g.integers(0, 5, (24, 6))),
    "segmentation": lambda g: (g.normal(size=(24, 1, 4, 4)), g.integers(0, 3, (24, 4, 4))),
    "regression": lambda g: (g.normal(size=(24, 4)), g.normal(size=(24, 2))),
    "multilabel": lambda g: (g.normal(size=(24, 4)), g.integers(0, 2, (24, 3))),
}
MODELS = """
import torch
from torch import nn
def classification(num_classes): return nn.Linear(4, num_classes)
def tokens(num_classes): return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, num_classes))
def segmentation(num_classes): return nn.Conv2d(1, num_classes, 1)
regression = multilabel = classification
"""


def made(name="none", seed=0, task="regression", **more):
    """A summary as a run of the task leaves it, without what the task does not have."""
    kind = TASKS[task]
    # The penalised one is the better by any measure.
    rank = (1 + seed**2 / 50) * (10 if name == "none" else 1)
    metrics = {
        m: 1 / (1 + rank) if higher else 1e-4 * rank for m, higher in kind.higher_is_better.items()
    }
    return {
        "schema": "hesstrace/run/1", "dataset": f"{task}.npz", "model": "m", "regularizers": name,
        "seed": seed, "epochs": 3, "task": task, "selection": kind.selection.as_dict(),
        "num_terms": 9, "train_loss": 1e-5 * rank, "train_accuracy": metrics.get("accuracy"),
        "collapsed": None, "val_loss": 2e-5 * rank, "val_accuracy": metrics.get("accuracy"),
        "test_loss": 3e-5 * rank, "test_accuracy": metrics.get("accuracy"),
        "calibration_error": metrics.get("calibration_error"), "metrics": metrics,
        "train_metrics": metrics, "val_metrics": metrics,
        "trace": {"trace": 2.0 + rank, "stderr": 0.0, "ci95": [1, 2], "num_examples": 9,
                  "num_population": 9, "subset_stderr": 0.0,
                  "per_layer": [{"name": "w", "num_parameters": 2, "trace": 1.0, "stderr": 0.0}]},
        "input_jacobian": None, "top_eigenvalue": None, "trace_penalty": None, "seconds": 1.0,
        "folder": f"{task}/{name}/{seed}", **more,
    }  # fmt: skip


def grid_of(task, **more):
    return [made(name, seed, task, **more) for name in ("none", "trace=0.1") for seed in (0, 1, 2)]


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_says_of_its_metrics_which_is_better(task):
    kind = TASKS[task]
    assert kind.selection.metric == BEST[task]
    assert kind.loss_name
    if kind.selection.metric != "loss":
        better = kind.higher_is_better[kind.selection.metric]
        assert kind.selection.higher_is_better == better
    _, targets = DATA[task](np.random.default_rng(0))
    logits = {"classification": (24, 3), "tokens": (24, 6, 5), "segmentation": (24, 3, 4, 4),
              "regression": (24, 2), "multilabel": (24, 3)}[task]  # fmt: skip
    meter = kind().meter()
    meter.add(torch.randn(logits), torch.as_tensor(targets))
    assert list(meter.result()) == list(kind.higher_is_better)


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_metrics_of_their_task(task, tmp_path):
    comparison = tabulate(grid_of(task))
    none, trace = comparison["rows"]
    metrics = TASKS[task].higher_is_better
    for row in (none, trace):
        assert row["task"] == task
        assert list(row["metrics"]) == list(metrics)
        assert set(MEASURES) <= set(row)
    for m, higher in metrics.items():
        assert set(none["metrics"][m]) == {"mean", "std", "ci95"}
        own = [s["metrics"][m] for s in grid_of(task)]
        assert trace["metrics"][m]["mean"] == pytest.approx(sum(own[3:]) / 3)
        difference = trace["difference_to_none"]["metrics"][m]
        assert difference["mean"] == pytest.approx(sum(own[3:]) / 3 - sum(own[:3]) / 3)
        assert (difference["mean"] > 0) == higher
        assert set(difference) == {"mean", "ci95", "p_value", "p_holm"}
    assert (none["test_accuracy"]["mean"] is None) == ("accuracy" not in metrics)
    assert (none["calibration_error"]["mean"] is None) == ("calibration_error" not in metrics)
    assert {"test_loss", *(m for m in metrics if m != "accuracy")} <= set(trace["wins"])
    assert none["wins"] == []

    upper, lower = tables.comparison_tables(comparison, several=False)
    for table in (upper, lower):
        assert all(len(row) == len(table.head) for row in table.rows)
        assert not any(cell == "-" for cell in table.rows[1][:-1]), table  # the last: step cost
    assert ("test accuracy" in upper.head) == ("accuracy" in metrics)
    chosen = BEST[task].replace("_", " ")
    assert f"{chosen} - none" in upper.head
    assert "loss - none" in upper.head
    assert "0.0000" not in str(upper.rows)

    write(tmp_path, comparison, "")
    (first, second) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert first["task"] == task
    assert None not in first
    for m in set(metrics) - {"accuracy"}:
        assert float(first[f"{m}_mean"]) == pytest.approx(none["metrics"][m]["mean"])
    assert first["test_loss_minus_none"] == ""
    for m in set(metrics) - {"accuracy"} | {"test_loss"}:
        named = trace["difference_to_none"]
        difference = named[m] if m in named else named["metrics"][m]
        parts = (difference["mean"], *difference["ci95"], difference["p_value"],
                 difference["p_holm"])  # fmt: skip
        names = ("", "_low", "_high", "_p", "_p_holm")
        assert [float(second[f"{m}_minus_none{n}"]) for n in names] == pytest.approx(parts)
    assert len(set(first)) == len((tmp_path / "results.csv").read_text().split("\n")[0].split(","))


def test_tasks_do_not_meet_in_a_table_or_plot(tmp_path):
    mixed = [run for task in TASKS for run in grid_of(task)]
    comparison = tabulate(mixed)
    found = tables.comparison_tables(comparison, several=True)
    assert len(found) == 2 * len(TASKS)
    for task, table in zip(TASKS, found[::2], strict=True):
        assert table.title.startswith(f"{task}: ")
        assert all(row[0].startswith(f"{task}.npz") for row in table.rows)
    write(tmp_path, comparison, "")
    names = list(plotted(with_epochs(mixed, tmp_path)))
    assert len(names) == 4 * len(TASKS)
    for one, other in [("tokens", "regression"), ("classification", "multilabel")]:
        pair = [made(task=one), {**made("sam", task=other), "dataset": f"{one}.npz"}]
        with pytest.raises(ConfigError, match="different tasks"):
            tabulate(pair)


def test_a_row_without_a_finished_run_tells_no_task():
    note = {"dataset": "d", "model": "m", "regularizers": "trace=9", "seed": 0, "folder": "f"}
    comparison = tabulate([], [note])
    (row,) = comparison["rows"]
    assert (row["task"], row["metrics"], row["selection"]) == (None, {}, None)
    for table in tables.comparison_tables(comparison, several=False):
        assert all(len(cells) == len(table.head) for cells in table.rows)


def test_a_summary_of_before_has_its_accuracy():
    old = {"task", "selection", "metrics", "train_metrics", "val_metrics", "val_loss", "num_terms"}
    runs = [{k: v for k, v in run.items() if k not in old} for run in grid_of("classification")]
    (none, trace) = tabulate(runs)["rows"]
    assert none["task"] == "classification"
    assert none["metrics"]["accuracy"] == none["test_accuracy"]
    assert none["metrics"]["balanced_accuracy"]["mean"] is None
    assert trace["difference_to_none"]["test_accuracy"]["mean"] is not None
    assert selected(runs[0], "val", "accuracy") == runs[0]["val_accuracy"]
    assert comparisons.plot_metric(runs).axes[0].get_ylabel() == "test accuracy"
    shown = [row[0] for row in tables.summary_table("t", runs[0]).rows[1:6]]
    assert shown == ["test accuracy", "test loss", "train accuracy", "train loss",
                     "validation accuracy"]  # fmt: skip


def with_epochs(runs, folder, **changes):
    """The summaries with folders that hold the metrics of three epochs."""
    found = []
    for number, run in enumerate(runs):
        place = folder / f"run{number}"
        place.mkdir()
        lines = [
            json.dumps({"epoch": e, "train_loss": run["train_loss"] / e, "val_loss": 0.5 / e,
                        "val_metrics": run["val_metrics"], **changes})
            for e in (1, 2, 3)
        ]  # fmt: skip
        (place / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        found.append({**run, "folder": str(place)})
    return found


def plotted(runs):
    """The figures of a comparison by name, no name twice."""
    found = comparisons.of_comparison(tabulate(runs), runs)
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("task", TASKS)
def test_plots_show_what_the_task_picks_by(task, tmp_path):
    figures = plotted(with_epochs(grid_of(task), tmp_path))
    name = BEST[task].replace("_", "-")
    assert list(figures) == ["differences.png", f"{name}-trace.png", "curves.png", "layers.png"]
    label = BEST[task].replace("_", " ")
    axes = figures[f"{name}-trace.png"].axes[0]
    assert axes.get_ylabel() == f"test {label}"
    truth = [selected(s, "test", BEST[task]) for s in grid_of(task)]
    shown = [y for points in axes.collections for _, y in points.get_offsets().tolist()]
    assert shown == pytest.approx(truth)
    left, right = figures["curves.png"].axes
    assert right.get_ylabel() == f"validation {label}"
    assert left.get_ylabel().startswith("training loss")
    assert len(right.lines) == 2
    for file, figure in figures.items():
        plots.save(figure, str(tmp_path / file))


def test_what_is_nowhere_known_leaves_its_panel_out(tmp_path):
    unknown = {"trace": None, "stderr": None, "ci95": None, "reason": "x", "per_layer": []}
    for task in TASKS:
        folder = tmp_path / task
        folder.mkdir()
        runs = with_epochs(grid_of(task), folder, val_loss=None, val_metrics=None)
        (only,) = comparisons.plot_curves(runs).axes
        assert only.get_ylabel().startswith("training loss")
        runs = [{**run, "trace": unknown} for run in runs]
        assert list(plotted(runs)) == ["differences.png", "curves.png"]
        assert tabulate(runs)["rows"][0]["trace"]["mean"] is None
        tables.summary_table("t", runs[0])
    endless = [
        {**run, "metrics": {"perplexity": None, "accuracy": 0.5}} for run in grid_of("tokens")
    ]
    assert comparisons.plot_metric(endless) is None
    tables.comparison_tables(tabulate(endless), several=False)
    partly = [{**run, "trace": unknown} if run["seed"] else run for run in grid_of("tokens")]
    assert comparisons.plot_layers_by_row(partly) is not None
    assert plotted([]) == {}


@pytest.mark.parametrize("task", TASKS)
def test_a_strength_is_chosen_by_the_metric_of_the_task(task, tmp_path):
    """The better one by that metric, though every other measure says the contrary."""
    config = resolve(CompareConfig, {"out": str(tmp_path), "reg": ["trace"], "seeds": [0, 1],
                                     "tune": ["trace=0.1:0.2:0.3"]}, None)  # fmt: skip
    runs = grid.plan(config)
    best, higher = BEST[task], TASKS[task].selection.higher_is_better
    for run in runs:
        good = run.regularizer == "trace=0.2"
        val = {m: 0.1 if good == up else 0.9 for m, up in TASKS[task].higher_is_better.items()}
        val_loss = 9.0 if good else 1.0
        value = 0.9 if good == higher else 0.1
        if best == "loss":
            val_loss = value
        else:
            val[best] = value
        if run.regularizer == "trace=0.3":  # the best of all, but for the seed that has no number
            val = dict.fromkeys(val, None if run.config.seed else (1.0 if higher else 0.0))
            val_loss = None if run.config.seed else 0.0
        summary = made(run.regularizer, run.config.seed, task, val_metrics=val, val_loss=val_loss,
                       val_accuracy=val.get("accuracy"))  # fmt: skip
        run.folder.path.mkdir(parents=True)
        (run.folder.path / "summary.json").write_text(json.dumps(summary))
        assert read_summary(run.folder.path / "summary.json") == summary
    assert {run.regularizer for run in choice.choose_strengths(runs)} == {"trace=0.2"}
    assert choice.chosen_by(runs) == [best]


@pytest.mark.parametrize("task", TASKS)
def test_the_line_of_an_epoch_and_tensorboard(task, tmp_path):
    run = made(task=task)
    metrics = dict.fromkeys(run["metrics"], 0.75)
    record = {"epoch": 1, "train_loss": 0.5, "val_loss": 0.25, "val_accuracy": 0.5,
              "val_metrics": metrics, "penalty_trace": None}  # fmt: skip
    value = "0.2500" if task == "multilabel" else "0.7500"
    line = _epoch_line(record, 3, BEST[task])
    assert line == f"epoch 1/3 loss 0.5000 val {BEST[task].replace('_', ' ')} {value}"
    without = {k: v for k, v in record.items() if not k.startswith("val")}
    assert _epoch_line(without, 3, BEST[task]) == "epoch 1/3 loss 0.5000"
    events = Events(tmp_path / "e")
    events.add(record)
    assert list((tmp_path / "e").iterdir())


@pytest.mark.parametrize("task", TASKS)
def test_a_summary_table_has_the_metrics(task):
    table = tables.summary_table("t", made(task=task))
    names = [row[0] for row in table.rows]
    for split in ("test", "train", "validation"):
        own = [n for n in names if n.startswith(f"{split} ")]
        shown = [m for m in TASKS[task].higher_is_better if m not in tables._BESIDE]
        assert own == [f"{split} {m.replace('_', ' ')}" for m in shown] + [f"{split} loss"]


@pytest.fixture
def at(tmp_path):
    """Makes a data set, a checkpoint of a model that was not trained, and a run's folder of it."""
    (tmp_path / "models.py").write_text(MODELS)

    def place(task, name="none", seed=0, **settings):
        inputs, targets = DATA[task](np.random.default_rng(1))
        kind = np.int64 if inputs.dtype.kind == "i" else np.float32
        targets = targets.astype(np.float32) if task == "regression" else targets
        file = tmp_path / f"{task}.npz"
        np.savez(file, x_train=inputs.astype(kind), y_train=targets,
                 x_test=inputs[:9].astype(kind), y_test=targets[:9])  # fmt: skip
        folder = tmp_path / "runs" / f"{task}-{name}-{seed}"
        folder.mkdir(parents=True)
        given = "multilabel" if task == "multilabel" else "auto"
        config = TrainConfig(**{
            "model": f"{tmp_path / 'models.py'}:{task}", "dataset": str(file), "seed": seed,
            "task": given, "reg": [name], "out": str(folder), "batch_size": 8,
            "val_fraction": 0.25, **settings,
        })  # fmt: skip
        data = load_data(config, torch.device("cpu"))
        model = build_model(config.model, num_classes=data.num_classes, in_shape=data.in_shape,
                            model_args={}, seed=seed)  # fmt: skip
        content = {"format": FORMAT, "state_dict": model.state_dict(), "config": asdict(config)}
        save_checkpoint(folder / "last.pt", content)
        (folder / "config.yaml").write_text(to_yaml(config))
        return folder, config, data, model

    return place


@pytest.mark.parametrize("task", TASKS)
def test_real_summaries_are_collected(task, at, tmp_path):
    for seed in (0, 1):
        for name in ("none", "trace=0.1"):
            folder, config, data, model = at(task, name, seed)
            summary = {
                "schema": "hesstrace/run/1", "regularizers": name,
                **summarize(model, data, config, folder / "last.pt", partial(copy.deepcopy, model)),
                "trace_penalty": None, "seconds": 1.0,
            }  # fmt: skip
            assert finite(summary)
            assert summary["task"] == task
            assert summary["val_loss"] == evaluate(model, data.val, 256).loss
            (folder / "summary.json").write_text(json.dumps(summary, allow_nan=False))
            (folder / "metrics.jsonl").write_text('{"epoch": 1, "train_loss": 0.5}\n')
            tables.summary_table("t", summary)
    assert (summary["input_jacobian"] is None) == (task == "tokens")
    assert (summary["test_accuracy"] is None) == (task == "regression")
    result = invoke("compare", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "runs/results.json").read_text())["rows"]
    assert [row["task"] for row in rows] == [task, task]
    assert rows[0]["metrics"][next(iter(rows[0]["metrics"]))]["mean"] is not None
    shown = next(m for m in TASKS[task].higher_is_better).replace("_", " ")
    assert shown in result.stdout
    assert (tmp_path / "runs" / f"{BEST[task].replace('_', '-')}-trace.png").is_file()


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_of_an_estimate_is_named(task, at, tmp_path):
    folder, config, *_ = at(task)
    flags = (folder / "last.pt", "--model", config.model)
    report = ("--report", "--json", tmp_path / "t.json")
    result = invoke("estimate-trace", *flags)
    assert result.exit_code == 0, result.output
    assert f"of the mean {TASKS[task].loss_name} over" in " ".join(result.stderr.split())
    column = "accuracy" if BEST[task] == "loss" else BEST[task].replace("_", " ")
    assert set(column.split()) <= set(result.stdout.split())  # words of a head may be wrapped
    said = result.stderr.count(f"--task auto takes {task}: ")
    assert said == (task not in ("classification", "multilabel"))
    terms = "the 108 terms that count of 18 examples" if task == "tokens" else "18 examples"
    assert terms in " ".join(result.stderr.split())

    result = invoke("estimate-trace", *flags, *report)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["task"] == task
    assert record["selection"] == TASKS[task].selection.as_dict()
    gap = record["report"]
    assert (gap["accuracy_gap"] is None) == (task == "regression")
    assert gap["generalization_gap"] == gap["test_loss"] - gap["train_loss"]
    for metric in TASKS[task].higher_is_better:
        assert metric in gap["metrics"]
    again = invoke("estimate-trace", *flags, folder / "last.pt", "--json", "-")
    assert json.loads(again.stdout)["schema"] == "hesstrace/traces/1"
    assert again.stderr.count("--task auto takes") == said  # once, of several checkpoints


def test_a_report_holds_no_number_that_json_cannot(at):
    _, _, data, model = at("tokens")
    with torch.no_grad():
        model[1].weight *= 1e30
    report = generalization_report(model, data, data.train, 8, 1.0)
    assert report["metrics"]["perplexity"] is None
    json.dumps(report, allow_nan=False)
    record = {"report": report, "curvature": "hessian", "trace": 1.0, "stderr": 0.0,
              "split": "train", "num_examples": 1, "num_population": 1,
              "checkpoint": "c"}  # fmt: skip
    assert "perplexity" in [row[0] for row in tables.report_table(record).rows]


def test_checkpoints_of_several_tasks_have_a_column_each(at):
    folders = {task: at(task) for task in ("classification", "regression")}
    records = []
    for folder, config, *_ in folders.values():
        result = invoke(
            "estimate-trace", folder / "last.pt", "--model", config.model, "--json", "-"
        )
        records.append(json.loads(result.stdout))
    table = tables.trace_table(records)
    assert table.head[4:6] == ("accuracy", "rmse")
    assert [row[4:6][::-1][i] for i, row in enumerate(table.rows)] == ["-", "-"]


def test_class_weights_stand_in_the_sentence(at):
    folder, config, *_ = at("classification", class_weights="1,2,0.5")
    result = invoke("estimate-trace", folder / "last.pt", "--model", config.model)
    assert "mean class-weighted cross-entropy over" in " ".join(result.stderr.split())


def test_the_other_commands_say_what_auto_took(at, monkeypatch):
    folder, config, *_ = at("regression")
    line = "--task auto takes regression: targets of shape (24, 2) and type float32"
    spectrum = invoke("spectrum", folder / "last.pt", "--model", config.model, "--top", "1",
                      "--steps", "3", "--lr", "0.1")  # fmt: skip
    assert spectrum.exit_code == 0, spectrum.output
    assert spectrum.stderr.count(line) == 1
    verified = invoke("verify", "--model", config.model, "--dataset", config.dataset, "--json", "-")
    assert verified.stderr.count(line) == 1, verified.output
    assert json.loads(verified.stdout)["task"] == "regression"


@pytest.mark.parametrize(
    ("key", "values"),
    [("class_weights", (None, "balanced")), ("ignore_index", (-100, 255))],
)  # fmt: skip
def test_runs_of_other_tasks_or_weights_are_compared_apart(key, values, tmp_path):
    runs = []
    for number, value in enumerate(values):
        folder = tmp_path / "r" / str(number)
        folder.mkdir(parents=True)
        settings = {key: value} if value is not None else {}
        config = TrainConfig(dataset="multilabel.npz", model="m", out=str(folder), seed=number,
                             **settings)  # fmt: skip
        (folder / "config.yaml").write_text(to_yaml(config))
        run = made("none", number, "multilabel", folder=str(folder))
        (folder / "summary.json").write_text(json.dumps(run))
        runs.append(run)
    result = invoke("compare", tmp_path / "r")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "r/results.json").read_text())
    name = key.replace("_", "-")
    assert [s[name] for s in record["settings"]] == list(values)
    assert [row["num_seeds"] for row in record["rows"]] == [1, 1]


def test_data_that_changed_under_auto_is_found(tmp_path):
    runs = []
    for number, task in enumerate(("multilabel", "regression")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.yaml").write_text(to_yaml(TrainConfig(dataset="x.npz", model="m")))
        runs.append({**made("none", number, task, folder=str(folder)), "dataset": "x.npz"})
    rows = tabulate(with_settings(Found(runs, [], [])).finished)["rows"]
    assert [(row["task"], row["group"]) for row in rows] == [("multilabel", 0), ("regression", 1)]


@pytest.mark.parametrize("task", TASKS)
def test_the_other_commands_take_every_task(task, at, tmp_path):
    folder, config, *_ = at(task)
    flags = (folder / "last.pt", "--model", config.model, "--json", "-")
    trace = json.loads(invoke("estimate-trace", *flags, "--per-layer").stdout)
    assert trace["stderr"] == 0
    spectrum = invoke(
        "spectrum", *flags, "--steps", "30", "--num-probes", "2", "--slice", "1",
        "--slice-points", "3", "--lr", "0.1", "--plot", tmp_path / "s.png",
    )  # fmt: skip
    assert spectrum.exit_code == 0, spectrum.output
    found = json.loads(spectrum.stdout)
    assert (found["task"], found["loss"]) == (task, pytest.approx(trace["loss"], rel=1e-5))
    assert 0 < found["eigenvalues"][0] < 1.01 * trace["trace"]
    assert found["flatness"]["plain"]["worst"] > 0
    assert (tmp_path / "s.png").is_file()
    bits = invoke("sensitivity", *flags, "--average-bits", "4", "--check", "--all-weights")
    assert bits.exit_code == 0, bits.output
    record = json.loads(bits.stdout)
    assert record["task"] == task
    own = {each["name"]: each["trace"] for each in trace["per_layer"]}
    for weight in record["weights"]:
        assert weight["trace"] == pytest.approx(own[weight["name"]], rel=1e-5)
