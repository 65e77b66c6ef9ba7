"""A training run: a `Trainer` with a folder, which holds its state and is resumed to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from hesstrace_cli import records
from hesstrace_cli.analysis.estimation import versions
from hesstrace_cli.analysis.loading import select_device
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.data import load_data
from hesstrace_cli.distributed.parallel import join
from hesstrace_cli.errors import HesstraceError, ModelError, Stopped
from hesstrace_cli.reporting.events import Events
from hesstrace_cli.storage.checkpoints import fitting, save_checkpoint
from hesstrace_cli.storage.records import RUN_SCHEMA
from hesstrace_cli.storage.runs import RunFolder, default_folder
from hesstrace_cli.storage.state import FORMAT
from hesstrace_cli.training.summary import summarize
from hesstrace_cli.training.trainer import Progress, Trainer


class Run:
    """A training run in its folder: made, or resumed, by `Run(config)`; stepped by `advance`.

    Args:
        config: The whole resolved config.

    Raises:
        HesstraceError: If the folder, data, model or checkpoint cannot be used.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.folder = RunFolder(Path(config.out) if config.out else default_folder(config))
        # As given, which a comparison goes by; and with what the row has of its own.
        self._given = dataclasses.replace(config, out=str(self.folder.path))
        self.config = config = self._given.effective()
        device = select_device(config.device)
        self.ranks = join(device)
        if self.ranks.is_first:
            self.folder.check_place(self._given)
        self.trainer = Trainer(config, load_data(config, device), device, self.ranks)
        self.events = Events(self.folder.path / "tensorboard" if config.tensorboard else None)
        # Last: what fails before leaves no folder behind.
        self.lock = self.folder.lock() if self.ranks.is_first else None
        try:
            self._begin()
        except HesstraceError:
            self._unlock()
            raise

    def _begin(self) -> None:
        checkpoint = None
        if self.ranks.is_first:
            checkpoint = self.folder.open(self._given, self.trainer.steps_per_epoch)
        checkpoint = self.ranks.from_first(checkpoint)
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.ranks.is_first:
            self.folder.make_longer(self._given)
            self.folder.truncate_metrics(self.trainer.epoch)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        name = str(self.folder.last)
        weights = fitting(self.trainer.model, checkpoint["state_dict"], name)
        moved = checkpoint.get("in_training")
        moved = None if moved is None else fitting(self.trainer.model, moved, name)
        try:
            self.trainer.check_state(checkpoint)
        except ModelError as problem:
            raise ModelError(f"{name!r} is not of this run: {problem}") from problem
        self.trainer.load_state(checkpoint, weights, moved)

    def close(self) -> None:
        """Let others have the folder."""
        self._unlock()

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.release()

    @property
    def finished(self) -> bool:
        """Whether every step is done and the summary written."""
        trainer = self.trainer
        done = trainer.step >= trainer.total_steps and self.folder.summary() is not None
        return bool(self.ranks.from_first(done))

    def advance(self, should_stop: Callable[[], int | None] = lambda: None) -> Iterator[Progress]:
        """Train to the end, a step at a time.

        Args:
            should_stop: Asked after every step; a signal number saves the state and stops.

        Raises:
            NumericsError: If a loss or gradient is not finite; the weights have not moved.
            Stopped: After saving, if `should_stop` said so.
        """
        try:
            for progress in self.trainer.advance():
                if progress.record is not None:
                    self._store(progress)
                yield progress
                number = self.ranks.largest(should_stop() or 0)
                if number:
                    self.trainer.reduce()
                    self._save(self.folder.last)
                    raise Stopped(
                        f"stopped by signal {number} in epoch {progress.epoch}; "
                        f"saved, go on with --resume --out {self.folder.path}",
                        number,
                    )
        except HesstraceError:
            self._unlock()
            raise

    def _store(self, progress: Progress) -> None:
        """Write down an epoch: its record first, then the state that goes beyond it."""
        if progress.record is None:
            return
        if self.ranks.is_first:
            self.folder.append_metrics(progress.record)
            self.events.add(progress.record)
        if progress.is_best:
            self._save(self.folder.best)
        if self.config.keep_checkpoints:
            self._save(self.folder.of_epoch(progress.epoch))
        if self.config.keep_checkpoints and self.ranks.is_first:
            self.folder.drop_before(progress.epoch - self.config.keep_checkpoints + 1)
        self._save(self.folder.last)

    def _save(self, path: Path) -> None:
        state = self.trainer.state() if self.ranks.is_first or self.trainer.is_sharded else {}
        if not self.ranks.is_first:
            return
        said = {"config": dataclasses.asdict(self.config), "versions": versions()}
        save_checkpoint(path, {"format": FORMAT, **state, **said})

    def finish(self) -> records.Run:
        """Evaluate the last weights, estimate their trace, and write the summary."""
        model = self.trainer.whole_model()
        summary = self._summary(model) if self.ranks.is_first else None
        if summary is not None:
            self.folder.write_summary(summary)
            self._unlock()
        written: records.Run = self.ranks.from_first(summary)
        return written

    def _untrained(self) -> nn.Module:
        return self.trainer.untrained().to(self.trainer.device)

    def _summary(self, model: nn.Module) -> records.Run:
        config, trainer = self.config, self.trainer
        told = {r.name: r.description() for r in trainer.regularizers}
        asked: records.Asked = {}
        if trainer.num_averaged:
            asked["num_averaged"] = trainer.num_averaged
        if config.label_noise:
            asked["label_noise"] = config.label_noise
        return {
            "schema": RUN_SCHEMA,
            "regularizers": config.row().name,
            **asked,
            **summarize(model, trainer.data, config, self.folder.last, self._untrained),
            "trace_penalty": told.get("trace", told.get("trace-held")),
            "seconds": trainer.seconds,
            "device": str(trainer.device),
            "versions": versions(),
        }
