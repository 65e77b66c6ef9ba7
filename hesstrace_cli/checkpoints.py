"""Checkpoints: dicts that `torch.load(weights_only=True)` reads; saved whole or not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesstrace_cli.errors import ConfigError, ModelError

FORMAT = "hesstrace/checkpoint/1"


def write_atomically(path: Path, content: bytes | str | Mapping[str, Any]) -> None:
    """Write to a temporary name and rename, so that `path` is never half written.

    Args:
        path: The file.
        content: Bytes, a text, or a mapping for `torch.save`.

    Raises:
        ConfigError: If the file cannot be written; what `path` held is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            if isinstance(content, Mapping):
                torch.save(dict(content), file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as problem:
        temporary.unlink(missing_ok=True)
        reason = getattr(problem, "strerror", None) or problem
        raise ConfigError(f"{str(path)!r} cannot be written: {reason}") from problem


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; no code in it is run.

    Raises:
        ModelError: If it is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"checkpoint {str(path)!r} {what}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        if zipfile.is_zipfile(path):
            raise ModelError(
                f"checkpoint {str(path)!r} holds pickled objects, not only tensors and plain "
                "values; they are not run. Save its state dict alone"
            ) from problem
        raise ModelError(f"{str(path)!r} is not a checkpoint") from problem
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(f"{str(path)!r} is cut off or not a checkpoint: {reason}") from problem
    if not isinstance(content, dict):
        raise ModelError(f"{str(path)!r} holds a {type(content).__name__}, expected a checkpoint")
    if isinstance(content.get("state_dict"), dict):
        return content
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {"state_dict": content}
    raise ModelError(f"{str(path)!r} has no 'state_dict'; its keys: {', '.join(map(str, content))}")


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], name: str) -> None:
    """Put a checkpoint's weights into a model, all of them.

    Args:
        model: Changed in place.
        state_dict: The checkpoint's tensors.
        name: What to call the checkpoint in an error.

    Raises:
        ModelError: If names or shapes differ; the first of each kind are named.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    shapes = [
        f"{key} is {tuple(state_dict[key].shape)}, the model's is {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and own[key].shape != state_dict[key].shape
    ]
    problems = []
    for what, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", shapes),
    ):
        if keys:
            problems.append(f"{len(keys)} {what}, first {keys[0]}")
    if problems:
        raise ModelError(f"checkpoint {name!r} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(dict(state_dict))
