"""Rows with settings of their own: written, named, tuned, trained and compared."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from hesstrace_cli.comparison import choice, grid
from hesstrace_cli.comparison.found import collect
from hesstrace_cli.config import REGULARIZERS, CompareConfig, TrainConfig, key_of, resolve
from hesstrace_cli.errors import ConfigError
from tests.conftest import TINY, assert_one_line_error, invoke, train_to_end


def config(**settings):
    return resolve(CompareConfig, settings, None)


def names(**settings):
    return [[row.name for row in rows] for rows in config(**settings).candidates()]


def test_no_setting_is_called_as_a_regularizer_is():
    assert not set(REGULARIZERS) & {key_of(name) for name in TrainConfig.__dataclass_fields__}


@pytest.mark.parametrize(
    ("entry", "name", "field", "value"),
    [
        ("weight-decay=1e-3", "weight-decay=0.001", "weight_decay", 0.001),
        ("trace=0.01,every=4", "trace=0.01,every=4", "every", 4),
        ("every=4,trace=0.01", "trace=0.01,every=4", "every", 4),
        ("none,nesterov=true", "nesterov=true", "nesterov", True),
        ("swa=0.5,schedule=constant", "swa=0.5,schedule=constant", "schedule", "constant"),
        ("optimizer=adamw", "optimizer=adamw", "optimizer", "adamw"),
        ("label-noise=0.2", "label-noise=0.2", "label_noise", 0.2),
    ],
)
def test_a_setting_in_a_row_is_the_runs(entry, name, field, value):
    asked = resolve(TrainConfig, {"reg": [entry]}, None)
    assert asked.row().name == name
    assert getattr(asked.effective(), field) == value
    assert getattr(asked, field) == getattr(TrainConfig(), field)  # what the others have
    assert asked.effective().effective() == asked.effective()
    again = resolve(TrainConfig, {"reg": [name]}, None)
    assert again.effective() == resolve(TrainConfig, {"reg": [name], field: value}, None)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("weight-decay=-1", "--weight-decay is -1"),
        ("weight-decay=much", "expected a number"),
        ("trace,every=1.5", "expected a whole number"),
        ("weight-decay", "weight-decay=VALUE"),
        ("weight-decay=1,weight-decay=2", "twice"),
        ("weight-decy=1", "did you mean 'weight-decay'"),
        ("weight_decay=1", "did you mean 'weight-decay'"),
        ("wd=1", "did you mean 'weight-decay'"),
        ("dropuot=0.1", "did you mean dropout=0.1"),
        ("draw=labels", "without trace or trace-held, which alone goes by it"),
        ("sam,fd-step=0.2", "write grad-norm-fd,fd-step=VALUE"),
        ("class-weights=balanced", "class-weights cannot be a row's own"),  # another loss
        ("ignore-index=3", "ignore-index cannot be a row's own"),
        ("task=regression", "task cannot be a row's own"),
        ("vocab-size=9", "vocab-size cannot be a row's own"),
        ("train-tokens=9", "train-tokens cannot be a row's own"),
        ("tokens=char", "tokens cannot be a row's own"),
        ("data-dir=d", "data-dir cannot be a row's own"),
        ("seed=3", "seed cannot be a row's own"),
        ("schedule=none", "expected one of"),
        ("nesterov=true,momentum=0", "--nesterov is a form"),
        ("nesterov=yes", "expected true or false"),
    ],
)
def test_what_cannot_be_in_a_row(entry, words):
    for config_class in (TrainConfig, CompareConfig):
        with pytest.raises(ConfigError, match=words) as caught:
            grid.plan(resolve(config_class, {"reg": [entry]}, None))
        assert "\n" not in str(caught.value)


def test_values_to_choose_from():
    tune = ["weight-decay=0.0001:0.001", "trace=0.01:0.1"]
    assert names(reg=["none", "weight-decay", "trace,weight-decay"], tune=tune) == [
        ["none"],
        ["weight-decay=0.0001", "weight-decay=0.001"],
        ["trace=0.01,weight-decay=0.0001", "trace=0.01,weight-decay=0.001",
         "trace=0.1,weight-decay=0.0001", "trace=0.1,weight-decay=0.001"],
    ]  # fmt: skip
    for wrong, words in (
        (["weight-decay=0.1:0.1"], "twice"), (["weight-decay=a:b"], "expected a number"),
        (["every=1:2", "weight-decay=1:2"], "names every, but no"),
            (["weight-decay=0.1:0.2", "trace=0.1"], "as many"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            names(reg=["weight-decay", "trace"], tune=wrong)


def test_it_trains_as_the_flag_does(tmp_path):
    by_flag = train_to_end(tmp_path / "a", reg="trace=0.01", weight_decay=0.1)
    by_row = train_to_end(tmp_path / "b", reg="trace=0.01,weight-decay=0.1")
    for name, value in by_flag.trainer.model.state_dict().items():
        assert torch.equal(by_row.trainer.model.state_dict()[name], value)
    saved = torch.load(tmp_path / "b" / "last.pt", weights_only=True)["config"]
    assert saved["weight_decay"] == 0.1
    written = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert written["reg"] == ["trace=0.01,weight-decay=0.1"]
    assert by_row.finish()["regularizers"] == "trace=0.01,weight-decay=0.1"
    train_to_end(tmp_path / "b", resume=True, reg="trace=0.01,weight-decay=0.1")
    with pytest.raises(ConfigError, match=r"weight-decay was 0\.1, is 0\.2"):
        train_to_end(tmp_path / "b", resume=True, reg="trace=0.01,weight-decay=0.2")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Plain runs of two epochs, of one, and of the weight decay that is better by accuracy."""
    out = tmp_path_factory.mktemp("compared") / "c"
    flags = (
        *TINY, "--reg", "none", "--reg", "weight-decay", "--reg", "optimizer=adamw,epochs=2",
        "--tune", "weight-decay=0.5:0.001", "--seeds", "0", "--lr", "0.01", "--out", out,
    )  # fmt: skip
    result = invoke("compare", *flags, "--tune-by", "loss")
    assert result.exit_code == 0, result.output
    return out, flags, result


