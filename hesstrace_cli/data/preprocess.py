"""What is done to every batch of inputs before the model sees it; recorded with the run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hesstrace_cli import records
from hesstrace_cli.config import LARGEST_SHIFT, SMALLEST_SCALE, shortened
from hesstrace_cli.errors import DataError


@dataclass(frozen=True)
class Preprocess:
    """Scale uint8 to [0, 1], then subtract the mean and divide by the standard deviation.

    Attributes:
        mean: One value, or one a channel.
        std: One value, or one a channel.
        scale: What the largest uint8 value is divided by.
        channels: 3 repeats a single grey channel; None leaves the channels as they are.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0
    channels: int | None = None

    def __call__(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Apply it to a batch of shape (N, ...), giving `dtype`; indices stay what they are."""
        if inputs.dtype == torch.int64:
            return inputs
        if inputs.dtype == torch.uint8:
            inputs = inputs.to(dtype) / self.scale
        inputs = inputs.to(dtype)
        if self.channels is not None and inputs.dim() == 4 and inputs.shape[1] == 1:
            inputs = inputs.expand(-1, self.channels, -1, -1)
        if self.mean == (0.0,) and self.std == (1.0,):
            return inputs
        return (inputs - self._column(self.mean, inputs)) / self._column(self.std, inputs)

    def _column(self, values: Sequence[float], inputs: Tensor) -> Tensor:
        if len(values) not in (1, inputs.shape[1]):
            raise DataError(
                f"--mean and --std have {len(values)} values, expected 1 or {inputs.shape[1]}, "
                "one a channel"
            )
        column = _on_device(tuple(values), inputs.dtype, inputs.device)
        return column.reshape(1, -1, *([1] * (inputs.dim() - 2)))

    def __post_init__(self) -> None:
        for name, values, low in (
            ("mean", self.mean, -LARGEST_SHIFT), ("std", self.std, SMALLEST_SCALE),
            ("scale", (self.scale,), SMALLEST_SCALE),
        ):  # fmt: skip
            fit = isinstance(values, tuple) and all(
                isinstance(v, (int, float))
                and not isinstance(v, bool)
                and low <= v <= LARGEST_SHIFT
                for v in values
            )
            if not fit or not values:
                raise DataError(
                    f"{name} of the preprocessing is {shortened(values)}, expected numbers from "
                    f"{low:g} to {LARGEST_SHIFT:g}"
                )
        if self.channels is not None and (type(self.channels) is not int or self.channels != 3):
            raise DataError(
                f"channels of the preprocessing is {shortened(self.channels)}, expected null or 3"
            )

    @classmethod
    def from_dict(cls, record: Any) -> Preprocess:
        """The preprocessing that `as_dict` gave; what is not there is as usual.

        Raises:
            DataError: If it is none.
        """
        known = {item.name for item in fields(cls)}
        if not isinstance(record, dict) or not known.issuperset(record):
            raise DataError(
                f"the preprocessing is {shortened(record)}, expected {', '.join(sorted(known))}"
            )
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in record.items()
        }
        return cls(**settings)

    def as_dict(self) -> records.Preprocess:
        """The settings as plain values, for a checkpoint."""
        return {
            "mean": list(self.mean), "std": list(self.std), "scale": self.scale,
            "channels": self.channels,
        }  # fmt: skip


@functools.lru_cache(maxsize=16)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied once, as every copy to a GPU waits for it."""
    return torch.tensor(values, dtype=dtype, device=device)
