"""Epochs by which every row of a comparison trains for as long as the slowest one.

    epochs of a row = round(epochs * seconds of the slowest row's epoch / seconds of its own)

Seconds are measured before the first run and kept in the comparison's folder, so that a second call
trains the same runs. Schedules and warm-ups are shares of a run, and stretch with it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hesstrace_cli import records
from hesstrace_cli.comparison.found import PLANNED
from hesstrace_cli.comparison.grid import PlannedRun
from hesstrace_cli.config import TrainConfig, key_of
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.paths import is_there
from hesstrace_cli.storage.files import write_atomically
from hesstrace_cli.storage.records import EQUAL_TIME, read_equal_time
from hesstrace_cli.storage.resume import PLACE

Cell = tuple[str, str, str]
"""Data set, model and row."""

_OF_A_RUN = (*PLACE, "dataset", "model", "reg", "lambda_", "seed", "epochs")


def check_folder(folder: Path, *, equal: str) -> None:
    """Make sure that a comparison's folder holds no runs that got something else.

    Args:
        folder: Where it is, or will be.
        equal: What all rows get, "epochs" or "time".

    Raises:
        ConfigError: If it does.
    """
    by_time = is_there(folder / EQUAL_TIME)
    if equal == "epochs" and by_time:
        raise ConfigError(
            f"{str(folder)!r} is a comparison of equal time; go on with --equal time, or choose "
            "another --out"
        )
    if (
        equal == "time"
        and not by_time
        and (is_there(folder / PLANNED) or is_there(folder / "runs"))
    ):
        raise ConfigError(
            f"{str(folder)!r} is a comparison of equal epochs; --equal time takes another --out"
        )


def time_of(run: Path, config: TrainConfig) -> str | None:
    """Whose time a run in a comparison of equal time has, in words; None of any other run.

    Args:
        run: Its folder.
        config: Its settings.
    """
    kept = read_equal_time(run.resolve().parent.parent)
    if kept is None:
        return None
    rows = [row for row in kept["rows"]
            if (row["dataset"], row["model"]) == (config.dataset, config.model)]  # fmt: skip
    own = {row["regularizer"]: row["epochs"] for row in rows}
    if own.get(config.row().name) != config.epochs:
        return None
    slowest = max(rows, key=lambda row: row["seconds_per_epoch"] or 0.0)
    return f"for the time of {kept['epochs']} of {slowest['regularizer']}"


def cell_of(run: PlannedRun) -> Cell:
    """The run's; its seed makes no difference to what an epoch takes."""
    return run.config.dataset, run.config.model, run.regularizer


def measured_for(runs: Sequence[PlannedRun]) -> dict[Cell, Cell]:
    """For each cell the one whose epochs are measured in its place: strengths cost the same.

    Raises:
        ConfigError: If a row has epochs of its own.
    """
    first: dict[Any, Cell] = {}
    found: dict[Cell, Cell] = {}
    for run in runs:
        row = run.config.row()
        if "epochs" in row.settings:
            raise ConfigError(
                f"--equal time says how many epochs a row has, and the row {run.regularizer} has "
                "epochs of its own; leave one of them out"
            )
        dataset, model, _ = cell = cell_of(run)
        names = tuple(name for name, strength in row.strengths.items() if strength)
        settings = tuple((key_of(k), str(v)) for k, v in row.settings.items())
        found[cell] = first.setdefault((dataset, model, names, settings), cell)
    return found


def epochs_kept(folder: Path, runs: Sequence[PlannedRun]) -> dict[Cell, int] | None:
    """What an earlier call has found for these runs; None where none has.

    Raises:
        ConfigError: If it was for other rows or epochs, or cannot be read.
    """
    kept = read_equal_time(folder)
    if kept is None:
        return None
    epochs = {
        (row["dataset"], row["model"], row["regularizer"]): row["epochs"] for row in kept["rows"]
    }
    missing = [f"has no {cell[-1]}" for cell in map(cell_of, runs) if cell not in epochs]
    now = {"epochs": runs[0].config.epochs, **_settings_of(runs[0])}
    before = {"epochs": kept["epochs"], **kept.get("settings", {})}
    differ = [f"is of --{k} {v}" for k, v in before.items() if k in now and now[k] != v]
    if missing or differ:
        raise ConfigError(
            f"{str(folder / EQUAL_TIME)!r} {[*missing, *differ][0]}: times are measured for all "
            "rows at once, before the first run; choose another --out for these"
        )
    return epochs


def _settings_of(run: PlannedRun) -> dict[str, Any]:
    """What all runs have in common, by key."""
    names = [item.name for item in dataclasses.fields(TrainConfig) if item.name not in _OF_A_RUN]
    return {key_of(name): getattr(run.config, name) for name in names}


def write_epochs(
    folder: Path, runs: Sequence[PlannedRun], seconds: Mapping[Cell, float]
) -> dict[Cell, int]:
    """Find how many epochs every row trains for, and note it.

    Args:
        folder: The comparison's.
        runs: All of them, as of equal epochs.
        seconds: Of an epoch, by the cells that were measured; a row without, as its steps
            diverged, keeps its epochs.
    """
    place = measured_for(runs)
    rows: dict[Cell, records.RowOfEqualTime] = {}
    for run in runs:
        dataset, model, name = cell = cell_of(run)
        own = seconds.get(place[cell])
        slowest = max((s for (d, m, _), s in seconds.items() if (d, m) == cell[:2]), default=own)
        stretch = 1.0 if own is None or slowest is None else slowest / own
        rows[cell] = {
            "dataset": dataset, "model": model, "regularizer": name,
            "seconds_per_epoch": own, "epochs": max(1, round(run.config.epochs * stretch)),
        }  # fmt: skip
    content: records.EqualTime = {
        "epochs": runs[0].config.epochs,
        "settings": _settings_of(runs[0]),
        "rows": [*rows.values()],
    }
    write_atomically(folder / EQUAL_TIME, json.dumps(content, indent=2) + "\n")
    return {cell: row["epochs"] for cell, row in rows.items()}


def stretched(runs: Sequence[PlannedRun], epochs: Mapping[Cell, int]) -> list[PlannedRun]:
    """The runs, each as long as its row."""

    def of(config: TrainConfig, cell: Cell) -> TrainConfig:
        return dataclasses.replace(config, epochs=epochs[cell])

    return [dataclasses.replace(run, config=of(run.config, cell_of(run))) for run in runs]
