"""Checkpoints: dicts that `torch.load(weights_only=True)` reads; saved whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from hesstrace_cli.errors import ConfigError, ModelError
from hesstrace_cli.failures import is_of_the_machine, is_out_of_memory

FORMAT = "hesstrace/checkpoint/1"
WEIGHT_KEYS = ("state_dict", "model", "model_state_dict", "net", "ema")
WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and averaged models, of torch.compile


def write_atomically(path: Path, content: bytes | str | Mapping[str, Any]) -> None:
    """Write to a temporary name and rename, so that `path` is never half written.

    Args:
        path: The file.
        content: Bytes, a text, or a mapping for `torch.save`.

    Raises:
        ConfigError: If the file cannot be written; what `path` held is still there.
    """
    try:
        path = path.resolve() if path.is_symlink() else path
        if path.exists() and not path.is_file():  # a pipe or a device: nothing to keep whole
            with path.open("wb") as file:
                _write(file, content)
            return
        temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    except (OSError, ValueError) as problem:
        raise _unwritable(path, problem) from problem
    try:
        with temporary.open("wb") as file:
            _write(file, content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as problem:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_of_the_machine(problem):  # a tensor that could not be copied from the device
            raise
        raise _unwritable(path, problem) from problem


def is_leftover(path: Path) -> bool:
    """Whether `path` is the temporary file of a `write_atomically` that was killed."""
    return re.fullmatch(r"\..+\.tmp\d+", path.name) is not None


def _write(file: BinaryIO, content: bytes | str | Mapping[str, Any]) -> None:
    if isinstance(content, Mapping):
        torch.save(dict(content), file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def _unwritable(path: Path, problem: Exception) -> ConfigError:
    reason = getattr(problem, "strerror", None) or problem
    return ConfigError(f"{str(path)!r} cannot be written: {reason}")


def check_writable(path: str | None) -> None:
    """Find out before the work whether its result can be written.

    Raises:
        ConfigError: If the file's folder is not there, or cannot be written to.
    """
    if path is None or path == "-":
        return
    parent = Path(path).parent
    if path and Path(path).is_dir():
        raise ConfigError(
            f"{path!r} cannot be written: it is a folder, expected the name of a file"
        )
    if not path or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{path!r} cannot be written; {str(parent)!r} must be a folder")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        state_dict: The weights, without the prefixes that wrappers add.
        content: All of an own checkpoint; of another's only its epoch, where it says it.
        note: What the user should know of how the weights were found, or None.
    """

    state_dict: dict[str, Tensor]
    content: dict[str, Any]
    note: str | None = None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, of this package or not; no code in it is run.

    The weights may stand alone or under a key of `WEIGHT_KEYS`, and be in the safetensors format.

    Raises:
        ModelError: If it is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"checkpoint {str(path)!r} {what}")
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, dict):
        raise ModelError(f"{str(path)!r} holds a {type(content).__name__}, expected a checkpoint")
    if content.get("format") == FORMAT:
        if not isinstance(content.get("state_dict"), dict) or not isinstance(
            content.get("config"), dict
        ):
            raise ModelError(f"{str(path)!r} is damaged: it has no state_dict or no config")
        return Checkpoint(content["state_dict"], content)
    weights, note = _find_weights(content, str(path))
    epoch = content.get("epoch")
    return Checkpoint(weights, {"epoch": epoch} if isinstance(epoch, int) else {}, note)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(path)
    except (SafetensorError, OSError) as problem:
        raise ModelError(f"{str(path)!r} is cut off or not safetensors: {problem}") from problem


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        if not zipfile.is_zipfile(path) and "GLOBAL" not in str(problem):
            raise ModelError(f"{str(path)!r} is not a checkpoint") from problem
        named = re.search(r"GLOBAL (\S+)", str(problem))
        what = f"objects ({named.group(1)})" if named else "objects"
        raise ModelError(
            f"checkpoint {str(path)!r} holds pickled {what}, not only tensors and plain values; "
            "they are never loaded, as that would run code. Save its state dict alone"
        ) from problem
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as problem:
        if is_out_of_memory(problem):
            raise
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(f"{str(path)!r} is cut off or not a checkpoint: {reason}") from problem


def _find_weights(content: dict[str, Any], path: str) -> tuple[dict[str, Tensor], str | None]:
    if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return _without_prefixes(content), None
    present = [key for key in WEIGHT_KEYS if isinstance(content.get(key), dict)]
    if not present:
        raise ModelError(
            f"{path!r} has no weights under {', '.join(WEIGHT_KEYS)}; its keys: "
            f"{', '.join(map(str, list(content)[:10])) or 'none'}"
        )
    weights, note = _find_weights(content[present[0]], path)
    if len(present) > 1:
        others = ", ".join(map(repr, present[1:]))
        note = f"the weights under {present[0]!r} are used, not those under {others}"
    return weights, note


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names as the bare model has them: wrappers put one prefix before all of them."""
    weights = {name: value for name, value in weights.items() if name != "n_averaged"}
    for prefix in WRAPPERS * 2:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], name: str) -> None:
    """Put a checkpoint's weights into a model, all of them, cast to the model's precision.

    Args:
        model: Changed in place.
        state_dict: The checkpoint's tensors.
        name: What to call the checkpoint in an error.

    Raises:
        ModelError: If names or shapes differ; the first of each kind are named.
    """
    own = model.state_dict()
    for prefix in ("model.", "net."):  # of a training framework's wrapper
        if set(state_dict) == {prefix + key for key in own}:
            state_dict = {key: state_dict[prefix + key] for key in own}
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
