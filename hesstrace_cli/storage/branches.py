"""A run that goes on from where another one is, with settings of its own from there."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from hesstrace_cli.config import TrainConfig, to_yaml
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.storage.checkpoints import read_checkpoint, save_checkpoint
from hesstrace_cli.storage.files import write_atomically
from hesstrace_cli.storage.runs import RunFolder

VALIDATION = "validation.json"
"""Beside a run's files, its losses on the validation split after its last epoch."""


def branch_off(trunk: RunFolder, config: TrainConfig) -> None:
    """Make the folder of a run, whole or not at all, as if it had come to where another one is.

    Nothing is done where the run is begun.

    Args:
        trunk: The other one's, left after an epoch.
        config: The run's own; it must take the other one's state.

    Raises:
        ConfigError: If it cannot be written.
        ModelError: If the other one's checkpoint is damaged.
    """
    assert config.out is not None
    folder = RunFolder(Path(config.out))
    if folder.settings.is_file():
        return
    new = RunFolder(folder.path.with_name(f"{folder.path.name}.new"))
    try:
        shutil.rmtree(new.path, ignore_errors=True)
        new.path.mkdir(parents=True)
        content = read_checkpoint(trunk.last).content
        own = dataclasses.asdict(config.effective())
        save_checkpoint(new.last, {**content, "config": own})
        if trunk.best.is_file():
            shutil.copyfile(trunk.best, new.best)
        shutil.copyfile(trunk.metrics, new.metrics)
        write_atomically(new.settings, to_yaml(config))
        new.path.rename(folder.path)
    except OSError as problem:
        raise ConfigError(f"{config.out!r} cannot be made: {problem.strerror}") from problem
