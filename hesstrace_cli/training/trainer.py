"""Training with regularizers: steps and epochs of a model on its data, with no folder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.amp import GradScaler
from torch.func import functional_call

from hesstrace_cli import records
from hesstrace_cli.analysis.estimation import trace_record
from hesstrace_cli.analysis.evaluation import Evaluation, evaluate, finite
from hesstrace_cli.analysis.loading import (
    check_fit,
    check_training_output,
    check_vocabulary,
    select_device,
)
from hesstrace_cli.autodiff.calls import native_outputs, trainable
from hesstrace_cli.autodiff.precision import deterministic_algorithms, run_in_precision
from hesstrace_cli.config import EstimateConfig, TrainConfig
from hesstrace_cli.config.schedule import learning_rate
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.data import DataSet, load_data, stratified_order
from hesstrace_cli.data.windows import TextSplit, streams
from hesstrace_cli.distributed import sharding
from hesstrace_cli.distributed.parallel import Ranks, join
from hesstrace_cli.distributed.sync_norm import sync_norms
from hesstrace_cli.errors import ConfigError, ModelError
from hesstrace_cli.failures import FAILURES, is_of_the_machine
from hesstrace_cli.models import build_model
from hesstrace_cli.models.language import Carrying
from hesstrace_cli.randomness import (
    derived_seed,
    random_state_kept,
    seed_defaults,
    stream_generator,
)
from hesstrace_cli.regularizers import Part, Regularizer, Setting, WeightAverage, build
from hesstrace_cli.storage.checkpoints import load_weights, read_checkpoint
from hesstrace_cli.storage.resume import check_state
from hesstrace_cli.storage.state import EpochSums
from hesstrace_cli.tasks.base import shape_of
from hesstrace_cli.training.average import Averaged
from hesstrace_cli.training.carried import Carried
from hesstrace_cli.training.step import Examples, Stepper, split_batch

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
        is_best: Whether its validation metric is the best so far, after its last step only.
    """

    epoch: int
    step: int
    steps: int
    record: records.Epoch | None = None
    is_best: bool = False


