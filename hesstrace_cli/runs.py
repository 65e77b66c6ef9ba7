"""Run folders: what a training run leaves behind, and goes on from."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from hesstrace_cli.checkpoints import is_leftover, read_checkpoint, write_atomically
from hesstrace_cli.config import TrainConfig, key_of, parse_row, resolve, row_name, to_yaml
from hesstrace_cli.errors import ConfigError, ModelError
from hesstrace_cli.locks import FolderLock

SCHEMA = "hesstrace/run/1"

# May differ between the first part of a run and a resumed one: they say where, not what.
PLACE = (
    "out", "resume", "device", "num_workers", "data_dir", "download", "keep_checkpoints",
    "tensorboard",
)  # fmt: skip


def default_folder(config: TrainConfig, root: str = "runs") -> Path:
    """The folder `<root>/<data>-<model>-<regularizers>-seed<seed>`."""
    row = row_name(parse_row(config.reg, config.lambda_)).replace("=", "").replace(",", "+")
    name = re.sub(r"[^\w.+-]+", "-", row)
    parts = [_short(config.dataset), _short(config.model), name, f"seed{config.seed}"]
    return Path(root) / "-".join(parts)


def _short(spec: str) -> str:
    return re.sub(r"[^\w.]+", "-", Path(spec).name if "/" in spec else spec).strip("-")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation accuracy."""
        return self.path / "best.pt"

    def of_epoch(self, epoch: int) -> Path:
        """The checkpoint after an epoch, where several are kept."""
        return self.path / f"epoch-{epoch:04d}.pt"

    def drop_before(self, epoch: int) -> None:
        """Remove the checkpoints of earlier epochs."""
        for file in self.path.glob("epoch-*.pt"):
            if file.name < self.of_epoch(epoch).name:
                file.unlink(missing_ok=True)

    @property
    def metrics(self) -> Path:
        """One line of JSON an epoch."""
        return self.path / "metrics.jsonl"

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None of an unfinished one."""
        file = self.path / "summary.json"
        if not file.is_file():
            return None
        try:
            summary = json.loads(file.read_text())
            return summary if summary["schema"] == SCHEMA else None
        except (ValueError, KeyError, TypeError) as problem:
            raise ConfigError(f"{str(file)!r} is damaged; remove it and --resume") from problem

    def lock(self) -> FolderLock:
        """Make the folder and keep other processes out of it; clear what a killed one left.

        Raises:
            ConfigError: If it cannot be made, or is in use.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.path)
            for file in self.path.iterdir():
                if is_leftover(file):
                    file.unlink()
        except OSError as problem:
            raise ConfigError(
                f"--out {str(self.path)!r} cannot be used: {problem.strerror}"
            ) from problem
        return lock

    def open(self, config: TrainConfig) -> dict[str, Any] | None:
        """Begin a run in the locked folder, or find the checkpoint to go on from.

        Returns:
            The last checkpoint with `--resume`, None at the start of a run.

        Raises:
            ConfigError: If the folder cannot be written, or holds a run with other settings.
        """
        settings = self.path / "config.yaml"
        occupied = any(self.path.iterdir())
        if occupied and not config.resume:
            raise ConfigError(
                f"--out {str(self.path)!r} is not empty; give --resume to go on with its run, or "
                "another folder"
            )
        if config.resume and settings.is_file():
            self.check_same(config, str(settings))
            return self._last_state()
        if occupied:
            raise ConfigError(f"--out {str(self.path)!r} is not empty and holds no run to resume")
        write_atomically(settings, to_yaml(dataclasses.replace(config, resume=False)))
        return None

    def _last_state(self) -> dict[str, Any] | None:
        if not self.last.is_file():
            return None
        content = read_checkpoint(self.last).content
        if "optimizer" not in content:
            raise ModelError(f"{str(self.last)!r} holds no state of a run to resume")
        return content

    def check_same(self, config: TrainConfig, settings: str) -> None:
        """Compare with the settings of the run that is in the folder.

        Raises:
            ConfigError: If they differ in more than where to run.
        """
        before = resolve(TrainConfig, {}, settings)
        changed = [
            f"{key_of(item.name)} was {getattr(before, item.name)}, is {getattr(config, item.name)}"
            for item in dataclasses.fields(TrainConfig)
            if item.name not in PLACE and getattr(before, item.name) != getattr(config, item.name)
        ]
        if changed:
            raise ConfigError(
                f"{str(self.path)!r} holds a run with other settings: {'; '.join(changed)}. Repeat "
                f"its own with --config {settings}, or choose another --out"
            )

    def truncate_metrics(self, epochs: int) -> None:
        """Drop the lines after the first `epochs`: written, but not in the checkpoint."""
        if self.metrics.is_file():
            lines = self.metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n")][:epochs]
            write_atomically(self.metrics, "".join(kept))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add the line of one epoch."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as problem:
            raise ConfigError(
                f"{str(self.metrics)!r} cannot be written: {problem.strerror}"
            ) from problem

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`, the sign that the run is finished."""
        write_atomically(
            self.path / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n"
        )
