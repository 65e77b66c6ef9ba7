"""The JSON that runs and comparisons leave behind, read again: one schema a file, checked whole.

What a later version added is let through; what is there must have its type, and what is used must
be there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hesstrace_cli import records
from hesstrace_cli.config import LARGEST, TASK_NAMES, shortened
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.paths import is_file, is_there

RUN_SCHEMA = "hesstrace/run/1"

EQUAL_TIME = "equal_time.json"
"""In a comparison's folder, what an epoch of each row takes, and how many it trains for."""

Check = Callable[[Any], str | None]
"""Says what is wrong with a value, beginning with where; None where nothing is."""


def _kind(expected: str, fits: Callable[[Any], bool]) -> Check:
    return lambda value: None if fits(value) else f" is {shortened(value)}, expected {expected}"


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= 1e300 and math.isfinite(value)


_TEXT = _kind("a text", lambda value: isinstance(value, str))
_NUMBER = _kind("a number", _is_number)
_MAYBE = _kind("a number or null", lambda value: value is None or _is_number(value))
_POSITIVE = _kind("a number above 0", lambda value: _is_number(value) and value > 0)
_TRUTH = _kind("true or false", lambda value: isinstance(value, bool))
_WHOLE = _kind("a whole number", lambda value: type(value) is int and 0 <= value <= LARGEST)


def _list_of(check: Check) -> Check:
    def inside(value: Any) -> str | None:
        if not isinstance(value, list):
            return f" is {shortened(value)}, expected a list"
        found = ((i, check(item)) for i, item in enumerate(value))
        return next((f"[{i}]{problem}" for i, problem in found if problem), None)

    return inside


