"""Training with regularizers: one step, one epoch, one run; resumed to the bit."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.amp import GradScaler

from hesstrace_cli.checkpoints import fitting, load_weights, read_checkpoint, save_checkpoint
from hesstrace_cli.config import EstimateConfig, TrainConfig, parse_row, row_name
from hesstrace_cli.curvature.objective import Objective, call_as_it_is, trainable
from hesstrace_cli.data import DataSet, load_data, stratified_order
from hesstrace_cli.errors import ConfigError, HesstraceError, ModelError, Stopped
from hesstrace_cli.estimation import trace_record, versions
from hesstrace_cli.evaluation import evaluate, finite
from hesstrace_cli.loading import check_fit, check_training_output, select_device
from hesstrace_cli.models import build_model
from hesstrace_cli.parallel import join
from hesstrace_cli.precision import deterministic_algorithms, run_in_precision
from hesstrace_cli.randomness import (
    derived_seed,
    random_state_kept,
    seed_defaults,
    stream_generator,
)
from hesstrace_cli.records import RUN_SCHEMA
from hesstrace_cli.regularizers import Part, Regularizer, build
from hesstrace_cli.regularizers.trace import CurvatureChoice, TracePenalty, choose_curvature
from hesstrace_cli.reporting.events import Events
from hesstrace_cli.resume import check_state
from hesstrace_cli.runs import RunFolder, default_folder
from hesstrace_cli.schedule import learning_rate
from hesstrace_cli.state import FORMAT, Sums
from hesstrace_cli.steps import Examples, Stepper, split_batch
from hesstrace_cli.summary import summarize
from hesstrace_cli.sync_norm import sync_norms

_MONITORED_EXAMPLES = 500
_TRIED_EXAMPLES = 16  # in double precision; times as many where these prove nothing:
_MORE = 4


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Attributes:
        epoch: From 1.
        step: Steps done in this epoch.
        steps: Steps in an epoch.
        record: The epoch's metrics, after its last step only.
    """

    epoch: int
    step: int
    steps: int
    record: dict[str, Any] | None = None


