"""What a checkpoint of our own holds: the schema of its fields, checked as it is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hesstrace_cli.config import TrainConfig, resolve
from hesstrace_cli.errors import ConfigError, ModelError

FORMAT = "hesstrace/checkpoint/1"


@dataclasses.dataclass
class EpochSums:
    """What an epoch adds up, on the device, without waiting for it."""

    loss: Tensor
    correct: Tensor
    examples: int
    penalty: Tensor
    penalty_steps: int
    skipped: int = 0

    @classmethod
    def zero(cls, device: torch.device) -> EpochSums:
        """An empty sum."""
        zeros = [torch.zeros((), device=device, dtype=torch.float64) for _ in range(3)]
        return cls(zeros[0], zeros[1], 0, zeros[2], 0)


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number, at least so large; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 53


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and math.isfinite(value)


def is_extra(name: Any) -> bool:
    """Whether an entry of a state dict is what a module's `get_extra_state` gave, no tensor."""
    return isinstance(name, str) and name.rpartition(".")[2] == "_extra_state"


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and (isinstance(v, Tensor) or is_extra(k)) for k, v in value.items()
    )


def _is_list_of(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(check, value))


def _is_preprocess(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"mean", "std", "scale", "channels"}
        and _is_list_of(value["mean"], is_number)
        and _is_list_of(value["std"], lambda x: is_number(x) and x > 0)
        and is_number(value["scale"])
        and value["scale"] > 0
        and (value["channels"] is None or is_whole(value["channels"], 1))
    )


def _is_sums(value: Any) -> bool:
    names = [item.name for item in dataclasses.fields(EpochSums)]
    if not isinstance(value, dict) or set(value) != set(names):
        return False
    totals = [value[name] for name in ("loss", "correct", "penalty")]
    counts = [value[name] for name in ("examples", "penalty_steps", "skipped")]
    return all(map(is_whole, counts)) and all(
        type(x) is Tensor and x.shape == () and x.dtype == torch.float64 and bool(x.isfinite())
        for x in totals
    )


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"state", "param_groups"}
        and isinstance(value["state"], dict)
        and all(is_whole(k) and isinstance(v, dict) for k, v in value["state"].items())
        and _is_list_of(value["param_groups"], lambda group: isinstance(group, dict))
    )


def _is_scaler(value: Any) -> bool:
    return isinstance(value, dict) and all(is_number(x) and x >= 0 for x in value.values())


def _is_carried(value: Any) -> bool:
    plain = type(value) is Tensor and value.layout is torch.strided and not value.is_meta
    return plain and value.is_floating_point() and bool(value.isfinite().all())


# A field, what holds of it, and how to say that.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "state_dict": (_is_state_dict, "tensors by name"),
    "config": (lambda value: isinstance(value, dict), "the settings of the run by name"),
    "optimizer": (_is_optimizer, "the state of an optimizer"),
    "step": (is_whole, "a whole number, at least 0"),
    "epoch": (is_whole, "a whole number, at least 0"),
    "seconds": (lambda value: is_number(value) and value >= 0, "a number, at least 0"),
    "best_score": (lambda value: isinstance(value, float) and value == value, "a number"),
    "sums": (_is_sums, "the sums of an epoch"),
    "scaler": (_is_scaler, "numbers by name"),
    "preprocess": (_is_preprocess, "mean, std, scale and channels"),
    "num_classes": (lambda value: is_whole(value, 1), "a whole number, at least 1"),
    "in_shape": (lambda value: _is_list_of(value, lambda n: is_whole(n, 1)), "sizes, at least 1"),
    "versions": (lambda value: isinstance(value, dict), "versions by name"),
    "in_training": (_is_state_dict, "tensors by name"),
    "num_averaged": (lambda value: is_whole(value, 1), "a whole number, at least 1"),
    "plateaus": (is_whole, "a whole number, at least 0"),
    "vocabulary": (lambda value: isinstance(value, str), "a text"),
    "carried": (_is_carried, "the state of a recurrent model"),
}
_ALWAYS = ("state_dict", "config")
_OF_SOME = ("in_training", "num_averaged", "plateaus", "vocabulary", "carried")
"""That a run may do without, by its data and settings."""


def checked(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an own checkpoint, each as its schema says, the config whole and converted.

    Args:
        content: As read.

    Raises:
        ModelError: Naming the first field that is missing or something else.
    """
    for name, (holds, expected) in _FIELDS.items():
        if name not in content:
            if name in _ALWAYS:
                raise ModelError(f"it has no {name}")
        elif not holds(content[name]):
            raise ModelError(f"its {name} is not {expected}")
    return {**content, "config": dataclasses.asdict(config_of(content))}


def check_whole(content: Mapping[str, Any]) -> None:
    """Make sure that a run can go on from a checkpoint that `checked` has seen.

    Raises:
        ModelError: Naming the first field that is missing.
    """
    for name in _FIELDS:
        if name not in content and name not in _OF_SOME:
            raise ModelError(f"it has no {name}")


def config_of(content: Mapping[str, Any]) -> TrainConfig:
    """The settings of the run that wrote a checkpoint.

    Raises:
        ModelError: If one is not known, has another type, or is out of range.
    """
    said = content["config"]
    known = {item.name for item in dataclasses.fields(TrainConfig)}
    unknown = [name for name in said if name not in known]
    if unknown:
        raise ModelError(f"its config has {unknown[0]!r}, which this version does not know")
    try:
        return resolve(TrainConfig, said, None)
    except ConfigError as problem:
        raise ModelError(f"its config does not hold: {problem}") from problem
