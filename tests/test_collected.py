"""Tables of what is at hand: other settings, unfinished grids, collapsed networks, subsets."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil

import pytest
import torch

from hesstrace_cli.comparison.found import PLANNED, Found, collect
from hesstrace_cli.comparison.groups import with_settings
from hesstrace_cli.config import TrainConfig, to_yaml
from hesstrace_cli.curvature.statistics import StratifiedMean
from hesstrace_cli.reporting import tables
from hesstrace_cli.reporting.apart import key, settings_text
from hesstrace_cli.storage.resume import PLACE
from hesstrace_cli.tasks import Classification
from hesstrace_cli.tasks.classification import collapse
from tests.conftest import TINY, assert_one_line_error, invoke


def a_run(folder, name="none", **settings):
    """A run's folder, its config alone; its description."""
    folder.mkdir(parents=True)
    config = TrainConfig(**{"reg": [name], "out": str(folder), **settings})
    (folder / "config.yaml").write_text(to_yaml(config))
    return {"dataset": "digits", "model": "mlp", "regularizers": name, "folder": str(folder)}


def another(item):
    """Another value of a setting than its default."""
    default = getattr(TrainConfig(), item.name)
    known = {
        "schedule": "step", "optimizer": "adamw", "augment": "crop-flip", "precision": "bf16",
        "estimator": "hutchinson", "dropout_scheme": "entry", "curvature": "ggn", "init": "x.pt",
        "mean": [0.5], "std": [0.5], "model": "mlp", "dataset": "mnist", "model_arg": {"width": 4},
        "device": "cuda", "data_dir": "d", "num_classes": 12, "image_size": 9, "train_examples": 50,
        "keep_prob": 0.25, "momentum": 0.5, "task": "multilabel", "class_weights": "balanced",
        "ignore_index": 255, "form": "example", "penalty_examples": 0.5, "draw": "labels",
        "tokens": "char",
    }  # fmt: skip
    if item.name in known:
        return known[item.name]
    others = [choice for choice in item.metadata["choices"] if choice != default]
    if others:
        return others[0]
    if default is None:
        return {"int": 3, "float": 0.5}.get(str(item.type).split()[0], "word")
    return not default if isinstance(default, bool) else (default or 0) + type(default or 0)(2) / 4


COMMON = [
    item for item in dataclasses.fields(TrainConfig)
    if item.name not in (*PLACE, "reg", "lambda_", "seed", "mean", "std", "fd_step")
]  # fmt: skip


def grouped(*runs):
    """The rows' names of each group of runs."""
    groups = {}
    for run in with_settings(Found([], runs, [])).diverged:
        groups.setdefault(key(run), []).append(run["regularizers"])
    return list(groups.values())


@pytest.mark.parametrize("item", COMMON, ids=lambda item: item.name)
def test_every_setting_is_compared(tmp_path, item):
    value = another(item)
    value = int(value + 1) if item.type == "int" else value
    one = a_run(tmp_path / "a")
    other = a_run(tmp_path / "b", "trace=1.0", **{item.name: value})
    third = a_run(tmp_path / "c", "trace=1.0")
    name = item.name.replace("_", "-")
    if item.metadata["panel"] == "Trace penalty":  # a row's own
        assert grouped(one, other) == grouped(one, third) == [["none", "trace=1.0"]]
        usual = getattr(TrainConfig(), item.name)
        names = [f"trace=1.0 ({name}={v})" for v in (value, usual)]
        assert grouped(one, other, third) == [["none", *names]]
    else:
        assert grouped(one, other, third) == [["none", "trace=1.0"], ["trace=1.0"]]
    assert len(grouped(one, a_run(tmp_path / "d", "trace=1.0", seed=3, device="cuda"))) == 1
    assert len(grouped(one, a_run(tmp_path / "e", "trace=1.0", label_noise=0.0))) == 1


def test_settings_of_a_regularizer_are_its_rows(tmp_path):
    name = "grad-norm-fd=1.0"
    runs = [a_run(tmp_path / reg / str(step), reg, fd_step=step)
            for reg in ("none", "trace=1.0", name) for step in (0.1, 0.5)]  # fmt: skip
    assert grouped(*runs) == [
        ["none"] * 2 + ["trace=1.0"] * 2 + [f"{name} (fd-step={step})" for step in (0.1, 0.5)]
    ]


