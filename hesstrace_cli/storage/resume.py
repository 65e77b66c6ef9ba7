"""Whether a run may go on from what its folder holds; all of it is asked before weights move."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from hesstrace_cli.config import TrainConfig, key_of
from hesstrace_cli.config.schedule import learning_rate, ramp
from hesstrace_cli.errors import ModelError
from hesstrace_cli.storage.checkpoints import oddity
from hesstrace_cli.storage.state import check_whole, is_number

# May differ between the first part of a run and a resumed one: they say where, not what.
PLACE = (
    "out", "resume", "resume_or_start", "device", "num_workers", "data_dir", "download",
    "keep_checkpoints", "tensorboard", "shard",
)  # fmt: skip
_STATE_NAMES = {"SGD": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}

_SETTINGS = {
    "SGD": {"params", "lr", "momentum", "dampening", "weight_decay", "nesterov"},
    "AdamW": {"params", "lr", "betas", "eps", "weight_decay"},
}
"""That every version of PyTorch has; others are as usual where they are missing."""


def changes(before: TrainConfig, now: TrainConfig) -> list[str]:
    """What differs between the settings of two runs, but where to run; each in a few words."""
    before, now = before.effective(), now.effective()
    return [
        f"{key_of(item.name)} was {getattr(before, item.name)}, is {getattr(now, item.name)}"
        for item in dataclasses.fields(TrainConfig)
        if item.name not in PLACE and getattr(before, item.name) != getattr(now, item.name)
    ]


def is_longer(before: TrainConfig, now: TrainConfig) -> bool:
    """Whether more epochs are all that differs."""
    return now.epochs > before.epochs and not changes(
        dataclasses.replace(before, epochs=now.epochs), now
    )


def why_not_longer(
    before: TrainConfig, now: TrainConfig, *, steps: int, steps_per_epoch: int
) -> str | None:
    """Why a run cannot be made longer, or None where it becomes what a longer one had been.

    Args:
        before: Its settings so far.
        now: The same with more epochs.
        steps: Steps done; they must have been those of the longer run.
        steps_per_epoch: To know their share of the run.
    """
    if not steps:
        return None
    before, now = before.effective(), now.effective()
    totals = [config.epochs * steps_per_epoch for config in (before, now)]
    shares = [[step / total for step in range(steps)] for total in totals]
    rates = [[learning_rate(now, share) for share in own] for own in shares]
    if rates[0] != rates[1]:
        return f"with --schedule {now.schedule} the learning rate of the steps done depends on it"
    strengths = now.row().strengths
    own = [name for name in strengths if ":" in name]
    if own:
        return f"what {own[0]} did in the steps done may depend on it"
    if "swa" in strengths:
        return "swa averages the last part of it, a share of all epochs"
    ramps = [[ramp(now.warmup, share) for share in shares_of] for shares_of in shares]
    if "trace" in strengths and ramps[0] != ramps[1]:
        return f"--warmup {now.warmup:g} is a share of the run, and the steps done depend on it"
    return None


def check_state(
    content: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    *,
    total_steps: int,
    steps_per_epoch: int,
    made_for: Mapping[str, Any],
) -> None:
    """Make sure that the state in a checkpoint is one of this run, before any of it is used.

    Args:
        content: Of the checkpoint, each field as its schema says.
        optimizer: The run's, new.
        scaler: The run's, new.
        total_steps: Of the whole run.
        steps_per_epoch: By the data as they are now.
        made_for: Fields that say what data the run is for, as they are now.

    Raises:
        ModelError: Naming what does not fit.
    """
    check_whole(content)
    step, epoch = content["step"], content["epoch"]
    if step > total_steps or epoch != step // steps_per_epoch:
        raise ModelError(
            f"it is after step {step} and epoch {epoch}; here an epoch has {steps_per_epoch} "
            f"steps and the run {total_steps}: are the data others?"
        )
    for name, value in made_for.items():
        if content.get(name) != value:
            raise ModelError(f"its {name} is {content.get(name)}, the data's is {value}")
    _check_optimizer(content["optimizer"], optimizer)
    if content["scaler"].keys() != scaler.state_dict().keys():
        raise ModelError("its scaler is not one of this --precision")
    sums = content["sums"]
    if step % steps_per_epoch == 0 and (sums["examples"] or sums["loss"]):
        raise ModelError("its sums are of an epoch that has not begun")


def _check_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer).__name__
    groups = optimizer.state_dict()["param_groups"]
    if len(groups) != len(saved["param_groups"]):
        raise ModelError(f"its optimizer has {len(saved['param_groups'])} groups of parameters")
    for own, group in zip(groups, saved["param_groups"], strict=True):
        missing = _SETTINGS[kind] - group.keys()
        if missing:
            raise ModelError(f"its optimizer has no {min(missing)}, expected the state of {kind}")
        for name in own.keys() - {"lr"}:  # set in every step
            if name in group and _plain(group[name]) != _plain(own[name]):
                what = "other parameters" if name == "params" else f"{name} {group[name]}"
                raise ModelError(f"its optimizer has {what}, not those of this {kind}")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in saved["state"].items():
        if number >= len(params) or entries.keys() - _STATE_NAMES[kind]:
            raise ModelError(f"its optimizer's state is not one of {kind} and this model")
        for name, value in entries.items():
            if not _fits(value, params[number], scalar=name == "step"):
                raise ModelError(f"its optimizer's {name} does not fit parameter {number}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _fits(value: Any, param: Tensor, *, scalar: bool) -> bool:
    if value is None:  # SGD's before its first use
        return not scalar
    if not isinstance(value, Tensor):
        return scalar and is_number(value)
    shape = torch.Size() if scalar else param.shape
    kind = torch.can_cast(value.dtype, param.dtype)
    return oddity(value) is None and value.shape == shape and kind