def test_they_are_rows_of_one_table(compared):
    out, _, result = compared
    assert "chosen by validation loss: none; weight-decay=0." in result.stderr
    rows = json.loads((out / "results.json").read_text())["rows"]
    chosen = [row["regularizer"] for row in rows]
    assert chosen[::2] == ["none", "optimizer=adamw,epochs=2"]
    assert chosen[1] in ("weight-decay=0.5", "weight-decay=0.001")
    assert rows[2]["difference_to_none"]["test_loss"]["mean"] is not None
    (folder,) = rows[2]["runs"]
    assert json.loads((Path(folder) / "summary.json").read_text())["epochs"] == 2
    lines = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    decays = [line["setting weight-decay"] for line in lines]
    assert decays == ["0.0005", chosen[1].partition("=")[2], "0.0005"]
    assert [line["setting optimizer"] for line in lines] == ["sgd", "sgd", "adamw"]
    assert [line["setting epochs"] for line in lines] == ["1", "1", "2"]
    assert rows[2]["row_settings"] == {"optimizer": "adamw", "epochs": 2}
    for said in (result.stderr, (out / "results.md").read_text()):
        assert "Strengths are chosen by loss on validation." in said
    assert json.loads((out / "results.json").read_text())["chosen_by"] == ["loss"]
    assert invoke("compare", out).exit_code == 0  # collected alike
    assert json.loads((out / "results.json").read_text())["chosen_by"] == ["loss"]
    assert json.loads((out / "results.json").read_text())["rows"] == rows


def test_its_plan_is_of_the_same_runs(compared):
    _, flags, _ = compared
    plan = invoke("compare", *flags, "--plan").stdout.splitlines()
    assert len(plan) == 4
    for line in plan:
        done = invoke(*shlex.split(line)[1:])
        assert done.exit_code == 0
        assert "nothing to do" in done.stderr


def test_what_a_strength_is_chosen_by(compared):
    runs = grid.plan(config(reg=["none", "weight-decay"], tune=["weight-decay=0.5:0.001"],
                            seeds=[0], epochs=1, train_examples=100, lr=0.01,
                            model_arg={"width": 4}, out=str(compared[0])))  # fmt: skip
    for run, loss, accuracy in zip(runs, (1.0, 3.0, 2.0), (0.5, 0.9, 0.1), strict=True):
        file = run.folder.path / "summary.json"
        content = json.loads(file.read_text())
        metrics = {**content["val_metrics"], "accuracy": accuracy}
        file.write_text(json.dumps({**content, "val_loss": loss, "val_accuracy": accuracy,
                                    "val_metrics": metrics}))  # fmt: skip
    by = {metric: choice.choose_strengths(runs, metric)[1].regularizer
          for metric in (None, "loss", "accuracy")}  # fmt: skip
    assert by == {None: "weight-decay=0.5", "accuracy": "weight-decay=0.5",
                  "loss": "weight-decay=0.001"}  # fmt: skip


