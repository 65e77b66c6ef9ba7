"""The trace of a model on a data split, and of a saved checkpoint, as a record."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, nn

import hesstrace_cli
from hesstrace_cli.checkpoints import load_weights, read_checkpoint
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.objective import (
    Objective,
    draws_random_numbers,
    trainable,
    uses_batch_statistics,
)
from hesstrace_cli.curvature.probes import Scheme
from hesstrace_cli.curvature.statistics import Mean
from hesstrace_cli.curvature.trace import (
    Stop,
    TraceEstimate,
    estimate_trace,
    ggn_sampler,
    hessian_sampler,
)
from hesstrace_cli.data import DataSet, Split, load_data, stratified_order
from hesstrace_cli.errors import ConfigError, ModelError, NumericsError
from hesstrace_cli.models import build_model, is_plugin

SCHEMA = "hesstrace/trace/1"
_DEFAULT_RTOL = 0.05
_DEFAULT_PROBES = 2

OnPass = Callable[[int, Mean], None]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "hesstrace": hesstrace_cli.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def select_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is CUDA where there is one.

    Raises:
        ConfigError: If it does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ConfigError(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise ConfigError(f"--device is {name!r}, but this machine has {count} usable CUDA devices")
    return torch.device(name)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy on a split, in eval mode.

    The model's mode is restored.
    """
    was_training = model.training
    model.eval()
    loss = correct = 0.0
    for X, y in split.batches(batch_size):
        logits = model(X)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
    model.train(was_training)
    return loss / len(split), correct / len(split)


def estimate(
    model: nn.Module, split: Split, config: EstimateConfig, on_pass: OnPass | None = None
) -> TraceEstimate:
    """Estimate the trace of the mean cross-entropy's Hessian over a split, in eval mode.

    H is taken over all trainable parameters, with no augmentation. The model's modes, gradients,
    buffers and the global random state are left as they were.

    Args:
        model: Gives logits (N, C).
        split: The examples.
        config: Method, probes, stopping rule, batch size and seed.
        on_pass: Told the estimate after every pass.

    Raises:
        ModelError: If the model is random in eval mode, as with a Dropout left on.
        NumericsError: If a sample is not finite.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        X, _ = next(split.batches(config.batch_size))
        if draws_random_numbers(model, X):
            raise ModelError(
                "the model draws random numbers in eval mode (an active Dropout?), so that its "
                "loss has no one Hessian"
            )
        objective = Objective(model, trainable(model))
        scheme: Scheme = "none"
        if config.method == "dropout":
            scheme = "entry" if config.dropout_scheme == "entry" else "tensor"
        make_sampler = ggn_sampler if config.curvature == "ggn" else hessian_sampler
        rtol = config.rtol
        if rtol is None and config.num_probes is None:
            rtol = _DEFAULT_RTOL
        return estimate_trace(
            make_sampler(objective, scheme, config.keep_prob),
            lambda: split.batches(config.batch_size),
            names=objective.params,
            num_examples=len(split),
            num_probes=config.num_probes or _DEFAULT_PROBES,
            stop=Stop(rtol, config.atol, config.max_passes, config.max_seconds),
            generator=Generator(X.device).manual_seed(config.seed),
            on_pass=on_pass,
        )
    finally:
        for module, training in modes.items():
            module.training = training


def trace_record(
    model: nn.Module, split: Split, config: EstimateConfig, on_pass: OnPass | None = None
) -> dict[str, Any]:
    """Estimate the trace and describe it: the JSON of the contract but for the checkpoint.

    Raises:
        NumericsError: If the loss is not finite.
    """
    begin = time.monotonic()
    loss, accuracy = evaluate(model, split, config.batch_size)
    if not math.isfinite(loss):
        raise NumericsError(f"the loss is {loss} on these {len(split)} examples")
    result = estimate(model, split, config, on_pass)
    params = trainable(model)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        **_mean_record(result.total),
        "ci95": _interval(result.total),
        "curvature": config.curvature,
        "method": "hutchinson" if config.method == "auto" else config.method,
        "num_probes": result.num_probes,
        "passes": result.passes,
        "num_examples": len(split),
        "num_parameters": sum(p.numel() for p in params.values()),
        "loss": loss,
        "accuracy": accuracy,
    }
    if config.per_layer:
        record["per_layer"] = [
            {"name": name, "num_parameters": params[name].numel(), **_mean_record(part)}
            for name, part in result.tensors.items()
        ]
    device = next(iter(params.values())).device
    record |= {
        "split": config.split,
        "dtype": config.dtype,
        "device": str(device),
        "seed": config.seed,
        "seconds": time.monotonic() - begin,
        "versions": versions(),
    }
    return record


def _mean_record(mean: Mean) -> dict[str, float | None]:
    return {"trace": mean.value, "stderr": mean.stderr}


def _interval(mean: Mean) -> list[float] | None:
    interval = mean.interval()
    if interval is None or not all(map(math.isfinite, interval)):
        return None
    return list(interval)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint's model on its device, with its data.

    Attributes:
        model: With the checkpoint's weights.
        data: What it was trained on, or what the user named.
        model_name: As it was built.
        warnings: What the user should know of the estimate.
    """

    model: nn.Module
    data: DataSet
    model_name: str
    warnings: list[str]


