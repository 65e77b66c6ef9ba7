"""Which runs may stand in one table: those that differ in regularizer, seed and place alone.

Settings that a regularizer alone goes by belong to it: where they differ, so do its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hesstrace_cli.comparison.equal_time import time_of
from hesstrace_cli.comparison.found import Found, Summary, settings_of
from hesstrace_cli.config import REGULARIZERS, TrainConfig, key_of, settings_used
from hesstrace_cli.reporting.apart import differing, key
from hesstrace_cli.storage.records import task_name
from hesstrace_cli.storage.resume import PLACE

_ROW = ("reg", "lambda_", "seed")
_OWN = settings_used(REGULARIZERS)


def with_settings(found: Found) -> Found:
    """The runs, each with its `settings` (by key), `strengths`, `row_settings` and row's name.

    A run that is planned and not begun has those of one that is, of the same comparison.

    Raises:
        ConfigError: If the settings of a run are not known.
    """
    finished, diverged, unfinished = (
        [_described(run) for run in runs]
        for runs in (found.finished, found.diverged, found.unfinished)
    )
    runs = [*finished, *diverged, *unfinished]
    for run in runs:
        if "settings" not in run:
            run["settings"] = _of_another(run, runs)
    for run in [*diverged, *unfinished]:
        run["settings"] = {**run["settings"], "task": _task(run, finished)}
    _name_apart(runs)
    return Found(finished, diverged, unfinished)


def _described(run: Summary) -> dict[str, Any]:
    """The run with what its config says; as it is where it is not begun."""
    if "comparison" in run:
        return {**run, "own": {}}
    config = settings_of(Path(run["folder"]))
    row = config.row()
    strengths = row.strengths
    own: dict[str, object] = {}
    settings: dict[str, object] = {}
    for item in dataclasses.fields(TrainConfig):
        if item.name not in (*PLACE, *_ROW):
            (own if item.name in _OWN else settings)[key_of(item.name)] = getattr(config, item.name)
    settings["epochs"] = time_of(Path(run["folder"]), config) or config.epochs
    settings["label-noise"] = config.label_noise or None  # none is no noise
    if "test_loss" in run:  # what auto took, which is another where the data have changed
        settings["task"] = task_name(run)
    used = {key_of(name) for name in settings_used(strengths)}
    own = {name: value for name, value in own.items() if name in used}
    of_row = {key_of(name): value for name, value in row.settings.items()}
    return {**run, "settings": settings, "own": own, "strengths": strengths,
            "row_settings": of_row}  # fmt: skip


def _of_another(run: Summary, runs: Iterable[Summary]) -> dict[str, object]:
    place = {"dataset": run["dataset"], "model": run["model"]}
    begun = [other for other in runs if "comparison" not in other
             and Path(run["comparison"]) in Path(other["folder"]).parents]  # fmt: skip
    begun.sort(key=lambda other: any(other[k] != v for k, v in place.items()))
    return {**(begun[0]["settings"] if begun else {}), **place}


def _task(run: Summary, finished: Iterable[Summary]) -> object:
    """What a run's task is, or will be: that of one that is finished, with the same settings."""
    own = run["settings"]
    for other in finished:
        same = {**other["settings"], "task": own.get("task")} == own
        if same and own["task"] == "auto":
            return other["settings"]["task"]
    return own.get("task", "auto")


def _name_apart(runs: Sequence[dict[str, Any]]) -> None:
    """Rows of one name get the settings of the penalty in which they differ into their names."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        rows.setdefault((key(run), run["regularizers"]), []).append(run)
    for members in rows.values():
        begun = [run for run in members if run["own"]]
        differ = differing([run["own"] for run in begun])
        for run in begun if differ else ():
            more = ", ".join(f"{k}={run['own'][k]}" for k in differ)
            run["regularizers"] = f"{run['regularizers']} ({more})"
