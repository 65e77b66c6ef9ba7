"""The runs that lie in folders: finished, diverged, begun and planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesstrace_cli.config import TrainConfig, resolve
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.paths import is_folder
from hesstrace_cli.storage.records import read_chosen, read_diverged, read_planned
from hesstrace_cli.storage.runs import RunFolder

Summary = Mapping[str, Any]

CHOSEN = "chosen.json"
"""In a comparison's folder, the names of the runs whose strength was chosen."""

PLANNED = "planned.json"
"""In a comparison's folder, what its runs are, those not begun included."""


@dataclass(frozen=True)
class Found:
    """The runs under a folder.

    Attributes:
        finished: Their summaries, with their `folder`.
        diverged: The notes of those that stopped with a loss that is not finite, with `folder`.
        unfinished: `dataset`, `model`, `regularizers`, `seed` and `folder` of those begun or
            planned; of the latter also what `comparison` they are of.
    """

    finished: Sequence[Summary]
    diverged: Sequence[Summary]
    unfinished: Sequence[Summary]


def collect(folder: Path) -> Found:
    """The runs under a folder; of several strengths to choose from, those of the chosen one.

    Raises:
        ConfigError: If none is finished.
    """
    if not is_folder(folder):
        raise ConfigError(f"{str(folder)!r} is no folder, expected one with finished runs")
    chosen = read_chosen(folder / CHOSEN)
    names = None if chosen is None else chosen["runs"]

    def folders(name: str) -> list[Path]:
        found = sorted(file.parent for file in folder.glob(f"**/{name}"))
        if names is None:
            return found
        return sorted((f for f in found if f.name in names), key=lambda f: names.index(f.name))

    finished = [
        {**summary, "folder": str(run)}
        for run in folders("summary.json")
        if (summary := RunFolder(run).summary()) is not None
    ]
    ended = {run["folder"] for run in finished}
    diverged = [  # and were not trained to their end by hand since
        {**read_diverged(run / "diverged.json"), "folder": str(run)}
        for run in folders("diverged.json") if str(run) not in ended
    ]  # fmt: skip
    ended |= {run["folder"] for run in diverged}
    begun: dict[str, Summary] = {
        str(run): _begun(run) for run in folders("config.yaml") if str(run) not in ended
    }
    for file in folder.glob(f"**/{PLANNED}"):
        for name, run in read_planned(file).items():
            place = str(file.parent / name)
            if place not in ended and (names is None or Path(name).name in names):
                begun.setdefault(place, {**run, "folder": place, "comparison": str(file.parent)})
    if not finished and not diverged:
        left = f", {len(begun)} that are not finished" if begun else ""
        raise ConfigError(f"{str(folder)!r} holds no finished run (no summary.json){left}")
    return Found(finished, diverged, list(begun.values()))


def settings_of(run: Path) -> TrainConfig:
    """The settings of the run in a folder.

    Raises:
        ConfigError: If they are not known.
    """
    file = RunFolder(run).settings
    if not file.is_file():
        raise ConfigError(
            f"{str(run)!r} has no config.yaml, so that its settings are not known; only runs of "
            "the same settings can be compared"
        )
    return resolve(TrainConfig, {}, str(file))


def _begun(run: Path) -> Summary:
    config = settings_of(run)
    name = config.row().name
    return {"dataset": config.dataset, "model": config.model, "regularizers": name,
            "seed": config.seed, "folder": str(run)}  # fmt: skip