class Trainer:
    """A model, its data, its loss and regularizers, trained step by step.

    Args:
        config: The whole resolved config, the row's own settings in their places.
        data: To train and validate on.
        device: Where.
        ranks: The processes of the job.

    Attributes:
        model: The network, its weights as they are after `step` steps.
        objective: The loss trained on.
        regularizers: With their strengths.
        average: The averaged network beside the model, if there is one.
        carried: The state that the model carries along a text; None where it has none.
        step: Steps done.
        plateaus: Epochs that were no better on validation than all before.
        seconds: The time they took.
        sums: What the epoch at hand has added up.

    Raises:
        HesstraceError: If the model or a regularizer cannot be used.
    """

    def __init__(
        self, config: TrainConfig, data: DataSet, device: torch.device, ranks: Ranks
    ) -> None:
        self.config, self.data, self.device, self.ranks = config, data, device, ranks
        self.is_sharded = config.shard and ranks.size > 1
        # What is split has no room on one device: it is looked at on the CPU.
        self._built_on = torch.device("cpu") if self.is_sharded else device
        self.model = self._build_model()
        self.steps_per_epoch = self._count_steps()
        self.total_steps = self.steps_per_epoch * config.epochs
        self.objective = Objective(self.model, trainable(self.model), data.task)
        self.regularizers = self._build_regularizers()
        self._check_parts()
        if self.is_sharded:
            self._shard()
        self.optimizer = self._build_optimizer()
        self.stepper = Stepper(
            config, self.objective, self.regularizers, self.optimizer, ranks,
            generators=partial(stream_generator, config.seed, device),
            scaler=GradScaler(device.type, enabled=config.precision == "fp16"),
            norms=sync_norms(self.model, ranks) if config.sync_bn else None,
        )  # fmt: skip
        self.carried = self._build_carried()
        self.step, self.seconds, self.best_score, self.plateaus = 0, 0.0, -math.inf, 0
        self.sums = EpochSums.zero(device)
        self.average = self._build_average()

    def _build_average(self) -> Averaged | None:
        for regularizer in self.regularizers:
            if isinstance(regularizer, WeightAverage):
                model = self._bare_model().to(self.device)
                model.load_state_dict(self.model.state_dict())
                try:
                    return Averaged(
                        regularizer, model, steps_per_epoch=self.steps_per_epoch,
                        total_steps=self.total_steps,
                    )  # fmt: skip
                except FAILURES as problem:
                    if is_of_the_machine(problem):
                        raise
                    said = " ".join(str(problem).split())[:200]
                    raise ConfigError(
                        f"--reg {regularizer.name} keeps an averaged copy of the model, and this "
                        f"one cannot be copied: {said}"
                    ) from problem
        return None

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and saved as the run's: averaged, or as trained."""
        if self.average is None or not self.average.count_after(self.step):
            return self.model
        return self.average.network

    def untrained(self) -> nn.Module:
        """The model as it is before the first step, on the CPU."""
        config = self.config
        model = build_model(
            config.model,
            num_classes=self.data.num_classes,
            in_shape=self.data.in_shape,
            model_args=config.model_arg,
            seed=derived_seed(config.seed, "weights"),
            task=self.data.task.name,
        )
        if config.init is not None:
            checkpoint = read_checkpoint(config.init)
            check_vocabulary(checkpoint.content, self.data, config.init)
            load_weights(model, checkpoint.state_dict, config.init)
        return model

    def _build_model(self) -> nn.Module:
        config, model = self.config, self.untrained()
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        model = model.to(self._built_on, memory_format=layout).train()  # type: ignore[call-overload]
        self.num_outputs = check_fit(model, self.data, config.model)
        check_training_output(model, self.data, config.model)
        run_in_precision(model, config.precision, self.device)
        if config.precision != "float32":
            self._check_precision(model)
        return model

    def _check_precision(self, model: nn.Module) -> None:
        """Try a step's forward pass, as some devices lack some operations in half precision.

        Raises:
            ConfigError: If it fails where float32 does not.
        """
        X = next(self.data.train.batches(2))[0].to(self._built_on)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        try:
            with random_state_kept():
                functional_call(model, buffers, (X,))
        except (RuntimeError, ValueError) as problem:
            if is_of_the_machine(problem) or "more than 1 value per channel" in str(problem):
                return  # found, and said, where a step is taken
            said = " ".join(str(problem).split())[:200]
            raise ConfigError(
                f"--precision {self.config.precision}: model {self.config.model!r} does not run in "
                f"it on {self._built_on.type}: {said}"
            ) from problem

    def _shard(self) -> None:
        """Split the model over the processes; its parameters are others afterwards.

        Raises:
            ConfigError: If something needs the whole weights in a step.
        """
        config = self.config
        if config.compile or config.precision == "fp16":
            given = "--compile" if config.compile else "--precision fp16"
            raise ConfigError(f"--shard cannot be combined with {given}")
        for regularizer in self.regularizers:
            if regularizer.reads_weights is not None:
                raise ConfigError(
                    f"--shard splits the weights over the processes, and --reg {regularizer.name} "
                    f"cannot be used so: {regularizer.reads_weights}"
                )
        sharding.shard(self.model, self.device, self.ranks)
        self.objective = dataclasses.replace(self.objective, params=trainable(self.model))

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
        return split_batch(
            num_examples, self.ranks, rounds=self.config.accumulate, least=least,
            as_many=self.is_sharded,
        )  # fmt: skip

    def _check_parts(self) -> None:
        whole = [r.name for r in self.regularizers if not r.in_parts]
        if whole and (self.ranks.size > 1 or self.config.accumulate > 1):
            compiled = " (compiled)" if self.config.compile else ""
            raise ConfigError(
                f"--reg {whole[0]}{compiled} needs the gradient of the whole batch: it cannot be "
                "combined with --accumulate or several processes"
            )
        twice = [r.name for r in self.regularizers if r.order > 1]
        if twice and self.config.compile:
            raise ConfigError(
                f"--reg {twice[0]} takes second derivatives through the ordinary forward pass, "
                "which PyTorch cannot compile: leave out --compile"
            )

    @functools.cached_property
    def _takes_one_example(self) -> bool:
        X = next(self.data.train.batches(1))[0].to(self._built_on)
        try:
            with torch.no_grad(), random_state_kept():
                native_outputs(self.model.train(), X)
        except ValueError:  # "Expected more than 1 value per channel when training"
            return False
        return True

    def _build_carried(self) -> Carried | None:
        text = isinstance(self.data.train, TextSplit) and self.data.train.is_consecutive
        return (
            Carried(self.model, self.ranks) if text and isinstance(self.model, Carrying) else None
        )

    def _build_optimizer(self) -> torch.optim.Optimizer:
        config, params = self.config, list(trainable(self.model).values())
        groups: list[dict[str, Any]] = [{"params": params, "weight_decay": config.weight_decay}]
        if config.weight_decay_on == "matrices":
            groups[0]["params"] = [p for p in params if p.dim() > 1]
            groups.append({"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0})
        groups = [group for group in groups if group["params"]]
        if config.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=config.lr)
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
        )

    def _build_regularizers(self) -> list[Regularizer]:
        """Build them, and let them change the loss and look at it.

        Those of a resumed run look at the same: the weights that the run began with, and its first
        examples.

        Raises:
            ConfigError: If one makes no sense for this task.
        """
        config, task = self.config, self.data.task
        strengths = config.row().strengths
        for name in strengths:
            if name in task.refuses:
                raise ConfigError(
                    f"--reg {name} makes no sense with --task {task.name}: {task.refuses[name]}"
                )
        generator = Generator().manual_seed(derived_seed(config.seed, "order"))
        order = torch.randperm(len(self.data.train), generator=generator)
        targets = self.data.train.targets
        tried = min(_TRIED_EXAMPLES, config.batch_size)
        # A loss of no terms has all derivatives right.
        counting = (i for i in order if task.counts_all or task.num_terms(targets[i]) > 0)
        looked_at = torch.stack(list(itertools.islice(counting, _MORE * tried)))
        examples = next(self.data.train.parts([looked_at]))
        X, y = (each.to(self._built_on) for each in examples)
        self._check_augmentation(X, y)
        regularizers = build(strengths, config)
        for regularizer in regularizers:
            self.objective = regularizer.attach(self.objective)
        setting = Setting(
            self.objective, X, y, tried, self.num_outputs, self.total_steps, self.ranks
        )
        for regularizer in regularizers:
            regularizer.prepare(setting)
        return regularizers

    def _check_augmentation(self, X: Tensor, y: Tensor) -> None:
        """Refuse it of what is no image, and of images whose places have targets.

        Raises:
            ConfigError: If it would do nothing, or move an image and not its targets.
        """
        name = self.config.augment
        if name == "none":
            return
        if X.dim() != 4 or not X.is_floating_point():
            raise ConfigError(
                f"--augment {name} moves what is in images (N, C, H, W), and inputs have "
                f"{shape_of(X)}; leave it out"
            )
        if y.dim() > 2:
            raise ConfigError(
                f"--augment {name} moves what is in images, and their targets of {shape_of(y)} "
                "would stay where they are; leave it out"
            )

    @classmethod
    def of(cls, config: TrainConfig) -> Trainer:
        """With the data and on the device that the config names, and the processes of the job."""
        config = config.effective()
        device = select_device(config.device)
        return cls(config, load_data(config, device), device, join(device))

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step // self.steps_per_epoch

    def advance(self) -> Iterator[Progress]:
        """Train to the end, a step at a time.

        Raises:
            NumericsError: If a loss or gradient is not finite; the weights have not moved.
        """
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            with random_state_kept():
                yield from self._epoch(epoch, first)

    def _epoch(self, epoch: int, first: int) -> Iterator[Progress]:
        batches = self._batches(epoch)[first:]
        self.model.train()
        begin = time.monotonic()
        for index, examples in enumerate(self.examples(batches), start=first + 1):
            if self.carried is None:
                self.take_step(examples)
            else:
                self.carried.take(examples, self.take_step(self.carried.given(examples)))
            self.step += 1
            self.seconds += time.monotonic() - begin
            if index == self.steps_per_epoch:
                record, is_best = self._end_epoch(epoch + 1)
                yield Progress(epoch + 1, index, index, record, is_best)
            else:
                yield Progress(epoch + 1, index, self.steps_per_epoch)
            begin = time.monotonic()

    def _batches(self, epoch: int) -> Sequence[Tensor]:
        """The rows of an epoch's batches: at random, or along the text where a state is carried."""
        size, batch_size = len(self.data.train), self.config.batch_size
        if self.carried is not None:
            return streams(size, batch_size)[: self.steps_per_epoch]
        generator = Generator().manual_seed(derived_seed(self.config.seed, "order", epoch))
        order = torch.randperm(size, generator=generator)
        return order[: self.steps_per_epoch * batch_size].split(batch_size)

    def examples(self, batches: Sequence[Tensor]) -> Iterator[list[Examples]]:
        """This process's parts of batches that are given by their rows in the training set."""
        parts = [self._parts(len(batch)) for batch in batches]
        rows = [batch[part.rows] for batch, own in zip(batches, parts, strict=True) for part in own]
        loaded = self.data.train.parts(rows)
        for own in parts:
            yield [(*next(loaded), part) for part in own]

    def take_step(self, examples: Sequence[Examples]) -> list[Tensor]:
        """Move the weights as step number `step` does, which is for the caller to raise.

        It gives the states that a recurrent model ended with, see `Stepper.step`.

        The global random state, which the model's own Dropout draws from, is seeded for the step,
        so that a run resumed in mid-epoch needs none saved, in any of its processes.
        """
        seed_defaults(derived_seed(self.config.seed, "model", self.step, self.ranks.rank))
        progress = self.step / self.total_steps
        lr = learning_rate(self.config, progress, self.plateaus)
        with deterministic_algorithms(self.device):
            ends = self.stepper.step(examples, self.step, progress, lr, self.sums)
        if self.average is not None:
            self.average.add(self.model, self.step + 1)
        return ends

    def _renew_average(self) -> None:
        """Make the averaged network ready to be judged, and the first of its epochs the best."""
        average = self.average
        if average is None or not average.count_after(self.step):
            return
        if not average.count_after(self.step - self.steps_per_epoch):
            self.best_score = -math.inf
        seed_defaults(derived_seed(self.config.seed, "statistics", self.step))
        rows = torch.arange(len(self.data.train))[: self.steps_per_epoch * self.config.batch_size]
        batches = self.data.train.parts(rows.split(self.config.batch_size))
        with deterministic_algorithms(self.device):
            average.renew(self.model, batches)

    def _end_epoch(self, epoch: int) -> tuple[records.Epoch, bool]:
        """The record of an epoch, and whether it is the best so far."""
        sums, terms = self.reduce(), max(1, self.sums.examples)
        record: records.Epoch = {
            "epoch": epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sums.loss.item() / terms,
            "train_accuracy": sums.correct.item() / terms if self.data.task.has_accuracy else None,
            "penalty_trace": sums.penalty.item() / sums.penalty_steps
            if sums.penalty_steps
            else None,
            "seconds": self.seconds,
        }
        if self.config.precision == "fp16":
            record["skipped_steps"] = sums.skipped
        self._renew_average()
        found = None
        if self.data.val is not None:
            found = evaluate(self.judged, self.data.val, self.config.batch_size)
            record["val_loss"] = finite(found.loss)
            record["val_accuracy"] = found.accuracy
            record["val_metrics"] = found.finite_metrics()
        if self.config.monitor_trace and epoch % self.config.monitor_trace == 0:
            record["trace"], record["trace_stderr"] = self._monitored_trace()
        self.sums = EpochSums.zero(self.device)
        if self.carried is not None:
            self.carried.state = None
        is_best = found is not None and self._is_best(found)
        self.plateaus += found is not None and not is_best
        return record, is_best

    def _is_best(self, found: Evaluation) -> bool:
        """By the task's own metric; the first epoch of several that are alike."""
        score = self.data.task.selection.score(found.loss, found.metrics)
        if not score > self.best_score:
            return False
        self.best_score = score
        return True

    def reduce(self) -> EpochSums:
        """The epoch's figures over all processes, and the first one's running statistics."""
        if self.ranks.size == 1:
            return self.sums
        own = self.sums
        examples = torch.tensor(own.examples, device=self.device)
        self.ranks.sum_([own.loss, own.correct, own.penalty, examples])
        self.ranks.take_first_(list(self.model.buffers()))
        self.sums = dataclasses.replace(own, examples=int(examples.item()))
        return self.sums

    def _monitored_trace(self) -> tuple[float | None, float | None]:
        """The trace on a subset that stays the same, in eval mode, and its standard error."""
        split, model = self.data.train, self.whole_model()
        split = split.subset(stratified_order(split.targets, 0)[:_MONITORED_EXAMPLES])
        config = EstimateConfig(rtol=0.1, max_seconds=60, batch_size=100)
        if not self.ranks.is_first:
            return None, None
        record = trace_record(model, split, config)
        return record["trace"], record["stderr"]

    def whole_model(self) -> nn.Module:
        """What is judged, with all its weights; where they are split, a copy, by all processes."""
        if not self.is_sharded:
            return self.judged
        weights = sharding.whole(self.model.state_dict())
        model = self._bare_model()
        model.load_state_dict(weights)
        return model.to(self.device)

    def _bare_model(self) -> nn.Module:
        """Another of the same architecture, without what training does to it."""
        config = self.config
        return build_model(
            config.model, num_classes=self.data.num_classes, in_shape=self.data.in_shape,
            model_args=config.model_arg, seed=0, task=self.data.task.name,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """All that training goes on from, and what the data was, as a checkpoint holds them.

        Where weights are split, they are gathered: all processes come here. Where they are
        averaged, `state_dict` is the averaged network, and `in_training` what steps move.
        """
        model, optimizer = self.judged.state_dict(), self.optimizer.state_dict()
        if self.is_sharded:
            model, optimizer = sharding.whole(model), sharding.whole(optimizer)
        state = None if self.carried is None else self.carried.state
        carried = {} if state is None else {"carried": state}
        return {
            "state_dict": model,
            "optimizer": optimizer,
            "step": self.step,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "best_score": self.best_score,
            "plateaus": self.plateaus,
            "sums": dataclasses.asdict(self.sums),
            "scaler": self.stepper.scaler.state_dict(),
            **self._made_for(),
            **self._in_training(),
            **carried,
        }

    def _in_training(self) -> dict[str, Any]:
        if self.judged is self.model:
            return {}
        return {"in_training": self.model.state_dict(), "num_averaged": self.num_averaged}

    @property
    def num_averaged(self) -> int:
        """How many weights those that are judged are the average of; 0 for those of training."""
        return 0 if self.average is None else self.average.count_after(self.step)

    def _made_for(self) -> dict[str, Any]:
        """What a checkpoint says of the data."""
        text = {} if self.data.vocabulary is None else {"vocabulary": self.data.vocabulary}
        return {
            "preprocess": self.data.preprocess.as_dict(),
            "num_classes": self.data.num_classes,
            "in_shape": list(self.data.in_shape),
            **text,
        }

    def check_state(self, checkpoint: dict[str, Any]) -> None:
        """Make sure that training can go on from a checkpoint's state.

        Raises:
            ModelError: If it is another's.
        """
        check_state(
            checkpoint, self.optimizer, self.stepper.scaler, total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch, made_for=self._made_for(),
        )  # fmt: skip
        expected = 0 if self.average is None else self.average.count_after(checkpoint["step"])
        count = checkpoint.get("num_averaged", 0) if "in_training" in checkpoint else 0
        if count != expected:
            raise ModelError(
                f"it has the average of {count} weights, and after step {checkpoint['step']} the "
                f"run's is of {expected}"
            )
        if self.carried is not None and checkpoint["step"] % self.steps_per_epoch:
            self.carried.check(checkpoint, min(self.config.batch_size, len(self.data.train)))

    def load_state(
        self,
        checkpoint: dict[str, Any],
        weights: Mapping[str, Any],
        in_training: Mapping[str, Any] | None = None,
    ) -> None:
        """Go on from a state that was checked.

        Args:
            checkpoint: Of `state`.
            weights: Its state dict, as it fits the model.
            in_training: What steps move where that is another, as it fits the model.
        """
        if in_training is not None and self.average is not None:
            self.average.load(weights, checkpoint["num_averaged"])
            weights = in_training
        if self.is_sharded:
            sharding.place_weights(self.model, weights)
            sharding.place_optimizer(self.optimizer, checkpoint["optimizer"])
        else:
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        self.best_score = checkpoint["best_score"]
        self.plateaus = checkpoint.get("plateaus", 0)
        if self.carried is not None and "carried" in checkpoint:
            self.carried.state = checkpoint["carried"].to(self.device)
        self.stepper.scaler.load_state_dict(checkpoint["scaler"])
        saved: dict[str, Any] = checkpoint["sums"]
        moved: dict[str, Any] = {
            k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in saved.items()
        }
        self.sums = EpochSums(**moved)
        if not self.ranks.is_first:  # they are of all processes: one alone goes on from them
            none = EpochSums.zero(self.device)
            none.penalty_steps, none.skipped = self.sums.penalty_steps, self.sums.skipped
            self.sums = none
