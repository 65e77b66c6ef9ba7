"""JSON that runs leave behind, with every value replaced by junk, cut, or gone."""

from __future__ import annotations

import copy
import json
import os
import pathlib

import pytest

from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.errors import ConfigError, DataError
from hesstrace_cli.storage import records
from tests.conftest import invoke

PLACE = {"dataset": "digits", "model": "mlp", "regularizers": "none", "seed": 0}
LAYER = {"name": "w", "num_parameters": 4, "trace": 1.0, "stderr": None}
SUMMARY = {
    "schema": "hesstrace/run/1",
    **PLACE,
    "epochs": 1,
    "train_loss": 0.1,
    "train_accuracy": 1.0,
    "val_accuracy": None,
    "test_loss": 0.1,
    "test_accuracy": 1.0,
    "trace": {"trace": 1.0, "stderr": 0, "per_layer": [LAYER, LAYER]},
    "seconds": 1.0,
    "calibration_error": 0.1,
    "trace_penalty": {"curvature": "ggn", "reason": "x"},
}
KINDS = {
    "summary.json": (records.read_summary, SUMMARY),
    "diverged.json": (records.read_diverged, {**PLACE, "reason": "x"}),
    "chosen.json": (records.read_chosen, {"by": ["loss"], "runs": ["a", "b"]}),
    "equal_time.json": (
        lambda file: records.read_equal_time(file.parent),
        {
            "epochs": 3,
            "rows": [
                {
                    "dataset": "d",
                    "model": "m",
                    "regularizer": "none",
                    "epochs": 7,
                    "seconds_per_epoch": 0.5,
                }
            ],
        },
    ),
    "planned.json": (records.read_planned, {"runs/a": PLACE, "runs/b": PLACE}),
    "step_cost.json": (records.read_costs, {"none": 1.0, "trace=0.1": 2.5}),
    "metrics.jsonl": (
        records.read_epochs,
        {"epoch": 1, "train_loss": 0.5, "val_accuracy": 0.9, "seconds": 1.0},
    ),
}
JUNK = [None, True, -1, 1.5, 10**30, 1e308, "x", "", [], [[]], {}, {"x": 1}, [1, "x"], [None]]
NO_JSON = [
    "", "{", "[1,", "nul", "'x'", "{1: 2}", "NaN", "[Infinity]", "-Infinity", "[" * 5000, "{} {}",
]  # fmt: skip


def places(value, path=()):
    """Every place in a value, the whole first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items if isinstance(value, (dict, list)) else ():
        yield from places(item, (*path, key)) if isinstance(item, (dict, list)) else [(*path, key)]


def replaced(value, path, junk):
    if not path:
        return junk
    changed = copy.deepcopy(value)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = junk
    return changed


@pytest.mark.parametrize("name", KINDS)
def test_what_was_written_is_read(name, tmp_path):
    read, value = KINDS[name]
    (tmp_path / name).write_text(json.dumps(value) + "\n")
    assert read(tmp_path / name) == ([value] if name == "metrics.jsonl" else value)


@pytest.mark.parametrize("name", KINDS)
def test_a_value_of_another_type_is_refused_and_never_passed_on(name, tmp_path):
    read, value = KINDS[name]
    for path in places(value):
        own = value
        for key in path:
            own = own[key]
        for junk in JUNK:
            (tmp_path / name).write_text(json.dumps(replaced(value, path, junk)) + "\n")
            try:
                read(tmp_path / name)
            except ConfigError as problem:
                assert name in str(problem)  # noqa: PT017
                continue
            numbers = all(isinstance(x, (int, float)) for x in (own, junk))
            nothing = junk is None or (isinstance(junk, (list, dict)) and type(junk) is type(own))
            free = path[-1:] in (("seconds",), ("schema",), ("reason",))
            alike = numbers and not isinstance(junk, bool)
            assert alike or nothing or free or type(own) is type(junk) or own is None, (path, junk)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_json_is_refused(name, tmp_path):
    read, _ = KINDS[name]
    for text in NO_JSON:
        (tmp_path / name).write_text(text + "\n")
        if text or name != "metrics.jsonl":
            with pytest.raises(ConfigError):
                read(tmp_path / name)
    for content in (b"\xff\xfe\0\n", b"[" + b"9" * 9999 + b"]\n", b"\0" * 99 + b"\n"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError):
            read(tmp_path / name)
    (tmp_path / name).unlink()
    for kind in (os.mkdir, os.mkfifo, lambda path: pathlib.Path(path).symlink_to(path)):
        kind(tmp_path / name)
        with pytest.raises(ConfigError):
            read(tmp_path / name)
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "key", [k for k in SUMMARY if k not in ("schema", "calibration_error", "trace_penalty")]
)
def test_a_summary_that_lacks_what_is_used_is_refused(key, tmp_path):
    cut = {k: v for k, v in SUMMARY.items() if k != key}
    (tmp_path / "summary.json").write_text(json.dumps(cut))
    with pytest.raises(ConfigError, match=f"lacks {key}"):
        records.read_summary(tmp_path / "summary.json")


def test_a_last_line_that_is_not_whole_is_left_out(tmp_path):
    line = json.dumps({"epoch": 1, "train_loss": 0.5})
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"epoch": 2, "trai')
    assert len(records.read_epochs(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    "name", [name for name in KINDS if name not in ("summary.json", "equal_time.json")]
)
def test_compare_names_the_file_that_is_damaged(name, tmp_path):
    run = tmp_path / "c" / "runs" / "r"
    run.mkdir(parents=True)
    if name != "diverged.json":  # which a run that has ended does not go by
        (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "config.yaml").write_text("model: mlp\n")
    beside = name in ("chosen.json", "planned.json", "step_cost.json")
    (tmp_path / "c" / name if beside else run / name).write_text("[5]\n")
    result = invoke("compare", tmp_path / "c")
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert name in last


@pytest.mark.parametrize("field", ["mean", "std", "scale", "channels", "other"])
def test_a_preprocessing_of_another_type_is_refused(field):
    fine = Preprocess((0.5, 0.5, 0.5), (1.0, 2.0, 3.0), 16.0, 3).as_dict()
    assert Preprocess.from_dict(fine).as_dict() == fine
    junk = [*JUNK, 0, float("nan"), float("inf"), [0], [float("nan")], ["x"], 1e-40, 10**9, b"x"]
    for value in junk:
        try:
            made = Preprocess.from_dict({**fine, field: value})
        except DataError:
            continue
        assert field != "other"
        json.dumps(made.as_dict(), allow_nan=False)
        assert value in {"mean": [[0]], "scale": [1.5, 10**9, 10**30], "channels": [None]}[field]
    for value in (None, 5, [], "x"):
        with pytest.raises(DataError):
            Preprocess.from_dict(value)
