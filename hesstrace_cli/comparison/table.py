"""The table of a comparison: means and spreads over seeds, paired differences, and who wins."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from scipy.special import stdtr

from hesstrace_cli import records
from hesstrace_cli.comparison.found import Summary
from hesstrace_cli.curvature.statistics import t_quantile
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.reporting.apart import differing, key
from hesstrace_cli.reporting.plots import plain_first
from hesstrace_cli.reporting.text import for_csv
from hesstrace_cli.storage.files import write_atomically
from hesstrace_cli.storage.records import measure_of, metrics_of, task_name
from hesstrace_cli.tasks import TASKS, Task

SCHEMA = "hesstrace/comparison/1"
MEASURES = (
    "test_accuracy", "test_loss", "train_loss", "generalization_gap", "calibration_error",
    "trace", "input_jacobian", "top_eigenvalue",
)  # fmt: skip

LEVEL = 0.05

_FIRST = ("dataset", "model", "regularizer", "num_seeds", "num_diverged", "step_cost")
_LAST = ("num_unfinished", "num_collapsed", "task", "group")


def describe(values: Sequence[float]) -> records.Spread:
    """Mean, standard deviation and 95 % t-interval of independent values; null where unknown."""
    if not values:
        return {"mean": None, "std": None, "ci95": None}
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": mean, "std": None, "ci95": None}
    std = statistics.stdev(values)
    half = t_quantile(0.975, len(values) - 1) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> records.Difference:
    """Mean difference over the seeds that both have, its interval, and a paired t-test.

    Args:
        values: By seed.
        base: The same measure of another row.
    """
    differences = [values[seed] - base[seed] for seed in values if seed in base]
    result = describe(differences)
    mean, std, p_value = result["mean"], result["std"], None
    if mean is not None and std:
        t = mean / (std / math.sqrt(len(differences)))
        p_value = 2 * float(stdtr(len(differences) - 1, -abs(t)))
    return {"mean": mean, "ci95": result["ci95"], "p_value": p_value}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for many comparisons: the chance of even one false claim stays below p.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected


def measure(summary: Summary, name: str) -> float | None:
    """One measure or metric of a finished run; None where it was not taken."""
    if name == "trace":
        trace = summary["trace"]["trace"]
        return None if trace is None else float(trace)
    if name == "generalization_gap":
        return float(summary["test_loss"] - summary["train_loss"])
    value = summary[name] if name in summary else metrics_of(summary).get(name)
    return None if value is None else float(value)


def tabulate(
    summaries: Sequence[Summary],
    diverged: Sequence[Summary] = (),
    step_cost: Mapping[str, float] | None = None,
    unfinished: Sequence[Summary] = (),
) -> records.Comparison:
    """The comparison of finished runs, a row a regularizer of each group that may be compared.

    Args:
        summaries: Of the runs, in the order that the rows shall have; with `settings` where they
            are known, else the data set and model tell the groups apart.
        diverged: `dataset`, `model`, `regularizers` and `seed` of the runs that stopped with a
            loss that is not finite.
        step_cost: The time of a step over that of `none`, by `cost_key`.
        unfinished: As `diverged`, of the runs that are not at their end.
    """
    summaries = _distinct(summaries)
    pending = [{**run, "unfinished": True} for run in unfinished]
    groups: dict[str, list[Summary]] = {}
    for summary in [*summaries, *diverged, *pending]:
        groups.setdefault(key(summary), []).append(summary)
    settings = [dict(members[0].get("settings", {})) for members in groups.values()]
    apart = [k for k in differing(settings) if k not in ("dataset", "model", "task")]
    places = [(members[0]["dataset"], members[0]["model"]) for members in groups.values()]
    rows: list[records.Row] = []
    for number, members in enumerate(groups.values()):
        # Steps were timed with the settings of one of several groups, it is not known of which.
        of_place = _costs_of(*places[number], step_cost or {}, alone=len(set(places)) == 1)
        costs = of_place if places.count(places[number]) == 1 else {}
        for row in _group(*places[number], members, costs):
            row["group"] = number
            row["settings"] = {k: settings[number].get(k) for k in apart}
            rows.append(row)
    num_runs = len(summaries) + len(diverged) + len(pending)
    return {"schema": SCHEMA, "num_runs": num_runs, "num_unfinished": len(pending),
            "settings": settings, "rows": rows}  # fmt: skip


def cost_key(dataset: str, model: str, regularizer: str) -> str:
    """Of a row among step costs: what a step takes over `none`'s is another for another model."""
    return f"{dataset} {model} {regularizer}"