def test_runs_of_other_settings_are_compared_apart(tmp_path):
    """Planted: each group's rows against its own plain network, as if the other were not there."""
    flags = TINY[2:]
    for epochs in (1, 2):
        for seed in (0, 1):
            for reg in ("none", "label-smoothing=0.1"):
                out = tmp_path / f"r/{epochs}/{reg}-{seed}"
                result = invoke("train", *flags, "--epochs", epochs, "--seed", seed, "--reg", reg,
                                "--out", out)  # fmt: skip
                assert result.exit_code == 0, result.output
    result = invoke("compare", tmp_path / "r")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "r/results.json").read_text())
    assert [s["epochs"] for s in content["settings"]] == [1, 2]
    assert all(s["train-examples"] == 100 for s in content["settings"])
    together = {}
    for row in content["rows"]:
        assert row["settings"] == {"epochs": row["group"] + 1}
        assert all(f"/{row['group'] + 1}/" in run for run in row["runs"])
        together.setdefault(row["group"], []).append({**row, "group": 0, "settings": {}})
    for epochs in (1, 2):
        assert invoke("compare", tmp_path / f"r/{epochs}").exit_code == 0
        alone = json.loads((tmp_path / f"r/{epochs}/results.json").read_text())
        assert together[epochs - 1] == alone["rows"]
        assert len(alone["settings"]) == 1
        assert alone["rows"][1]["difference_to_none"]["test_loss"]["mean"] is not None
    lines = list(csv.DictReader((tmp_path / "r/results.csv").read_text().splitlines()))
    assert [line["strength label-smoothing"] for line in lines] == ["", "0.1"] * 2
    assert [line["setting epochs"] for line in lines] == ["1", "1", "2", "2"]
    for text in (result.stdout, (tmp_path / "r/results.md").read_text()):
        assert "epochs 1: mean" in text
        assert "epochs 2: mean" in text
    for text in (result.stderr, (tmp_path / "r/results.md").read_text()):
        assert "2 groups of runs differ in epochs" in text
        assert "train-examples 100" in text
    for name in ("curves-epochs-1.png", "curves-epochs-2.png"):
        assert (tmp_path / "r" / name).is_file()
    both = invoke("compare", tmp_path / "r/1", tmp_path / "r/2")
    assert both.stdout == result.stdout
    (tmp_path / "r/1/none-0/config.yaml").unlink()
    assert_one_line_error(invoke("compare", tmp_path / "r"), 2, "no config.yaml")


def test_a_run_that_is_planned_is_of_its_comparison(tmp_path):
    begun = a_run(tmp_path / "c/runs/a", epochs=7)
    elsewhere = a_run(tmp_path / "d/runs/a", epochs=9)
    planned = {"dataset": "digits", "model": "mlp", "regularizers": "sam=1",
               "folder": str(tmp_path / "c/runs/b"), "comparison": str(tmp_path / "c")}  # fmt: skip
    found = with_settings(Found([], [elsewhere, begun], [planned]))
    assert key(found.unfinished[0]) == key(
        {"settings": {**found.diverged[1]["settings"], "model": "mlp"}}
    )


def test_an_unfinished_grid_says_how_far_it_is(tmp_path):
    out = tmp_path / "c"
    flags = (*TINY, "--reg", "none", "--reg", "trace=0.01", "--seeds", "0,1", "--out", out)
    assert invoke("compare", *flags).exit_code == 0
    whole = invoke("compare", out).stdout
    assert " runs: " not in whole
    (out / "runs" / "digits-small-cnn-none-seed1" / "summary.json").unlink()  # begun
    for seed in (0, 1):  # not begun
        shutil.rmtree(out / "runs" / f"digits-small-cnn-trace0.01-seed{seed}")
    result = invoke("compare", out)
    assert result.exit_code == 0, result.output
    content = json.loads((out / "results.json").read_text())
    assert (content["num_runs"], content["num_unfinished"]) == (4, 3)
    rows = [(r["regularizer"], r["num_seeds"], r["num_unfinished"]) for r in content["rows"]]
    assert rows == [("none", 1, 1), ("trace=0.01", 0, 2)]
    for text in (result.stdout, (out / "results.md").read_text()):
        assert "1 of 4 runs: mean" in text
        assert "1 of 2" in text
        assert "0 of 2" in text
    (out / PLANNED).unlink()  # of an older version, or from a plan
    found = collect(out)
    assert [run["seed"] for run in found.unfinished] == [1]


def test_a_run_that_diverged_and_was_then_finished_by_hand_is_finished(tmp_path):
    a_run(tmp_path / "a")
    place = {"dataset": "digits", "model": "mlp", "regularizers": "none", "seed": 0}
    (tmp_path / "a/diverged.json").write_text(json.dumps(place))
    assert (len(collect(tmp_path).finished), len(collect(tmp_path).diverged)) == (0, 1)
    summary = {
        **place, "epochs": 1, "train_loss": 1.0, "train_accuracy": None, "val_accuracy": None,
        "test_loss": 1.0, "test_accuracy": None, "seconds": 1.0,
        "trace": {"trace": None, "stderr": None, "per_layer": []},
    }  # fmt: skip
    (tmp_path / "a/summary.json").write_text(json.dumps(summary))
    assert (len(collect(tmp_path).finished), len(collect(tmp_path).diverged)) == (1, 0)


