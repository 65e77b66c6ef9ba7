"""Which settings of the penalty to train with: the result of each, its time and its noise.

    python benchmarks/penalty_settings.py --epochs 20 --out runs/bn
    python benchmarks/penalty_settings.py --epochs 20 --model-arg norm=none --out runs/no-norm

One row a setting, the same seeds in each; all other flags are those of `hesstrace train`. Losses
and traces are those of the last epoch; differences are paired by seed, to the batch's form with
half of the tensors. Time is that of a step over a plain one, steps timed in turn. The noise is the
relative variance of the penalty's gradient, as in `benchmarks/step_cost.py`, at the weights that
training without a penalty ends at. Runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

from step_cost import noise_and_signal, sample

from hesstrace_cli.autodiff.calls import uses_batch_statistics
from hesstrace_cli.cli import main as hesstrace
from hesstrace_cli.comparison.table import describe, paired_difference
from hesstrace_cli.config import TrainConfig, resolve
from hesstrace_cli.records import Difference
from hesstrace_cli.reporting.layout import markdown_table
from hesstrace_cli.training.cost import step_costs
from hesstrace_cli.training.trainer import Trainer

BATCH, EXAMPLE = ["--form", "batch"], ["--form", "example", "--estimator", "hutchinson"]
ROWS: dict[str, tuple[float, list[str]]] = {
    "none": (0.0, []),
    "batch, half of the tensors": (1.0, BATCH),
    "batch, all tensors": (1.0, [*BATCH, "--estimator", "hutchinson"]),
    "example": (1.0, EXAMPLE),
    "example, every 2nd step, 2 x lambda": (2.0, [*EXAMPLE, "--every", "2"]),
    "example, every 4th step, 4 x lambda": (4.0, [*EXAMPLE, "--every", "4"]),
    "example, a quarter of the examples": (1.0, [*EXAMPLE, "--penalty-examples", "0.25"]),
    "example, a quarter of the tensors": (1.0, ["--form", "example", "--keep-prob", "0.25"]),
    "example, half of the tensors": (1.0, ["--form", "example", "--keep-prob", "0.5"]),
}
"""By name, how much of lambda a row takes, and its flags."""

BASE = "batch, half of the tensors"

MEASURES = ("test_accuracy", "test_loss", "train_loss", "trace")


def run(command: list[str]) -> int:
    """The exit code of `hesstrace`, without another start of Python; its table is not shown."""
    own, sys.argv = sys.argv, ["hesstrace", *command]
    try:
        with redirect_stdout(io.StringIO()):
            hesstrace()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = own
    return 0


def train(name: str, folder: Path, seed: int, strength: float, flags: list[str]) -> None:
    """One run, unless it is there; a diverged one leaves no summary."""
    share, own = ROWS[name]
    reg = f"trace={share * strength:g}" if share else "none"
    command = ["train", *flags, *own, "--reg", reg]
    command += ["--seed", str(seed), "--out", str(folder), "--resume-or-start"]
    if (folder / "summary.json").exists():
        return
    if run(command) not in (0, 5):
        sys.exit(f"hesstrace {' '.join(command)} did not end well")


def noises(configs: dict[str, TrainConfig], weights: Path, draws: int) -> dict[str, float]:
    """Relative variances at the same weights; without batch norm in the same unit, `example`'s."""
    found: dict[str, tuple[float, float]] = {}
    unit = None
    for name, config in configs.items():
        trainer = Trainer.of(dataclasses.replace(config, init=str(weights)))
        noise = noise_and_signal(trainer, draws)
        if noise is not None:
            found[name] = (config.every * noise[0], noise[1])
            if name == "example" and not uses_batch_statistics(trainer.model, sample(trainer)):
                unit = noise[1]
    return {name: spread / (unit or square) for name, (spread, square) in found.items()}


class Row:
    """The runs of a setting, by seed."""

    def __init__(self, name: str, folder: Path, seeds: list[int]) -> None:
        place = folder / name.replace(", ", "-").replace(" ", "-")
        self.name = name
        self.folders = {seed: place / str(seed) for seed in seeds}

    def config(self) -> TrainConfig:
        """Its settings, those of the first seed."""
        first = next(iter(self.folders.values()))
        return dataclasses.replace(resolve(TrainConfig, {}, str(first / "config.yaml")), out=None)

    def values(self, measure: str) -> dict[int, float]:
        """By seed; a run that diverged has no summary."""
        files = {seed: folder / "summary.json" for seed, folder in self.folders.items()}
        found = {seed: json.loads(f.read_text()) for seed, f in files.items() if f.exists()}
        if measure == "trace":
            return {seed: summary["trace"]["trace"] for seed, summary in found.items()}
        return {seed: summary[measure] for seed, summary in found.items()}


def cell(values: Iterable[float]) -> str:
    """Mean and standard deviation."""
    spread = describe(list(values))
    mean, std = spread["mean"], spread["std"]
    return "" if mean is None else f"{mean:.4g}" + ("" if std is None else f" ± {std:.2g}")


def difference(paired: Difference) -> str:
    """Mean and p; nothing where there are no two pairs that differ."""
    mean, p_value = paired["mean"], paired["p_value"]
    return "" if mean is None or p_value is None else f"{mean:+.4f} (p = {p_value:.2g})"


def table(rows: list[Row], draws: int) -> str:
    """A line a row."""
    configs = {row.name: row.config() for row in rows}
    costs = step_costs(configs)
    noise = noises(configs, next(iter(rows[0].folders.values())) / "last.pt", draws)
    base = next((row.values("test_loss") for row in rows if row.name == BASE), {})
    lines = []
    for row in rows:
        losses = row.values("test_loss")
        lines.append([
            row.name,
            f"{costs[row.name].time:.2f}" if row.name in costs else "",
            f"{noise[row.name]:.3g}" if row.name in noise else "",
            f"{len(losses)} of {len(row.folders)}",
            *(cell(row.values(measure).values()) for measure in MEASURES),
            difference(paired_difference(losses, base)),
        ])  # fmt: skip
    head = ("penalty", "time", "noise", "runs", *MEASURES, "test loss - batch, half")
    return markdown_table(head, lines)


def main() -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--lambda", dest="strength", type=float, default=0.01)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=list(ROWS), help="names of rows, none first")
    arguments, flags = parser.parse_known_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows = [Row(name, arguments.out, seeds) for name in arguments.only]
    for seed in seeds:
        for row in rows:
            train(row.name, row.folders[seed], seed, arguments.strength, flags)
    print(table(rows, arguments.draws))


if __name__ == "__main__":
    main()