def _costs_of(
    dataset: str, model: str, costs: Mapping[str, float], *, alone: bool
) -> dict[str, float]:
    """By regularizer; where there is one data set and model, a key may be that alone, as once."""
    prefix = cost_key(dataset, model, "")
    found = {key.removeprefix(prefix): c for key, c in costs.items() if key.startswith(prefix)}
    return found or (dict(costs) if alone else {})


def _distinct(summaries: Sequence[Summary]) -> list[Summary]:
    """Each run once.

    Raises:
        ConfigError: If two runs would stand in the same place of the table.
    """
    places: dict[tuple[Any, ...], Summary] = {}
    for s in summaries:
        place = (key(s), s["regularizers"], s["seed"])
        other = places.setdefault(place, s)
        if Path(other["folder"]).resolve() != Path(s["folder"]).resolve():
            raise ConfigError(
                f"{other['folder']!r} and {s['folder']!r} are both {s['regularizers']} with seed "
                f"{s['seed']} of {s['model']} on {s['dataset']}; tabulate one of them"
            )
    return list(places.values())


def _group(
    dataset: str, model: str, members: Sequence[Summary], step_cost: Mapping[str, float]
) -> list[records.Row]:
    """The rows of runs that may be compared: their differences are paired by seed."""
    names = plain_first(dict.fromkeys(s["regularizers"] for s in members))
    finished = [s for s in members if "test_loss" in s]
    task = _task_of(finished)
    metrics = dict(task.higher_is_better) if task is not None else {}
    measures = {*MEASURES, *map(measure_of, metrics)}
    values: dict[tuple[str, str], dict[int, float]] = {
        (name, m): {
            s["seed"]: value
            for s in finished
            if s["regularizers"] == name and (value := measure(s, m)) is not None
        }
        for name in names
        for m in measures
    }
    rows: list[records.Row] = []
    for name in names:
        own = [s for s in finished if s["regularizers"] == name]
        num_runs = sum(s["regularizers"] == name for s in members)
        num_unfinished = sum("unfinished" in s for s in members if s["regularizers"] == name)
        spreads = {m: describe(list(values[name, m].values())) for m in measures}
        errors = [s["trace"]["stderr"] for s in own]
        spreads["trace"]["stderr"] = (
            None if not own or None in errors
            else math.sqrt(sum(e**2 for e in errors)) / len(own)
        )  # fmt: skip
        compared = "none" in names and name != "none"
        of_row = (s for s in members if s["regularizers"] == name and "strengths" in s)
        begun = next(of_row, {})
        row = {
            "regularizer": name,
            "strengths": begun.get("strengths", {}),
            "row_settings": begun.get("row_settings", {}),
            "dataset": dataset,
            "model": model,
            "task": None if task is None else task.name,
            "selection": None if task is None else task.selection.as_dict(),
            "num_seeds": len(own),
            "num_diverged": num_runs - num_unfinished - len(own),
            "num_unfinished": num_unfinished,
            "num_collapsed": sum(bool(s.get("collapsed")) for s in own),
            **{m: spreads[m] for m in MEASURES},
            "metrics": {m: spreads[measure_of(m)] for m in metrics},
            "difference_to_none": _differences(values, name, metrics) if compared else None,
            "step_cost": 1.0 if name == "none" and step_cost else step_cost.get(name),
            "wins": [],
            "runs": [s["folder"] for s in own],
        }
        rows.append(cast(records.Row, row))
    _correct(rows, metrics)
    better = {measure_of(m): higher for m, higher in metrics.items()}
    _name_winners(rows, values, {"test_loss": False, **better})
    return rows


def _differences(
    values: Mapping[tuple[str, str], Mapping[int, float]], name: str, metrics: Iterable[str]
) -> records.Differences:
    """Of a row to that of `none`."""

    def of(m: str) -> records.Difference:
        return paired_difference(values[name, m], values["none", m])

    found = {m: of(m) for m in MEASURES}
    return cast(records.Differences, {**found, "metrics": {m: of(measure_of(m)) for m in metrics}})