def test_with_other_seeds_the_chosen_value_alone_is_trained(tmp_path):
    out = tmp_path / "c"
    flags = (
        *TINY, "--reg", "none", "--reg", "weight-decay", "--tune", "weight-decay=0.5:0.001",
        "--lr", "0.01", "--seeds", "0,1", "--tune-seeds", "1", "--out", out,
    )  # fmt: skip
    assert len(invoke("compare", *flags, "--plan").stdout.splitlines()) == 3
    result = invoke("compare", *flags)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "results.json").read_text())
    none, decay = found["rows"]
    assert (none["num_seeds"], decay["num_seeds"]) == (2, 2)
    own = decay["regularizer"]
    other = ({"weight-decay=0.5", "weight-decay=0.001"} - {own}).pop()
    runs = {folder.name for folder in (out / "runs").iterdir() if folder.is_dir()}
    assert {name.split("-none-")[-1] for name in runs if "-none-" in name} == {"seed0", "seed1"}
    assert sum(own.replace("=", "") in name for name in runs) == 2
    assert sum(other.replace("=", "") in name for name in runs) == 1
    assert len(invoke("compare", *flags, "--plan").stdout.splitlines()) == 5
    edge = own.partition("=")[2]
    assert [words.split(",")[0] for words in found["at_edge"]] == [f"weight-decay={edge}"]
    assert f"may lie beyond: weight-decay={edge}, the " in (out / "results.md").read_text()
    assert json.loads((out / "results.json").read_text())["at_edge"] == found["at_edge"]
    assert invoke("compare", out).exit_code == 0
    again = json.loads((out / "results.json").read_text())
    assert (again["at_edge"], again["rows"]) == (found["at_edge"], found["rows"])
    plain = (*TINY, "--reg", "none", "--reg", own, "--lr", "0.01", "--seeds", "0,1", "--out", out)
    assert "chosen" not in invoke("compare", *plain).output  # a comparison without a choice
    assert "chosen_by" not in json.loads((out / "results.json").read_text())
    assert {run["regularizers"] for run in collect(out).finished} == {"none", own, other}


def test_what_is_at_an_edge():
    settings = config(
        reg=["none", "trace", "weight-decay,sam=0.1"],
        tune=["trace=0.1:0.2:0.3", "weight-decay=0.01:0.1:0.02"],
        seeds=[0],
    )
    runs = {run.regularizer: run for run in grid.plan(settings)}

    def edges(*names):
        return choice.at_edge(settings, [runs[name] for name in names])

    assert edges("none", "trace=0.2", "sam=0.1,weight-decay=0.02") == []
    assert edges("trace=0.3", "sam=0.1,weight-decay=0.01") == [
        "trace=0.3, the most of 0.1 to 0.3",
        "weight-decay=0.01 of sam=0.1,weight-decay=0.01, the least of 0.01 to 0.1",
    ]
    assert edges("trace=0.1", "trace=0.1") == ["trace=0.1, the least of 0.1 to 0.3"]
    settings = config(reg=["nesterov"], tune=["nesterov=true:false"], seeds=[0])
    runs = {run.regularizer: run for run in grid.plan(settings)}
    assert edges("nesterov=true") == []  # no number


def test_seeds_to_tune_by_are_some_of_the_seeds():
    with pytest.raises(ConfigError, match=r"--tune-seeds is \[3\], expected some of \[0, 1\]"):
        config(reg=["trace"], tune=["trace=0.1:0.2"], seeds=[0, 1], tune_seeds=[3])
    with pytest.raises(ConfigError, match="there is no --tune"):
        config(reg=["trace=0.1"], seeds=[0, 1], tune_seeds=[0])


def test_a_task_without_accuracy(monkeypatch):
    runs = grid.plan(config(reg=["trace"], tune=["trace=0.1:0.2"], seeds=[0]))
    said = {"task": "regression", "val_loss": 1.0, "val_metrics": {}}
    monkeypatch.setattr(grid.RunFolder, "summary", lambda _: said)
    with pytest.raises(ConfigError, match="--tune-by accuracy: --task regression has no accuracy"):
        choice.choose_strengths(runs, "accuracy")


def test_tune_by_without_tune_is_refused():
    assert_one_line_error(invoke("compare", "--tune-by", "loss"), 2, "there is no --tune")