def load_checkpoint(path: str, config: EstimateConfig) -> Loaded:
    """Build the model of a checkpoint and load its data; flags win over what the file says.

    Raises:
        ModelError: If the checkpoint cannot be read or does not fit.
        ConfigError: If neither it nor the flags name the model and the data.
        DataError: If the data is missing or out of range.
    """
    checkpoint = read_checkpoint(path)
    said: dict[str, Any] = checkpoint.get("config", {})
    model_name = config.model or said.get("model")
    if model_name is None:
        raise ConfigError(f"checkpoint {path!r} does not say its model; give --model")
    if config.model is None and is_plugin(model_name):
        raise ModelError(
            f"checkpoint {path!r} names the plug-in {model_name!r}, which is imported only if "
            f"you repeat it: --model {model_name}"
        )
    dataset = config.dataset or said.get("dataset")
    if dataset is None:
        raise ConfigError(f"checkpoint {path!r} does not say its data; give --dataset")
    same_data = dataset == said.get("dataset")
    defaults = said if same_data else {}
    names = ("data_dir", "image_size", "train_examples", "val_fraction", "num_classes")
    unsaid = {name: defaults.get(name) for name in names if getattr(config, name) is None}
    changes: dict[str, Any] = {
        **unsaid,
        "model": model_name,
        "dataset": dataset,
        "model_arg": config.model_arg or said.get("model_arg", {}),
    }
    config = dataclasses.replace(config, **changes)
    device = select_device(config.device)
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    recorded = checkpoint.get("preprocess") if same_data else None
    data = load_data(config, device, dtype=dtype, recorded=recorded)
    model = build_model(
        model_name,
        num_classes=checkpoint.get("num_classes", data.num_classes),
        in_shape=data.in_shape,
        model_args=config.model_arg,
        seed=0,
    )
    load_weights(model, checkpoint["state_dict"], path)
    model = model.to(device, dtype).eval()
    return Loaded(model, data, model_name, _warnings(model, data, config))


def _warnings(model: nn.Module, data: DataSet, config: EstimateConfig) -> list[str]:
    X, _ = next(data.test.batches(2))
    if uses_batch_statistics(model, X):
        return [
            "the model uses batch statistics in eval mode: its loss is the one over batches of "
            f"{config.batch_size}"
        ]
    return []


def check_fit(model: nn.Module, data: DataSet, name: str) -> None:
    """Try the model on two examples.

    Raises:
        ModelError: If it does not take them, or does not give one logit a class.
    """
    X, _ = next(data.test.batches(2))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(X)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(
            f"model {name!r} does not take inputs of shape {data.in_shape}: {reason}"
        ) from problem
    finally:
        model.train(was_training)
    if logits.dim() != 2 or logits.shape[1] < data.num_classes:
        raise ModelError(
            f"model {name!r} gives outputs of shape {tuple(logits.shape[1:])}, expected "
            f"({data.num_classes},), a logit for each class of {data.name}"
        )


def estimate_checkpoint(
    path: str, config: EstimateConfig, on_pass: OnPass | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The trace record of one checkpoint, and warnings.

    Raises:
        HesstraceError: As `load_checkpoint` and `trace_record`.
    """
    loaded = load_checkpoint(path, config)
    check_fit(loaded.model, loaded.data, loaded.model_name)
    split = loaded.data.test if config.split == "test" else loaded.data.train
    if config.num_examples is not None and config.num_examples < len(split):
        split = split.subset(stratified_order(split.labels, config.seed)[: config.num_examples])
    record = trace_record(loaded.model, split, config, on_pass)
    place = {
        "checkpoint": path,
        "model": loaded.model_name,
        "dataset": loaded.data.name,
        "preprocess": loaded.data.preprocess.as_dict(),
    }
    return {**record, **place}, loaded.warnings
