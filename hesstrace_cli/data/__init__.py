"""Data sets by name, checked, split and preprocessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hesstrace_cli.config import LARGEST, SEQ_LEN, WORD, DataConfig, TrainConfig, is_text
from hesstrace_cli.data.checks import example_of, same_kind, stacked, targets_of
from hesstrace_cli.data.held import HeldSplit
from hesstrace_cli.data.label_noise import Relabelled, noisy
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.sources import Arrays, Images, Source, is_data_plugin, open_source
from hesstrace_cli.data.splits import (
    Collate,
    DatasetSplit,
    Examples,
    Split,
    TensorSplit,
    readable,
    stratified_order,
)
from hesstrace_cli.data.targets import balanced_weights, count_outputs, task_and_reason
from hesstrace_cli.data.text import read_text
from hesstrace_cli.data.windows import TextSplit
from hesstrace_cli.errors import ConfigError, DataError
from hesstrace_cli.tasks import Task, task_of

__all__ = ["DataSet", "Examples", "Split", "is_data_plugin", "load_data", "stratified_order"]

_HELD = 1 << 29  # bytes of image files that are kept decoded, on the device
_AUTO = "auto: "  # begins the reason of a task that was not named
_SUBSET_SEED = 0  # of subsets and validation splits: the same for every --seed


@dataclass(frozen=True)
class DataSet:
    """A data set, ready for training: what a run trains, validates and tests on.

    Attributes:
        name: As given on the command line.
        train: The training examples, without those held out.
        val: The examples held out of the training data, or a text's own; None without validation.
        test: The test examples.
        num_classes: How many outputs a model needs: the classes, numbered from 0, or the numbers
            of a target.
        in_shape: Shape of one input.
        preprocess: What is done to every batch.
        task_reason: Why it is this task.
        vocabulary: What the numbers of a text's tokens mean, in a few words; None of no text.
    """

    name: str
    train: Split
    val: Split | None
    test: Split
    num_classes: int
    in_shape: tuple[int, ...]
    preprocess: Preprocess
    task_reason: str
    vocabulary: str | None = None

    @property
    def task(self) -> Task:
        """What it is for."""
        return self.train.task

    @property
    def task_note(self) -> str | None:
        """What `--task auto` took and why; None for class numbers, or where a task was named."""
        usual = self.task.name == "classification" and not self.train.targets.is_floating_point()
        if usual or not self.task_reason.startswith(_AUTO):
            return None
        return f"--task auto takes {self.task.name}: {self.task_reason.removeprefix(_AUTO)}"


def load_data(
    config: DataConfig,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    recorded: Mapping[str, Any] | None = None,
) -> DataSet:
    """Load the config's data set, check it, and hold out the validation split.

    Args:
        config: Names the data set; its model, dataset and val_fraction are resolved.
        device: Where batches go.
        dtype: Floating-point type of the batches.
        recorded: The preprocessing of a checkpoint, used unless `--mean` is given.

    Raises:
        DataError: If it is missing, empty, or holds inputs or targets that the task does not take.
    """
    assert config.dataset is not None
    if is_text(config.dataset):
        return _load_text(config, device)
    source = open_source(
        config.dataset, data_dir=config.data_dir or "data", download=config.download,
        image_size=config.image_size,
    )  # fmt: skip
    _check_is_no_text(config)
    preprocess = _preprocess(config, source, recorded)

    def split(part: Arrays | Dataset[Any], name: str) -> Split:
        return _split(part, f"{config.dataset} ({name})", preprocess, device, dtype, config)

    train, test = split(source.train, "train"), split(source.test, "test")
    _check_kinds(source, config.dataset)
    if config.mean is not None and _kind_of(source.train, config.dataset) == torch.int64:
        raise ConfigError(
            f"--mean and --std shift and scale numbers, and the inputs of {config.dataset} are "
            "indices; leave them out"
        )
    task, reason = task_and_reason(config, train.targets)
    for name, part in (("train", train), ("test", test)):
        task.check_targets(part.targets, f"{config.dataset} ({name})")
    num_classes = count_outputs(task, config, source.num_classes, train.targets, test.targets)
    train, val = _hold_out(train, config)
    targets = train.targets
    if config.label_noise:
        targets = noisy(targets, config.label_noise, task)
    if config.class_weights == "balanced":
        weights = balanced_weights(targets, num_classes, task)
        task = task_of(task.name, class_weights=weights, ignore_index=config.ignore_index)
    train, test = train.of_task(task), test.of_task(task)
    val = None if val is None else val.of_task(task)
    if isinstance(config, TrainConfig):  # uses them all: what is damaged is found before the work
        train, test = _at_once(train), _at_once(test)
        val = None if val is None else _at_once(val)
    if config.label_noise:
        train = Relabelled(train, targets)
    in_shape, tested = (tuple(next(part.batches(1))[0].shape[1:]) for part in (train, test))
    if len(in_shape) != len(tested) or in_shape[0] != tested[0]:
        raise DataError(
            f"{config.dataset}: a training input has shape {in_shape}, a test input {tested}, "
            "expected the same"
        )
    return DataSet(config.dataset, train, val, test, num_classes, in_shape, preprocess, reason)


def _check_is_no_text(config: DataConfig) -> None:
    usual = {"vocab_size": None, "train_tokens": None, "tokens": WORD, "seq_len": SEQ_LEN}
    for name, value in usual.items():
        if getattr(config, name) not in (None, value):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is for a text; --dataset is {config.dataset}, leave it out")


def _load_text(config: DataConfig, device: torch.device) -> DataSet:
    """A text's own three parts, cut into windows."""
    name = str(config.dataset)
    if config.task not in (None, "auto", "tokens"):
        raise ConfigError(
            f"--task is {config.task}, and {name} is a text, of which the next token is predicted; "
            "leave it out"
        )
    if config.mean is not None or config.image_size is not None:
        raise ConfigError(f"--mean, --std and --image-size are of images, and {name} is a text")
    if config.label_noise:
        raise ConfigError(f"--label-noise is of labels, and {name} is a text, which has none")
    text = read_text(config)
    size, length = text.vocabulary.size, config.seq_len or SEQ_LEN
    if config.num_classes not in (None, size):
        raise ConfigError(
            f"--num-classes is {config.num_classes}, and the vocabulary of {name} has {size} "
            "tokens; --vocab-size makes it smaller"
        )
    weights = config.class_weights_given()
    task = task_of("tokens", class_weights=weights, ignore_index=config.ignore_index)
    if config.class_weights == "balanced":
        balanced = balanced_weights(text.train[1:], size, task)
        task = task_of("tokens", class_weights=balanced, ignore_index=config.ignore_index)

    def split(part: Tensor) -> TextSplit:
        return TextSplit.of(part.to(device), length, task, config.ignore_index)

    return DataSet(
        name, split(text.train), None if text.valid is None else split(text.valid),
        split(text.test), size, (length,), Preprocess(), "each next token of a text",
        str(text.vocabulary),
    )  # fmt: skip