def test_the_counts_of_a_row():
    row = {"num_seeds": 3, "num_diverged": 1, "num_unfinished": 6, "num_collapsed": 2}
    assert tables._seeds(row) == "3 of 10 (1 diverged, 2 collapsed)"
    assert tables._seeds({**row, "num_unfinished": 0, "num_collapsed": 0}) == "3 (1 diverged)"


def test_collapse_is_told_from_learning():
    labels = torch.arange(1000) % 10
    log_c = math.log(10)
    assert "shares alone" in collapse(log_c, 0.1, labels)
    assert "shares alone" in collapse(2.31, 0.11, labels)
    assert "shares alone" in collapse(2.269, 0.0985, labels)  # a little is left of the inputs
    assert collapse(2.269, 0.13, labels) is None  # and here it helps
    assert "1e+14" in collapse(1e14, 0.1, labels)
    assert "1e+14" in collapse(1e14, 0.9, labels)
    assert collapse(2.2, 0.1, labels) is None  # a lower loss than any guess has
    assert collapse(2.4, 0.3, labels) is None
    assert collapse(0.1, 0.97, labels) is None
    rare = (torch.arange(1000) % 100 == 0).long()
    entropy = -0.99 * math.log(0.99) - 0.01 * math.log(0.01)
    assert collapse(0.5 * entropy, 0.99, rare) is None
    assert collapse(entropy, 0.99, rare) is not None
    assert collapse(0.0, 1.0, torch.zeros(9)) is None  # one class: nothing to learn


@pytest.mark.parametrize("weights", [None, (0.1, 0.5, 0.02, 0.2, 0.0)])
def test_a_constant_network_of_any_bias_has_collapsed(weights):
    labels = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        bias = torch.randn(5, generator=torch.Generator().manual_seed(seed)).expand(300, 5)
        loss = Classification(class_weights=weights).loss(bias, labels).item()
        accuracy = (bias.argmax(1) == labels).double().mean().item()
        largest = labels.bincount().max().item() / len(labels)
        assert accuracy <= largest
        assert collapse(loss, accuracy, labels, weights) is not None
        assert collapse(loss / 3, accuracy, labels, weights) is None


def test_collapsed_networks_are_said_to_be_so(tmp_path):
    flags = (*TINY, "--lr", "1e-9")
    result = invoke("train", *flags, "--out", tmp_path / "r/none")
    assert result.exit_code == 0, result.output
    assert "collapsed" in result.stdout
    summary = json.loads((tmp_path / "r/none/summary.json").read_text())
    assert "shares alone" in summary["collapsed"]
    estimated = invoke("estimate-trace", tmp_path / "r/none/last.pt")
    assert "collapsed, or was not trained" in estimated.stderr
    compared = invoke("compare", tmp_path / "r/none")
    assert "1 (1 collapsed)" in compared.stdout
    (row,) = json.loads((tmp_path / "r/none/results.json").read_text())["rows"]
    assert row["num_collapsed"] == 1
    learned = ("--epochs", "12", "--train-examples", "300", "--model-arg", "width=8", "--lr", "0.1")
    good = invoke("train", *learned, "--out", tmp_path / "good")
    assert "shares alone" not in good.stdout
    good = invoke("estimate-trace", tmp_path / "good/last.pt", "--json", "-")
    assert json.loads(good.stdout)["collapsed"] is None


def test_the_error_of_a_subset_is_never_nothing(checkpoint):
    """Lost in the noise, or of a method that cannot tell it, it is not known, and not 0."""
    g = torch.Generator().manual_seed(0)
    mean = StratifiedMean()
    for batch in range(4):
        mean.add(batch, 0.25, torch.randn(3, 1, 1, generator=g) * 100)
    errors = {mean.subset_stderr(1000, 40), mean.subset_stderr(41, 40)}
    assert 0.0 not in errors
    for method in ("auto", "hutchinson", "dropout", "hutch++", "xtrace"):
        flags = ("--method", method, "--num-probes", "4", "--num-examples", "40")
        result = invoke("estimate-trace", checkpoint, *flags)
        assert "± 0" not in (result.stdout + result.stderr).replace("± 0.", "")
        assert "40 of 90 examples" in result.stderr
        assert "(exact)" not in result.stdout
    assert "(exact on 40)" in invoke("estimate-trace", checkpoint, "--num-examples", "40").stdout
    assert "(exact)" in invoke("estimate-trace", checkpoint).stdout


def test_settings_are_said_as_they_are_given():
    settings = {"model-arg": {"width": 4, "norm": "none"}, "vocab-size": None, "mean": {}}
    said = "model-arg width=4 norm=none, vocab-size none, mean none"
    assert settings_text(settings) == said
