"""A checkpoint's model and data, as the file and the flags describe them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesstrace_cli import records
from hesstrace_cli.autodiff.calls import eval_mode, native_outputs
from hesstrace_cli.autodiff.casting import cast_model
from hesstrace_cli.config import CheckpointConfig, DataConfig, is_text, shortened, whole_number
from hesstrace_cli.curvature.per_example.independence import MixedExamples, check_independence
from hesstrace_cli.data import DataSet, Split, is_data_plugin, load_data, stratified_order
from hesstrace_cli.distributed import launcher
from hesstrace_cli.errors import ConfigError, ModelError
from hesstrace_cli.failures import is_of_the_machine
from hesstrace_cli.models import build_model, is_plugin
from hesstrace_cli.randomness import random_state_kept
from hesstrace_cli.storage.checkpoints import load_weights, read_checkpoint
from hesstrace_cli.storage.files import check_apart, files_of
from hesstrace_cli.tasks import Task

_OF_TEXTS = ("tokens", "vocab_size", "seq_len", "train_tokens")
_ROUNDING = 1e-4
"""Of outputs that are the same, relative to the largest."""


def select_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is CUDA where there is one.

    Each process of a job takes the GPU of its number on its machine.

    Raises:
        ConfigError: If it does not exist here, or is wanted by several processes.
    """
    place = launcher.place()
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda") if place.size == 1 else _own_gpu(place)
    if name == "auto":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    index = whole_number(number) if ":" in name else 0
    if name != "cpu" and (kind != "cuda" or index is None):
        raise ConfigError(f"--device is {shortened(name)}, expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and index is not None and index >= count:
        raise ConfigError(f"--device is {name!r}, but this machine has {count} usable CUDA devices")
    if kind == "cuda" and place.local_size > 1:
        raise ConfigError(
            f"--device is {name!r}, which puts {place.local_size} processes on one GPU; give "
            "--device cuda, and each takes its own"
        )
    return torch.device(name)


def _own_gpu(place: launcher.Place) -> torch.device:
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise ConfigError(
            f"this is process {place.local_rank + 1} of {place.local_size} on this machine, which "
            f"has {count} usable CUDA devices, and each needs its own; lower --nproc-per-node, or "
            "give --device cpu"
        )
    return torch.device("cuda", place.local_rank)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint's model on its device, with its data.

    Attributes:
        model: With the checkpoint's weights.
        data: What it was trained on, or what the user named.
        model_name: As it was built.
        split: The examples asked for.
        population: The number of examples that they stand for.
        run: The settings of the run that wrote it, where it says them.
        epoch: That the checkpoint was written after, where it says so.
        warnings: What the user should know of the estimate.
    """

    model: nn.Module
    data: DataSet
    model_name: str
    split: Split
    population: int
    run: dict[str, Any]
    epoch: int | None
    warnings: list[str]


def load_checkpoint(path: str, config: CheckpointConfig) -> Loaded:
    """Build the model of a checkpoint and load its data; flags win over what the file says.

    Raises:
        ModelError: If the checkpoint cannot be read or does not fit.
        ConfigError: If neither it nor the flags name the model and the data.
        DataError: If the data is missing or out of range.
    """
    checkpoint = read_checkpoint(path)
    own = checkpoint.content
    said: dict[str, Any] = own.get("config", {})
    model_name = config.model or said.get("model")
    if model_name is None:
        raise ConfigError(f"checkpoint {path!r} does not say its model; give --model")
    if config.model is None and is_plugin(model_name):
        raise ModelError(
            f"checkpoint {path!r} names the plug-in {model_name!r}, which is imported only if "
            f"you repeat it: --model {model_name}"
        )
    dataset = config.dataset or said.get("dataset")
    if config.dataset is None and dataset is not None and is_data_plugin(dataset):
        raise ModelError(
            f"checkpoint {path!r} names the data plug-in {dataset!r}, which is imported only if "
            f"you repeat it: --dataset {dataset}"
        )
    if dataset is None:
        raise ConfigError(f"checkpoint {path!r} does not say its data; give --dataset")
    for place in (config.json, config.plot):
        check_apart(place, [path, *files_of(model_name), *files_of(dataset)])
    same_data = dataset == said.get("dataset")
    defaults = said if same_data else {}
    if is_text(dataset) and is_text(str(said.get("dataset"))):  # another text is cut up alike
        defaults = {**{name: said.get(name) for name in _OF_TEXTS}, **defaults}
    names = (
        "data_dir",
        "image_size",
        "train_examples",
        "val_fraction",
        "num_classes",
        "task",
        "class_weights",
        "label_noise",
        *_OF_TEXTS,
    )
    unsaid = {name: defaults.get(name) for name in names if getattr(config, name) is None}
    changes: dict[str, Any] = {
        **unsaid,
        "model": model_name,
        "dataset": dataset,
        "model_arg": config.model_arg or said.get("model_arg", {}),
        "ignore_index": config.ignore_index
        if config.ignore_index != DataConfig.ignore_index
        else defaults.get("ignore_index", DataConfig.ignore_index),
    }
    config = dataclasses.replace(config, **changes)
    device = select_device(config.device)
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    recorded = own.get("preprocess") if same_data else None
    data = load_data(config, device, dtype=dtype, recorded=recorded)
    check_vocabulary(own, data, path)
    model = build_model(
        model_name,
        num_classes=own.get("num_classes", data.num_classes),
        in_shape=data.in_shape,
        model_args=config.model_arg,
        seed=0,
        task=data.task.name,
    )
    load_weights(model, checkpoint.state_dict, path)
    model = cast_model(model, device, dtype).eval()
    check_fit(model, data, model_name)
    split = data.test if config.split == "test" else data.train
    population = len(split)
    if config.num_examples is not None and config.num_examples < population:
        split = split.subset(stratified_order(split.targets, config.seed)[: config.num_examples])
    notes = [] if checkpoint.note is None else [checkpoint.note]
    notes += _warnings(model, data, config)
    return Loaded(
        model, data, model_name, split, population, said, own.get("epoch"), notes
    )  # fmt: skip


def check_vocabulary(content: Mapping[str, Any], data: DataSet, name: str) -> None:
    """Refuse a checkpoint to which the numbers of tokens mean something else.

    Args:
        content: Of the checkpoint.
        data: That it is to be used on.
        name: The checkpoint's, for the error.

    Raises:
        ModelError: Saying what either vocabulary is.
    """
    said = content.get("vocabulary")
    if None not in (said, data.vocabulary) and said != data.vocabulary:
        raise ModelError(
            f"checkpoint {name!r} is of another vocabulary ({said}) than {data.name} gives here "
            f"({data.vocabulary}); --tokens, --vocab-size and --train-tokens must be those of its "
            "run, and the training text the same"
        )


def _warnings(model: nn.Module, data: DataSet, config: CheckpointConfig) -> list[str]:
    X, _ = next(data.test.batches(8))
    try:
        check_independence(
            lambda X: native_outputs(model, X), X, torch.Generator(X.device).manual_seed(0)
        )
    except MixedExamples:
        return [
            "the model uses batch statistics, or mixes examples otherwise, in eval mode: its loss "
            f"is the one over batches of {config.batch_size}"
        ]
    return []


def check_fit(model: nn.Module, data: DataSet, name: str) -> int:
    """Try the model on a few examples.

    Returns:
        The number of its outputs: of classes, or of the numbers of a target.

    Raises:
        ModelError: If it does not take them, or gives what the task does not expect.
    """
    X, y = _on_device(model, next(data.test.batches(_few(data))))
    with eval_mode(model):
        outputs = tried_outputs(model, X, y, data.task, name, "eval mode")
    width = data.task.width(outputs)
    if width < data.num_classes:
        raise ModelError(
            f"model {name!r} gives outputs of shape {tuple(outputs.shape)} for {len(X)} examples, "
            f"expected {data.num_classes}, a logit for each class of {data.name}"
        )
    if data.vocabulary is not None:
        _check_order(model, X, data.num_classes, name)
    return width


def _check_order(model: nn.Module, X: Tensor, num_classes: int, name: str) -> None:
    """Refuse a model of a text whose outputs know the tokens that they are to tell.

    Raises:
        ModelError: If they change with the last token of a window, but for rounding.
    """
    other = X.clone()
    other[:, -1] = (other[:, -1] + 1) % num_classes
    outputs = []
    with torch.no_grad(), eval_mode(model):
        for each in (X, other):
            with random_state_kept():  # a dropout that is active drops the same of both
                outputs.append(native_outputs(model, each)[:, :-1])
    off = (outputs[0] - outputs[1]).abs()
    if off.numel() and bool(off.max() > _ROUNDING * outputs[0].abs().max()):
        raise ModelError(
            f"model {name!r} sees the tokens that it is to tell: its outputs change with the "
            "tokens behind theirs; a text takes a causal model (some of Hugging Face's are with "
            "--model-arg is_decoder=true)"
        )


def check_training_output(model: nn.Module, data: DataSet, name: str) -> None:
    """Try the model in training mode, in which some give more than logits.

    Raises:
        ModelError: If it does not take them, or gives what the task does not expect.
    """
    X, y = _on_device(model, next(data.train.batches(_few(data))))
    if len(X) < 2:
        return
    with random_state_kept():
        tried_outputs(model.train(), X, y, data.task, name, "training mode")


def _on_device(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Where the model is, which may not be where the data is yet."""
    device = next((p.device for p in model.parameters()), batch[0].device)
    return batch[0].to(device), batch[1].to(device)


def _few(data: DataSet) -> int:
    """So many examples that outputs with their axes the other way round have another shape."""
    return 3 if data.num_classes == 2 else 2


def tried_outputs(
    model: nn.Module, X: Tensor, y: Tensor, task: Task, name: str, mode: str
) -> Tensor:
    """The outputs of a model in its present mode.

    Raises:
        ModelError: If it does not take the inputs, or gives what the task does not expect.
    """
    try:
        with torch.enable_grad():
            logits = native_outputs(model, X)
    except ModelError as problem:
        raise ModelError(f"model {name!r} in {mode}: {problem}") from problem
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as problem:
        if is_of_the_machine(problem):
            raise
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(
            f"model {name!r} does not take inputs of shape {tuple(X.shape[1:])}: {reason}"
            f"{_on_indices(model, X)}"
        ) from problem
    _check_output(logits, task, name, mode)
    task.check_outputs(logits, y, name)
    return logits


def _on_indices(model: nn.Module, X: Tensor) -> str:
    """Half a sentence on what such a failure is of, where it may be of indices."""
    embeds = any(isinstance(module, nn.Embedding) for module in model.modules())
    if embeds and X.is_floating_point():
        return "; it reads indices, as the tokens of --dataset text:DIR, and these are no integers"
    if not embeds and not X.is_floating_point():
        return "; these are indices, which a model with a torch.nn.Embedding reads"
    if embeds and X.dim() == 2:
        return f"; these are {X.shape[1]} indices in a row (--seq-len of a text), up to {X.max()}"
    return ""


def _check_output(output: Tensor, task: Task, name: str, mode: str) -> None:
    is_dense = output.layout is torch.strided and not output.is_meta
    if not output.is_floating_point() or not is_dense:
        kind = "" if is_dense else "sparse " if not output.is_meta else "meta "
        raise ModelError(
            f"model {name!r} gives a {kind}tensor of {str(output.dtype).removeprefix('torch.')} in "
            f"{mode}; --task {task.name} expects {task.expects}, dense and in floating point"
        )
    if not output.requires_grad:
        raise ModelError(
            f"the outputs of model {name!r} have no gradient in {mode}: it detaches them, computes "
            "without gradients, or has no trainable parameter"
        )


def describe(path: str, loaded: Loaded) -> records.Origin:
    """What a record says of its checkpoint."""
    return {
        "checkpoint": path,
        "epoch": loaded.epoch,
        "model": loaded.model_name,
        "dataset": loaded.data.name,
        "preprocess": loaded.data.preprocess.as_dict(),
    }
