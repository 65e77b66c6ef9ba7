"""The figures of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hesstrace_cli.errors import ConfigError
from hesstrace_cli.failures import is_out_of_memory


class Events:
    """Writes each epoch's numbers as scalars.

    Args:
        folder: Where the event files go; None for nowhere.

    Raises:
        ConfigError: If TensorBoard is not installed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writer: Any = None
        if folder is not None:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError as problem:
                if is_out_of_memory(problem):
                    raise
                raise ConfigError(
                    "--tensorboard needs the package tensorboard: pip install tensorboard"
                ) from problem

    def add(self, record: Mapping[str, Any]) -> None:
        """The numbers of an epoch; what a killed run wrote after its last checkpoint is hidden."""
        if self._folder is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=record["epoch"])
        for name, value in record.items():
            of_name = value if isinstance(value, dict) else {"": value}
            for part, figure in of_name.items():
                if isinstance(figure, float):
                    tag = f"{name}/{part}" if part else name
                    self._writer.add_scalar(tag, figure, record["epoch"])
        self._writer.flush()
