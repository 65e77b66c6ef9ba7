"""Which of several strengths stands for a row: the one that is best on validation."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hesstrace_cli.comparison.found import CHOSEN
from hesstrace_cli.comparison.grid import PlannedRun
from hesstrace_cli.config import CompareConfig, Row, TrainConfig, key_of, open_names
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.storage.files import write_atomically
from hesstrace_cli.storage.records import selected, task_name
from hesstrace_cli.tasks import TASKS
from hesstrace_cli.tasks.base import Selection


def to_choose_from(config: CompareConfig, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that strengths are chosen by: of all seeds, or of those of `tune_seeds`."""
    seeds = config.tune_seeds or config.seeds
    return [run for run in runs if run.config.seed in seeds]


def of_other_seeds(runs: Sequence[PlannedRun], chosen: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs of the chosen strengths with seeds that they were not chosen by."""
    cells, known = {_cell(run) for run in chosen}, {run.config.out for run in chosen}
    return [run for run in runs if _cell(run) in cells and run.config.out not in known]


def _cell(run: PlannedRun) -> tuple[str, str, str]:
    return run.config.dataset, run.config.model, run.regularizer


def choose_strengths(runs: Sequence[PlannedRun], by: str | None = None) -> list[PlannedRun]:
    """For every row of the table the runs of the strength that is best on validation.

    The mean over the seeds decides; of equal ones the first listed. A strength that diverged with
    any seed is not chosen while another did not.

    Args:
        runs: All of them, ended.
        by: "loss" or "accuracy"; None for what the task picks by.

    Raises:
        ConfigError: If there is a choice, and the task has no accuracy to choose by.
    """
    cells: dict[tuple[str, str, int], dict[str, list[PlannedRun]]] = {}
    for run in runs:
        key = (run.config.dataset, run.config.model, run.entry)
        cells.setdefault(key, {}).setdefault(run.regularizer, []).append(run)
    chosen: list[PlannedRun] = []
    for candidates in cells.values():
        chosen += max(candidates.values(), key=lambda own: _validation_score(own, by))
    return chosen


def write_chosen(
    folder: Path, chosen: Sequence[PlannedRun], by: str | None, edges: Sequence[str]
) -> None:
    """Note the chosen runs, for `compare DIR` to collect them alone, by what it was, and edges."""
    names = [run.folder.path.name for run in chosen]
    content = {"by": chosen_by(chosen, by), "at_edge": [*edges], "runs": names}
    write_atomically(folder / CHOSEN, json.dumps(content, indent=2) + "\n")


def forget_chosen(folder: Path) -> None:
    """Collect all runs of the folder again."""
    (folder / CHOSEN).unlink(missing_ok=True)


def at_edge(config: CompareConfig, chosen: Iterable[PlannedRun]) -> list[str]:
    """Where the chosen strength, or value, is the least or the most of those tried, in words.

    The best may then lie beyond.
    """
    rows = config.candidates()
    found = []
    for entry, name in {(run.entry, run.regularizer): None for run in chosen}:
        (row,) = (row for row in rows[entry] if row.name == name)
        for key in sorted(open_names(config.reg[entry], TrainConfig)):
            tried = [_value(each, key) for each in rows[entry]]
            numbers = [v for v in tried if isinstance(v, int | float) and not isinstance(v, bool)]
            own = _value(row, key)
            if len(numbers) > 1 and own in (min(numbers), max(numbers)):
                which = "least" if own == min(numbers) else "most"
                of = "" if name == f"{key}={own:g}" else f" of {name}"
                found.append(
                    f"{key}={own:g}{of}, the {which} of {min(numbers):g} to {max(numbers):g}"
                )
    return list(dict.fromkeys(found))


def _value(row: Row, key: str) -> Any:
    settings = {key_of(name): value for name, value in row.settings.items()}
    return row.strengths.get(key, settings.get(key))


def chosen_by(runs: Iterable[PlannedRun], by: str | None = None) -> list[str]:
    """What the strengths of finished runs were chosen by, each metric once."""
    found = (run.folder.summary() for run in runs)
    return list(dict.fromkeys(_selection(s, by).metric for s in found if s is not None))


def _selection(summary: Mapping[str, Any], by: str | None) -> Selection:
    """What a strength is chosen by.

    Raises:
        ConfigError: If the task has no such thing.
    """
    task = TASKS[task_name(summary)]
    if by is None:
        return task.selection
    if by != "loss" and by not in task.higher_is_better:
        raise ConfigError(
            f"--tune-by {by}: --task {task.name} has no {by}; the runs are there, and "
            "--tune-by loss chooses from them"
        )
    return Selection(by, higher_is_better=by != "loss")


def _validation_score(runs: Iterable[PlannedRun], by: str | None) -> tuple[bool, float]:
    """Whether every run has one, and the mean of those that have; the larger the better."""
    found = [_score(run, by) for run in runs]
    scores = [score for score in found if score is not None]
    return len(scores) == len(found), statistics.fmean(scores) if scores else -math.inf


def _score(run: PlannedRun, by: str | None) -> float | None:
    summary = run.folder.summary()
    if summary is None:
        return None
    selection = _selection(summary, by)
    value = selected(summary, "val", selection.metric)
    if value is None:
        return None
    return value if selection.higher_is_better else -value
