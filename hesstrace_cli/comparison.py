"""A grid of regularizers and seeds: the runs, and the table of their means and spreads."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.special import stdtr

from hesstrace_cli.checkpoints import write_atomically
from hesstrace_cli.config import CompareConfig, TrainConfig, row_name
from hesstrace_cli.curvature.statistics import t_quantile
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.runs import default_folder

SCHEMA = "hesstrace/comparison/1"
MEASURES = ("test_accuracy", "test_loss", "train_loss", "trace")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One cell of the grid.

    Attributes:
        regularizer: The row's canonical name.
        config: The run's own config, in its folder.
    """

    regularizer: str
    config: TrainConfig


def plan(config: CompareConfig) -> list[PlannedRun]:
    """The runs of the grid: for a seed, every row has the same initial weights and data order."""
    root = Path(config.out or "comparisons/compare")
    own = {item.name for item in dataclasses.fields(TrainConfig)}
    common = {k: getattr(config, k) for k in own - {"reg", "lambda_", "seed", "out"}}
    runs = []
    for seed in config.seeds:
        for row in config.rows():
            run = TrainConfig(**common, reg=[row_name(row)], seed=seed)
            folder = default_folder(run, str(root / "runs"))
            runs.append(PlannedRun(row_name(row), dataclasses.replace(run, out=str(folder))))
    return runs


def collect(folder: Path) -> list[dict[str, Any]]:
    """The summaries of the runs under a folder.

    Raises:
        ConfigError: If there are none.
    """
    files = sorted(folder.glob("**/summary.json"))
    if not files:
        raise ConfigError(f"{str(folder)!r} holds no finished run (no summary.json)")
    return [{**json.loads(file.read_text()), "folder": str(file.parent)} for file in files]


def describe(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and 95 % t-interval of independent values; null where unknown."""
    if not values:
        return {"mean": None, "std": None, "ci95": None}
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": mean, "std": None, "ci95": None}
    std = statistics.stdev(values)
    half = t_quantile(0.975, len(values) - 1) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> dict[str, Any]:
    """Mean difference over the seeds that both have, its interval, and a paired t-test.

    Args:
        values: By seed.
        base: The same measure of the row `none`.
    """
    differences = [values[seed] - base[seed] for seed in values if seed in base]
    result = describe(differences)
    p_value = None
    if len(differences) > 1 and result["std"] > 0:
        t = result["mean"] / (result["std"] / math.sqrt(len(differences)))
        p_value = 2 * float(stdtr(len(differences) - 1, -abs(t)))
    return {"mean": result["mean"], "ci95": result["ci95"], "p_value": p_value}


def _measure(summary: Mapping[str, Any], name: str) -> float:
    return float(summary["trace"]["trace"] if name == "trace" else summary[name])


def tabulate(summaries: Sequence[Mapping[str, Any]], diverged: Mapping[str, int]) -> dict[str, Any]:
    """The comparison of finished runs, a row a regularizer.

    Args:
        summaries: Of the runs, in the order that the rows shall have.
        diverged: How many runs of each regularizer stopped with a loss that is not finite.
    """
    names = list(dict.fromkeys([*(s["regularizers"] for s in summaries), *diverged]))
    by_seed = {
        (name, measure): {s["seed"]: _measure(s, measure) for s in summaries
                          if s["regularizers"] == name}
        for name in names
        for measure in MEASURES
    }  # fmt: skip
    rows = []
    for name in names:
        own = [s for s in summaries if s["regularizers"] == name]
        row: dict[str, Any] = {
            "regularizer": name,
            "num_seeds": len(own),
            "num_diverged": diverged.get(name, 0),
        }
        row |= {m: describe(list(by_seed[name, m].values())) for m in MEASURES}
        row["difference_to_none"] = (
            {m: paired_difference(by_seed[name, m], by_seed["none", m]) for m in MEASURES}
            if "none" in names and name != "none"
            else None
        )
        row["step_cost"] = None
        row["runs"] = [s["folder"] for s in own]
        rows.append(row)
    return {"schema": SCHEMA, "rows": rows}


def write(folder: Path, comparison: Mapping[str, Any], markdown: str) -> None:
    """Write `results.json`, `results.csv` and `results.md`."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    head = [f"{measure}_{part}" for measure in MEASURES for part in ("mean", "std")]
    writer.writerow(["regularizer", "num_seeds", "num_diverged", *head])
    for row in comparison["rows"]:
        cells = [row[measure][part] for measure in MEASURES for part in ("mean", "std")]
        writer.writerow([row["regularizer"], row["num_seeds"], row["num_diverged"], *cells])
    write_atomically(folder / "results.json", json.dumps(comparison, indent=2) + "\n")
    write_atomically(folder / "results.csv", table.getvalue())
    write_atomically(folder / "results.md", markdown)


def pending(runs: Sequence[PlannedRun]) -> Iterator[PlannedRun]:
    """The runs that are not finished; one with a folder already is to be resumed."""
    for run in runs:
        folder = Path(run.config.out or "")
        if (folder / "summary.json").is_file():
            continue
        resume = (folder / "config.yaml").is_file()
        yield dataclasses.replace(run, config=dataclasses.replace(run.config, resume=resume))