def _task_of(finished: Sequence[Summary]) -> Task | None:
    """The task of all of these runs; None where there is none.

    Raises:
        ConfigError: If they are of several.
    """
    names = {task_name(s): s["folder"] for s in finished}
    if len(names) > 1:
        runs = " and ".join(f"{folder!r} of {name}" for name, folder in names.items())
        raise ConfigError(f"runs of different tasks are no table: {runs}. Tabulate them apart")
    return TASKS[next(iter(names))]() if names else None


def _correct(rows: Sequence[records.Row], metrics: Iterable[str]) -> None:
    """Add Holm's correction over the rows to each measure's p-value."""
    compared = [
        cast(Mapping[str, Any], row["difference_to_none"])
        for row in rows
        if row["difference_to_none"]
    ]
    for of in [*([d[m] for d in compared] for m in MEASURES),
               *([d["metrics"][m] for d in compared] for m in metrics)]:  # fmt: skip
        corrected = holm([difference["p_value"] for difference in of])
        for difference, p in zip(of, corrected, strict=True):
            difference["p_holm"] = p


def _name_winners(
    rows: Sequence[records.Row],
    values: Mapping[tuple[str, str], Mapping[int, float]],
    higher_is_better: Mapping[str, bool],
) -> None:
    """Note, for each measure, the best row where it differs from every other one."""
    for m, higher in higher_is_better.items():
        means = {
            row["regularizer"]: statistics.fmean(own)
            for row in rows
            if (own := values[row["regularizer"], m].values())
        }
        ranked = [row for row in rows if row["regularizer"] in means]
        ranked.sort(key=lambda row: means[row["regularizer"]], reverse=higher)
        if len(ranked) < 2:
            continue
        best, *others = ranked
        p_values = holm([
            paired_difference(values[best["regularizer"], m], values[row["regularizer"], m])[
                "p_value"
            ]
            for row in others
        ])  # fmt: skip
        if all(p is not None and p < LEVEL for p in p_values):
            best["wins"].append(m)


def write(folder: Path, comparison: Mapping[str, Any], markdown: str) -> None:
    """Write `results.json`, `results.csv` and `results.md`."""
    table = io.StringIO()
    own = dict.fromkeys(key for row in comparison["rows"] for key in row["row_settings"])
    groups = comparison["settings"]
    lines = [
        _flat(row, {key: groups[row["group"]].get(key) for key in own})
        for row in comparison["rows"]
    ]
    head = dict.fromkeys(name for line in lines for name in line)
    writer = csv.DictWriter(table, list(head), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(folder / "results.json", json.dumps(comparison, indent=2) + "\n")
    write_atomically(folder / "results.csv", table.getvalue())
    write_atomically(folder / "results.md", markdown)


def _flat(row: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `results.csv`: what a row is of, its figures, its differences to `none`.

    Args:
        row: Of the comparison's record.
        settings: Its group's, which some rows have of their own.
    """
    line = {name: row[name] for name in _FIRST}
    measures = {m: row[m] for m in MEASURES}
    measures |= {m: own for m, own in row["metrics"].items() if measure_of(m) not in MEASURES}
    differences = row["difference_to_none"] or {"metrics": {}}
    differences = {**differences["metrics"], **differences}
    for m, own in measures.items():
        line |= {f"{m}_mean": own["mean"], f"{m}_std": own["std"]}
        line |= _ends(f"{m}_", own["ci95"])
        found = differences.get(m, {})
        line[f"{m}_minus_none"] = found.get("mean")
        line |= _ends(f"{m}_minus_none_", found.get("ci95"))
        line |= {f"{m}_minus_none_p": found.get("p_value"),
                 f"{m}_minus_none_p_holm": found.get("p_holm")}  # fmt: skip
    line |= {name: row[name] for name in _LAST}
    line |= {f"strength {name}": value for name, value in row["strengths"].items()}
    settings = {**settings, **row["settings"], **row["row_settings"]}
    line |= {f"setting {name}": value for name, value in settings.items()}
    return {for_csv(k): for_csv(v) if isinstance(v, str) else v for k, v in line.items()}


def _ends(name: str, interval: Sequence[float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}low": low, f"{name}high": high}
