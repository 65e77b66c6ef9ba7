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
from hesstrace_cli.comparison.grid import PlannedRun
from hesstrace_cli.config import TrainConfig, key_of
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.storage.files import write_atomically
from hesstrace_cli.storage.records import EQUAL_TIME, read_equal_time

Cell = tuple[str, str, str]
"""Data set, model and row."""


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
    missing = [cell for cell in map(cell_of, runs) if cell not in epochs]
    if missing or any(run.config.epochs != kept["epochs"] for run in runs):
        what = f"has no {missing[0][-1]}" if missing else f"is of --epochs {kept['epochs']}"
        raise ConfigError(
            f"{str(folder / EQUAL_TIME)!r} {what}: times are measured for all rows at once, before "
            "the first run; choose another --out for these"
        )
    return epochs


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
    content: records.EqualTime = {"epochs": runs[0].config.epochs, "rows": [*rows.values()]}
    write_atomically(folder / EQUAL_TIME, json.dumps(content, indent=2) + "\n")
    return {cell: row["epochs"] for cell, row in rows.items()}


def stretched(runs: Sequence[PlannedRun], epochs: Mapping[Cell, int]) -> list[PlannedRun]:
    """The runs, each as long as its row."""

    def of(config: TrainConfig, cell: Cell) -> TrainConfig:
        return dataclasses.replace(config, epochs=epochs[cell])

    return [dataclasses.replace(run, config=of(run.config, cell_of(run))) for run in runs]
