"""Run folders: what a training run leaves behind, and goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from hesstrace_cli import records
from hesstrace_cli.config import TrainConfig, key_of, resolve, to_yaml
from hesstrace_cli.errors import ConfigError, ModelError
from hesstrace_cli.paths import is_file, is_there
from hesstrace_cli.storage.checkpoints import read_checkpoint
from hesstrace_cli.storage.files import clear_leftovers, leftovers, write_atomically
from hesstrace_cli.storage.locks import FolderLock
from hesstrace_cli.storage.records import read_summary, text_of
from hesstrace_cli.storage.resume import changes, is_longer, why_not_longer
from hesstrace_cli.storage.state import check_whole, config_of

_LONGEST = 60  # characters of a part of a folder's name


def default_folder(config: TrainConfig, root: str = "runs") -> Path:
    """The folder `<root>/<data>-<model>-<regularizers>-seed<seed>`.

    Files of one name in two folders are told apart by a few digits of their path's hash.
    """
    row = config.row()
    name, settings = row.name, set(map(key_of, row.settings))
    pairs = [term.rpartition("=")[::2] for term in name.split(",") if "=" in term]
    terms = [_short(k, _short(v) if k in settings else v) for k, v in pairs]
    parts = [_short(config.dataset), _short(config.model), "+".join(terms) or name]
    return Path(root) / "-".join([*parts, f"seed{config.seed}"])


def _short(spec: str, strength: str = "") -> str:
    """A part of a file's name for a name, a path or a factory; as it is where it can be."""
    name = re.sub(r"[^\w.]+", "-", Path(spec).name).strip("-")
    if spec.replace(":", "-") != name or len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}-{hashlib.sha1(os.fsencode(spec)).hexdigest()[:6]}"
    return name + strength


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
        """The checkpoint that was best on validation, by what the task picks by."""
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

    @property
    def validation(self) -> Path:
        """The losses on the validation split of a run that was left for them."""
        return self.path / "validation.json"

    def summary(self) -> records.Run | None:
        """The summary of a finished run; None of an unfinished one."""
        return read_summary(self.path / "summary.json")

    @property
    def settings(self) -> Path:
        """The resolved config of the run; a folder without it holds none."""
        return self.path / "config.yaml"

    def owns(self, file: Path) -> bool:
        """Whether a file belongs to the run in this folder, so that nothing else may be there."""
        kept = re.fullmatch(r"epoch-\d{4,}\.pt", file.name) is not None
        return is_file(self.settings) and (kept or file.name in {own.name for own in self._own})

    @property
    def _own(self) -> tuple[Path, ...]:
        return (self.last, self.best, self.settings, self.metrics, self.path / "summary.json")

    def check_place(self, config: TrainConfig) -> None:
        """Refuse before the work a folder in which the run can neither begin nor go on.

        Raises:
            ConfigError: If it is missing with `--resume`, occupied without it, unusable, or holds
                a run with other settings.
        """
        name = repr(str(self.path))
        for file in self._own:
            if is_there(file) and not is_file(file):
                raise ConfigError(f"{str(file)!r} is no regular file; remove it")
        try:
            there = self.path.is_dir()
            files = {file.name for file in self.path.iterdir()} if there else set()
            files -= {file.name for file in leftovers(self.path)} if there else set()
            place = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
            usable = place.is_dir() and os.access(place, os.W_OK)
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            raise ConfigError(f"--out {name} cannot be used: {reason}") from problem
        holds_run = self.settings.is_file()
        if config.resume and not holds_run:
            what = "holds no run" if there else "does not exist"
            raise ConfigError(
                f"--resume: {name} {what}; --resume-or-start begins one where there is none"
            )
        if files and not holds_run and config.resume_or_start:
            raise ConfigError(f"--out {name} is not empty and holds no run to resume")
        if files and not (config.resume or config.resume_or_start):
            raise ConfigError(
                f"--out {name} is not empty; give --resume to go on with its run, or another folder"
            )
        if not usable:
            raise ConfigError(f"--out {name} cannot be used: {str(place)!r} cannot be written to")
        if holds_run and not is_longer(self._read_settings(), config):
            self.check_same(config)

    def lock(self) -> FolderLock:
        """Make the folder and keep other processes out of it.

        Raises:
            ConfigError: If it cannot be made, or is in use.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return FolderLock(self.path)
        except OSError as problem:
            raise ConfigError(
                f"--out {str(self.path)!r} cannot be used: {problem.strerror}"
            ) from problem

    def open(self, config: TrainConfig, steps_per_epoch: int) -> dict[str, Any] | None:
        """Begin a run in the locked folder, or find the checkpoint to go on from.

        What a killed process left is cleared.

        Returns:
            The last checkpoint of a run to go on with, None at the start of one.

        Raises:
            ConfigError: If the folder cannot be written, or holds a run with other settings.
            ModelError: If its checkpoint is damaged, or of another run.
        """
        self.check_place(config)
        clear_leftovers(self.path)
        if not self.settings.is_file():
            self._write_settings(config)
            return None
        content = self._last_state()
        before = self._read_settings()
        if content is not None:
            before = config_of(content)
            if not is_longer(before, config) and (changed := changes(before, config)):
                raise ModelError(
                    f"{str(self.last)!r} is of a run with other settings than "
                    f"{str(self.settings)!r}: {'; '.join(changed)}"
                )
        if is_longer(before, config):
            steps = 0 if content is None else content["step"]
            reason = why_not_longer(before, config, steps=steps, steps_per_epoch=steps_per_epoch)
            if reason is not None:
                raise ConfigError(
                    f"--epochs was {before.epochs}, is {config.epochs}: {reason}, so that the run "
                    f"would not be one of {config.epochs} epochs. Begin that one in another --out"
                )
        return content

    def make_longer(self, config: TrainConfig) -> None:
        """Note the epochs of the run that goes on; with more of them it is no longer finished."""
        if self._read_settings().epochs == config.epochs:
            return
        try:
            (self.path / "summary.json").unlink(missing_ok=True)
        except OSError as problem:
            raise ConfigError(
                f"--out {str(self.path)!r} cannot be used: {problem.strerror}"
            ) from problem
        self._write_settings(config)

    def _write_settings(self, config: TrainConfig) -> None:
        config = dataclasses.replace(config, resume=False, resume_or_start=False)
        write_atomically(self.settings, to_yaml(config))

    def _read_settings(self) -> TrainConfig:
        return resolve(TrainConfig, {}, str(self.settings))

    def _last_state(self) -> dict[str, Any] | None:
        if not self.last.is_file():
            # Killed in the first epoch's end, a run may have one line, and no checkpoint yet.
            if self.summary() is not None or len(self._lines()) > 1:
                raise ModelError(f"{str(self.last)!r} is missing; the run cannot go on without it")
            return None
        content = read_checkpoint(self.last).content
        try:
            check_whole(content)
        except ModelError as problem:
            raise ModelError(
                f"{str(self.last)!r} holds no state of a run to resume: {problem}"
            ) from problem
        if len(self._lines()) < content["epoch"] - 1:  # a crash of the machine may cost the last
            raise ConfigError(
                f"{str(self.metrics)!r} has {len(self._lines())} lines, but {str(self.last)!r} is "
                f"after epoch {content['epoch']}: are they of one run?"
            )
        return content

    def check_same(self, config: TrainConfig) -> None:
        """Compare with the settings of the run that is in the folder.

        Raises:
            ConfigError: If they differ in more than where to run.
        """
        changed = changes(self._read_settings(), config)
        if changed:
            raise ConfigError(
                f"{str(self.path)!r} holds a run with other settings: {'; '.join(changed)}. Repeat "
                f"its own with --config {self.settings}, or choose another --out"
            )

    def _lines(self) -> list[str]:
        """The whole lines of the metrics; a killed process may have left a part of one."""
        if not self.metrics.is_file():
            return []
        lines = text_of(self.metrics).splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def truncate_metrics(self, epochs: int) -> None:
        """Drop the lines after the first `epochs`: written, but not in the checkpoint."""
        if self.metrics.is_file():
            write_atomically(self.metrics, "".join(self._lines()[:epochs]))

    def append_metrics(self, record: records.Epoch) -> None:
        """Add the line of one epoch."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())  # there before the checkpoint that counts on it
        except OSError as problem:
            raise ConfigError(
                f"{str(self.metrics)!r} cannot be written: {problem.strerror}"
            ) from problem

    def write_summary(self, summary: records.Run) -> None:
        """Write `summary.json`, the sign that the run is finished."""
        write_atomically(
            self.path / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n"
        )