def _mapping_of(check: Check) -> Check:
    def inside(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f" is {shortened(value)}, expected a mapping"
        found = ((key, check(item)) for key, item in value.items())
        return next((f".{key}{problem}" for key, problem in found if problem), None)

    return inside


def _record(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    def inside(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f" is {shortened(value)}, expected a mapping"
        missing = [name for name in needed if name not in value]
        if missing:
            return f" lacks {', '.join(missing)}"
        checks = {**needed, **(optional or {})}
        found = ((name, checks[name](value[name])) for name in checks if name in value)
        return next((f".{name}{problem}" for name, problem in found if problem), None)

    return inside


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


_PLACE = {"dataset": _TEXT, "model": _TEXT, "regularizers": _TEXT, "seed": _WHOLE}
_LAYER = _record({"name": _TEXT, "num_parameters": _WHOLE, "trace": _NUMBER, "stderr": _MAYBE})
_TRACE = _record({"trace": _MAYBE, "stderr": _MAYBE, "per_layer": _list_of(_LAYER)})
_TASK = _kind(f"one of {', '.join(TASK_NAMES)}", lambda value: value in TASK_NAMES)
_SELECTION = _record({"metric": _TEXT, "higher_is_better": _TRUTH})
_METRICS = _mapping_of(_MAYBE)
_SUMMARY = _record(
    {
        **_PLACE, "epochs": _WHOLE, "train_loss": _NUMBER, "train_accuracy": _MAYBE,
        "val_accuracy": _MAYBE, "test_loss": _NUMBER, "test_accuracy": _MAYBE, "trace": _TRACE,
        "seconds": _NUMBER,
    },
    {
        "task": _TASK, "selection": _SELECTION, "num_terms": _WHOLE, "metrics": _METRICS,
        "train_metrics": _METRICS, "val_metrics": _or_null(_METRICS), "val_loss": _MAYBE,
        "calibration_error": _MAYBE, "input_jacobian": _MAYBE, "top_eigenvalue": _MAYBE,
        "trace_penalty": _or_null(_record({"curvature": _TEXT, "reason": _TEXT})),
    },
)  # fmt: skip
_DIVERGED = _record(_PLACE, {"reason": _TEXT})
_CHOSEN = _record({"by": _list_of(_TEXT), "runs": _list_of(_TEXT)}, {"at_edge": _list_of(_TEXT)})
_ROW_OF_EQUAL_TIME = _record({
    "dataset": _TEXT, "model": _TEXT, "regularizer": _TEXT, "epochs": _WHOLE,
    "seconds_per_epoch": _or_null(_POSITIVE),
})  # fmt: skip
_EQUAL_TIME = _record(
    {"epochs": _WHOLE, "rows": _list_of(_ROW_OF_EQUAL_TIME)},
    {"settings": _kind("a mapping", lambda value: isinstance(value, dict))},
)
_EPOCH = _record(
    {"epoch": _WHOLE, "train_loss": _MAYBE},
    {"val_accuracy": _MAYBE, "val_loss": _MAYBE, "val_metrics": _or_null(_METRICS)},
)


def read_summary(file: Path) -> records.Run | None:
    """The summary of a finished run; None where there is none, or one of another schema.

    Raises:
        ConfigError: If it is damaged.
    """
    if not is_there(file):
        return None
    summary = _read(file)
    if isinstance(summary, dict) and summary.get("schema") not in (None, RUN_SCHEMA):
        return None
    return _checked(summary, _SUMMARY, file, "remove it and --resume the run")


def task_name(record: Mapping[str, Any]) -> str:
    """The task of a summary or trace; those written before there were others are classifiers'."""
    return str(record.get("task", "classification"))


def selection_metric(record: Mapping[str, Any]) -> str:
    """The metric that the record's task picks by, or "loss"."""
    return str(record["selection"]["metric"]) if "selection" in record else "accuracy"


def metrics_of(summary: Mapping[str, Any], split: str = "test") -> Mapping[str, float | None]:
    """The metrics on a split by name, nothing where there is no such split.

    Args:
        summary: Of a run; those written before there were others have the accuracy.
        split: "train", "val" or "test".
    """
    name = "metrics" if split == "test" else f"{split}_metrics"
    if name in summary:
        return dict(summary[name] or {})
    accuracy = summary.get(f"{split}_accuracy")
    found = {} if accuracy is None else {"accuracy": accuracy}
    if split == "test":
        found["calibration_error"] = summary.get("calibration_error")
    return found


def measure_of(metric: str) -> str:
    """The name of a metric on the test examples among the measures of a comparison's rows."""
    return "test_accuracy" if metric == "accuracy" else metric


def selected(record: Mapping[str, Any], split: str, metric: str) -> float | None:
    """What is picked by, of a summary or an epoch; None where it was not taken.

    Args:
        record: With losses and metrics.
        split: "val" or "test".
        metric: A metric's name, or "loss".
    """
    if metric == "loss":
        return record.get(f"{split}_loss")
    return metrics_of(record, split).get(metric)


def read_diverged(file: Path) -> records.Diverged:
    """The note of a run that stopped with a loss that is not finite.

    Raises:
        ConfigError: If it is damaged.
    """
    return _checked(_read(file), _DIVERGED, file, "remove it, and the run is tried again")


def read_chosen(file: Path) -> records.ChosenRuns | None:
    """The runs whose strength was chosen, and by what; None where there was no choice.

    Raises:
        ConfigError: If it is damaged.
    """
    if not is_there(file):
        return None
    return _checked(_read(file), _CHOSEN, file, "repeat the comparison")


def read_planned(file: Path) -> dict[str, records.Planned]:
    """What the runs of a comparison are, by their folders, those not begun included.

    Raises:
        ConfigError: If it is damaged.
    """
    return _checked(_read(file), _mapping_of(_record(_PLACE)), file, "repeat the comparison")


def read_costs(file: Path) -> dict[str, float]:
    """The time of a step over that of `none`, by regularizer; nothing where it was not measured.

    Raises:
        ConfigError: If it is damaged.
    """
    if not is_there(file):
        return {}
    return _checked(_read(file), _mapping_of(_POSITIVE), file, "remove it")


def read_equal_time(folder: Path) -> records.EqualTime | None:
    """How many epochs the rows of a comparison have for equal time; None of equal epochs.

    Args:
        folder: The comparison's.

    Raises:
        ConfigError: If it is damaged.
    """
    file = folder / EQUAL_TIME
    if not is_there(file):
        return None
    return _checked(_read(file), _EQUAL_TIME, file, "remove it and its runs")


def read_epochs(file: Path) -> list[records.Epoch]:
    """The metrics of the epochs that are done; a last line that is not whole is left out.

    Raises:
        ConfigError: If it is damaged.
    """
    if not is_there(file):
        return []
    lines = text_of(file).splitlines(keepends=True)
    epochs = [_parsed(line, file) for line in lines if line.endswith("\n") and line.strip()]
    return [_checked(epoch, _EPOCH, file, "remove it") for epoch in epochs]


def text_of(file: Path) -> str:
    """What a text file holds.

    Raises:
        ConfigError: If it cannot be read, or is no regular file, which might never end.
    """
    if not is_file(file):
        raise ConfigError(f"{str(file)!r} is no file; remove it")
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{str(file)!r} cannot be read: {problem}") from problem


def _read(file: Path) -> Any:
    return _parsed(text_of(file), file)


def _parsed(text: str, file: Path) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse, parse_int=_whole_of)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{str(file)!r} is damaged, no JSON: {problem}; remove it") from problem


def _refuse(constant: str) -> Any:
    raise ValueError(f"it holds {constant}")


def _whole_of(digits: str) -> int | float:
    return int(digits) if len(digits) < 300 else float(digits)


def _checked(value: Any, check: Check, file: Path, advice: str) -> Any:
    problem = check(value)
    if problem is not None:
        raise ConfigError(f"{str(file)!r} is damaged: it{problem}; {advice}")
    return value