class Run:
    """A training run in its folder: made, or resumed, by `Run(config)`; stepped by `advance`.

    Args:
        config: The whole resolved config.

    Raises:
        HesstraceError: If the folder, data, model or checkpoint cannot be used.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.folder = RunFolder(Path(config.out) if config.out else default_folder(config))
        self.config = dataclasses.replace(config, out=str(self.folder.path))
        self.device = select_device(config.device)
        self.ranks = join(self.device)
        if self.ranks.is_first:
            self.folder.check_place(self.config)
        self.data: DataSet = load_data(config, self.device)
        self.model = self._build_model()
        self.optimizer = self._build_optimizer()
        self.steps_per_epoch = self._count_steps()
        self.total_steps = self.steps_per_epoch * config.epochs
        self.row = parse_row(config.reg, config.lambda_)
        if "trace" in self.row and 1 < self.total_steps <= config.every:
            raise ConfigError(
                f"--every is {config.every}, but the run has {self.total_steps} steps: the "
                "penalty would never be added"
            )
        self.task = self.data.train.task
        self.curvature = self._choose_curvature()
        self.regularizers = self._build_regularizers()
        self._check_parts()
        self._check_derivatives()
        norms = sync_norms(self.model, self.ranks) if config.sync_bn else None
        self.stepper = Stepper(
            config, self._objective(), self.regularizers, self.optimizer, self.ranks,
            generators=partial(stream_generator, config.seed, self.device),
            scaler=GradScaler(self.device.type, enabled=config.precision == "fp16"),
            norms=norms,
        )  # fmt: skip
        self.step, self.seconds, self.best_accuracy = 0, 0.0, -1.0
        self.sums = Sums.zero(self.device)
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
            checkpoint = self.folder.open(self.config, self.steps_per_epoch)
        checkpoint = self.ranks.from_first(checkpoint)
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.ranks.is_first:
            self.folder.make_longer(self.config)
            self.folder.truncate_metrics(self.step // self.steps_per_epoch)

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def _build_model(self) -> nn.Module:
        config = self.config
        model = build_model(
            config.model,
            num_classes=self.data.num_classes,
            in_shape=self.data.in_shape,
            model_args=config.model_arg,
            seed=derived_seed(config.seed, "weights"),
        )
        if config.init is not None:
            load_weights(model, read_checkpoint(config.init).state_dict, config.init)
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        model = model.to(self.device, memory_format=layout).train()  # type: ignore[call-overload]
        self.num_logits = check_fit(model, self.data, config.model)
        check_training_output(model, self.data, config.model)
        run_in_precision(model, config.precision, self.device)
        return model

    def _count_steps(self) -> int:
        """Steps in an epoch; one example left over that has no batch statistics sits it out.

        Raises:
            ConfigError: If no batch has batch statistics.
        """
        size, batch_size = len(self.data.train), self.config.batch_size
        if (min(size, batch_size) > 1 and size % batch_size != 1) or self._takes_one_example:
            return math.ceil(size / batch_size)
        if min(size, batch_size) == 1:
            raise ConfigError(
                "a batch of one example has no batch statistics here; give a larger --batch-size, "
                "more examples, or a model without BatchNorm"
            )
        return size // batch_size

    def _parts(self, num_examples: int) -> list[Part]:
        alone = self.ranks.size == self.config.accumulate == 1
        least = 1 if alone or self._takes_one_example else 2
        return split_batch(num_examples, self.ranks, rounds=self.config.accumulate, least=least)

    def _check_parts(self) -> None:
        whole = [r.name for r in self.regularizers if not r.splits]
        if whole and (self.ranks.size > 1 or self.config.accumulate > 1):
            compiled = " (compiled)" if self.config.compile else ""
            raise ConfigError(
                f"--reg {whole[0]}{compiled} needs the gradient of the whole batch: it cannot be "
                "combined with --accumulate or several processes"
            )
        if self.config.sync_bn and (self.config.accumulate > 1 or self.config.compile):
            raise ConfigError("--sync-bn cannot be combined with --accumulate or --compile")
        twice = [r.name for r in self.regularizers if r.order > 1]
        if twice and self.config.compile:
            raise ConfigError(
                f"--reg {twice[0]} takes second derivatives through the ordinary forward pass, "
                "which PyTorch cannot compile: leave out --compile"
            )

    @functools.cached_property
    def _takes_one_example(self) -> bool:
        X, _ = next(self.data.train.batches(1))
        try:
            with torch.no_grad(), random_state_kept():
                call_as_it_is(self.model.train(), X)
        except ValueError:  # "Expected more than 1 value per channel when training"
            return False
        return True

    def _build_optimizer(self) -> torch.optim.Optimizer:
        config, params = self.config, trainable(self.model).values()
        if config.optimizer == "adamw":
            return torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay)
        return torch.optim.SGD(
            params, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )  # fmt: skip

    def _choose_curvature(self) -> CurvatureChoice:
        X, _ = next(self.data.train.batches(2))
        return choose_curvature(self.config.curvature, self._objective(), X)

    def _build_regularizers(self) -> list[Regularizer]:
        resolved = dataclasses.replace(
            self.config, curvature=self.curvature.curvature, num_classes=self.num_logits
        )
        regularizers = build(self.row, resolved)
        for regularizer in regularizers:
            regularizer.attach(self.model)
        smoothing = sum(regularizer.label_smoothing for regularizer in regularizers)
        if smoothing:
            self.task = self.task.smoothed(smoothing)
        return regularizers

    def _check_derivatives(self) -> None:
        """Choose how a trace penalty is differentiated, by a trial on the first examples.

        A resumed run chooses the same: it tries the same weights, those that the run began with.
        """
        for penalty in self._penalties():
            generator = Generator().manual_seed(derived_seed(self.config.seed, "order"))
            order = torch.randperm(len(self.data.train), generator=generator)
            first = min(_TRIED_EXAMPLES, self.config.batch_size)
            X, y = next(self.data.train.parts([order[: _MORE * first]]))
            penalty.check(self._objective(), X, y, first)
            penalty.engine = self.ranks.from_first(penalty.engine)

    def _penalties(self) -> list[TracePenalty]:
        return [r for r in self.regularizers if isinstance(r, TracePenalty)]

    def _objective(self) -> Objective:
        return Objective(self.model, trainable(self.model), self.task)

    @property
    def finished(self) -> bool:
        """Whether every step is done and the summary written."""
        done = self.step >= self.total_steps and self.folder.summary() is not None
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
            while self.step < self.total_steps:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                with random_state_kept():
                    yield from self._epoch(epoch, first, should_stop)
        except HesstraceError:
            self._unlock()
            raise

    def _epoch(
        self, epoch: int, first: int, should_stop: Callable[[], int | None]
    ) -> Iterator[Progress]:
        generator = Generator().manual_seed(derived_seed(self.config.seed, "order", epoch))
        order = torch.randperm(len(self.data.train), generator=generator)
        order = order[: self.steps_per_epoch * self.config.batch_size]
        batches = order.split(self.config.batch_size)[first:]
        self.model.train()
        begin = time.monotonic()
        for index, examples in enumerate(self.examples(batches), start=first + 1):
            self.take_step(examples)
            self.step += 1
            self.seconds += time.monotonic() - begin
            if index == self.steps_per_epoch:
                yield Progress(epoch + 1, index, index, self._end_epoch(epoch + 1))
            else:
                yield Progress(epoch + 1, index, self.steps_per_epoch)
            begin = time.monotonic()
            number = self.ranks.largest(should_stop() or 0)
            if number:
                self._reduce()
                self._save(self.folder.last)
                raise Stopped(
                    f"stopped by signal {number} in epoch {epoch + 1}; "
                    f"saved, go on with --resume --out {self.folder.path}",
                    number,
                )

    def examples(self, batches: Sequence[Tensor]) -> Iterator[list[Examples]]:
        """This process's parts of batches that are given by their rows in the training set."""
        parts = [self._parts(len(batch)) for batch in batches]
        rows = [batch[part.rows] for batch, own in zip(batches, parts, strict=True) for part in own]
        loaded = self.data.train.parts(rows)
        for own in parts:
            yield [(*next(loaded), part) for part in own]

    def take_step(self, examples: Sequence[Examples]) -> None:
        """Move the weights as step number `step` does, which is for the caller to raise.

        The global random state, which the model's own Dropout draws from, is seeded for the step,
        so that a run resumed in mid-epoch needs none saved, in any of its processes.
        """
        seed_defaults(derived_seed(self.config.seed, "model", self.step, self.ranks.rank))
        progress = self.step / self.total_steps
        lr = learning_rate(self.config, progress)
        with deterministic_algorithms(self.device):
            self.stepper.step(examples, self.step, progress, lr, self.sums)

    def _end_epoch(self, epoch: int) -> dict[str, Any]:
        sums = self._reduce()
        record: dict[str, Any] = {
            "epoch": epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sums.loss.item() / sums.examples,
            "train_accuracy": sums.correct.item() / sums.examples,
            "penalty_trace": sums.penalty.item() / sums.penalty_steps
            if sums.penalty_steps
            else None,
        }
        if self.config.precision == "fp16":
            record["skipped_steps"] = sums.skipped
        if self.data.val is not None:
            found = evaluate(self.model, self.data.val, self.config.batch_size)
            record |= {"val_loss": finite(found.loss), "val_accuracy": found.accuracy}
        if self.config.monitor_trace and epoch % self.config.monitor_trace == 0:
            record |= self._monitored_trace()
        record["seconds"] = self.seconds
        self.sums = Sums.zero(self.device)
        if self.ranks.is_first:
            self.folder.append_metrics(record)
            self.events.add(record)
        accuracy = record.get("val_accuracy", -1.0)
        if accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            self._save(self.folder.best)
        if self.config.keep_checkpoints:
            self._save(self.folder.of_epoch(epoch))
            if self.ranks.is_first:
                self.folder.drop_before(epoch - self.config.keep_checkpoints + 1)
        self._save(self.folder.last)
        return record

    def _reduce(self) -> Sums:
        """The epoch's figures over all processes, and the first one's running statistics."""
        if self.ranks.size == 1:
            return self.sums
        own = self.sums
        examples = torch.tensor(own.examples, device=self.device)
        self.ranks.sum_([own.loss, own.correct, own.penalty, examples])
        self.ranks.take_first_(list(self.model.buffers()))
        self.sums = dataclasses.replace(own, examples=int(examples.item()))
        return self.sums

    def _monitored_trace(self) -> dict[str, float | None]:
        """The trace on a subset that stays the same, in eval mode."""
        split = self.data.train
        split = split.subset(stratified_order(split.targets, 0)[:_MONITORED_EXAMPLES])
        config = EstimateConfig(rtol=0.1, max_seconds=60, batch_size=100)
        record = trace_record(self.model, split, config) if self.ranks.is_first else {}
        return {"trace": record.get("trace"), "trace_stderr": record.get("stderr")}

    def _save(self, path: Path) -> None:
        if not self.ranks.is_first:
            return
        save_checkpoint(
            path,
            {
                "format": FORMAT,
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "epoch": self.step // self.steps_per_epoch,
                "seconds": self.seconds,
                "best_accuracy": self.best_accuracy,
                "sums": dataclasses.asdict(self.sums),
                "scaler": self.stepper.scaler.state_dict(),
                "config": dataclasses.asdict(self.config),
                **self._made_for(),
                "versions": versions(),
            },
        )

    def _made_for(self) -> dict[str, Any]:
        """What a checkpoint says of the data."""
        return {
            "preprocess": self.data.preprocess.as_dict(),
            "num_classes": self.data.num_classes,
            "in_shape": list(self.data.in_shape),
        }

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        name = str(self.folder.last)
        weights = fitting(self.model, checkpoint["state_dict"], name)
        try:
            check_state(
                checkpoint, self.optimizer, self.stepper.scaler, total_steps=self.total_steps,
                steps_per_epoch=self.steps_per_epoch, made_for=self._made_for(),
            )  # fmt: skip
        except ModelError as problem:
            raise ModelError(f"{name!r} is not of this run: {problem}") from problem
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        self.best_accuracy = checkpoint["best_accuracy"]
        self.stepper.scaler.load_state_dict(checkpoint["scaler"])
        saved: dict[str, Any] = checkpoint["sums"]
        moved: dict[str, Any] = {
            k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in saved.items()
        }
        self.sums = Sums(**moved)
        if not self.ranks.is_first:  # they are of all processes: one alone goes on from them
            none = Sums.zero(self.device)
            none.penalty_steps, none.skipped = self.sums.penalty_steps, self.sums.skipped
            self.sums = none

    def finish(self) -> dict[str, Any]:
        """Evaluate the last weights, estimate their trace, and write the summary."""
        summary = None
        if self.ranks.is_first:
            summary = {
                "schema": RUN_SCHEMA,
                "regularizers": row_name(self.row),
                **summarize(self.model, self.data, self.config, self.folder.last),
                "trace_penalty": self._penalty_description(),
                "seconds": self.seconds,
                "device": str(self.device),
                "versions": versions(),
            }
            self.folder.write_summary(summary)
            self._unlock()
        written: dict[str, Any] = self.ranks.from_first(summary)
        return written

    def _penalty_description(self) -> dict[str, Any] | None:
        if "trace" not in self.row:
            return None
        names = ("estimator", "dropout_scheme", "keep_prob", "num_probes", "every", "warmup")
        settings = {name: getattr(self.config, name) for name in names}
        engine = {}
        for penalty in self._penalties():
            engine = dataclasses.asdict(penalty.engine)
            del engine["others"]
        return {**dataclasses.asdict(self.curvature), **engine, **settings}