def _at_once(split: Split) -> Split:
    return split.held() if isinstance(split, HeldSplit) else split


def _preprocess(
    config: DataConfig, source: Source, recorded: Mapping[str, Any] | None
) -> Preprocess:
    usual: dict[str, Any] = {"mean": source.mean, "std": source.std, "scale": source.scale}
    if recorded is not None:
        usual = {**usual, **recorded}
    if config.mean is not None and config.std is not None:
        usual |= {"mean": config.mean, "std": config.std}
    if config.model is not None and config.model.startswith("torchvision:"):
        usual["channels"] = 3
    return Preprocess.from_dict(usual)


def _split(
    part: Arrays | Dataset[Any],
    name: str,
    preprocess: Preprocess,
    device: torch.device,
    dtype: torch.dtype,
    config: DataConfig,
) -> Split:
    if isinstance(part, Arrays):
        _check_finite(part.inputs, name)
        return TensorSplit(part.inputs.to(device), part.targets.to(device), preprocess, dtype)
    if _length(part, name) == 0:
        raise DataError(f"{name} has no examples")
    targets = _targets_of(part, name)
    files = DatasetSplit(
        part, torch.arange(len(targets)), targets, preprocess, device, config.num_workers, dtype,
        Collate(name, _kind_of(part, name)),
    )  # fmt: skip
    if isinstance(part, Images) and config.image_size is not None:
        numbers = len(targets) * 3 * config.image_size**2
        return HeldSplit(files) if numbers <= _HELD else files
    return files


def _check_finite(inputs: Tensor, name: str) -> None:
    if inputs.is_floating_point():
        finite = torch.isfinite(inputs).flatten(1).all(1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise DataError(f"{name}: {int((~finite).sum())} inputs hold NaN or infinite values, "
                            f"the first is number {first}")  # fmt: skip


def _kind_of(part: Arrays | Dataset[Any], name: str) -> torch.dtype:
    """The type of the inputs; of a Dataset's the first."""
    if isinstance(part, Arrays):
        return part.inputs.dtype
    if isinstance(part, Images):
        return torch.uint8
    (first,) = readable((part[i] for i in range(1)), name)
    return example_of(first, name)[0].dtype


def _check_kinds(source: Source, name: str) -> None:
    train, test = _kind_of(source.train, name), _kind_of(source.test, name)
    if not same_kind(train, test):
        raise DataError(
            f"{name}: training inputs are {train}, test inputs are {test}: uint8 is scaled to "
            "[0, 1] and the other is not; expected the same"
        )


def _length(dataset: Dataset[Any], name: str) -> int:
    length = len(dataset)  # type: ignore[arg-type]
    if length > LARGEST:
        raise DataError(f"{name} says that it has {length} examples, expected at most {LARGEST}")
    return length


def _targets_of(dataset: Dataset[Any], name: str) -> Tensor:
    """The targets: what the Dataset says in its `targets`, else those of every example."""
    length = _length(dataset, name)
    said = getattr(dataset, "targets", None)
    if said is None or getattr(dataset, "target_transform", None) is not None:
        examples = readable((dataset[i] for i in range(length)), name)
        return stacked([example_of(example, name)[1] for example in examples], name)
    targets = targets_of(said, name)
    if len(targets) != length:
        raise DataError(f"{name} has {length} examples, but {len(targets)} `targets`")
    return targets


def _hold_out(train: Split, config: DataConfig) -> tuple[Split, Split | None]:
    """Take the fixed subset, if one is asked for, and the validation examples out of it."""
    order = stratified_order(train.targets, _SUBSET_SEED)
    if config.train_examples is not None:
        if config.train_examples > len(train):
            raise DataError(
                f"--train-examples is {config.train_examples}, {config.dataset} has {len(train)}"
            )
        order = order[: config.train_examples]
    held_out = round(len(order) * (config.val_fraction or 0.0))
    if held_out == 0 and config.val_fraction:
        raise DataError(
            f"--val-fraction {config.val_fraction:g} of {len(order)} examples holds none out; "
            "give 0 for no validation"
        )
    if held_out == 0:
        return train.subset(order), None
    if held_out == len(order):
        raise DataError(f"{len(order)} examples are too few for --val-fraction")
    return train.subset(order[held_out:]), train.subset(order[:held_out])
