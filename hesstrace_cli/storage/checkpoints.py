"""Checkpoints: dicts that `torch.load(weights_only=True)` reads; saved whole or not at all."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from hesstrace_cli.errors import ModelError
from hesstrace_cli.failures import is_out_of_memory
from hesstrace_cli.paths import is_file, is_folder
from hesstrace_cli.storage.files import write_atomically
from hesstrace_cli.storage.state import FORMAT, checked, is_extra

WEIGHT_KEYS = ("state_dict", "model", "model_state_dict", "net", "ema")
_DOS_FOLDER = 0x10  # among the attributes of a zip file's part
_DEEPEST = 4  # a dict may hold itself
WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and averaged models, of torch.compile


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Save it whole or not at all.

    Raises:
        ConfigError: If the file cannot be written; what `path` held is still there.
    """
    write_atomically(path, partial(torch.save, dict(content)))


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
    In PyTorch's zip format, its own since 1.6, the checksum of every part is compared, so that a
    damaged weight is noticed; safetensors and the format before have none: there only damage to
    names, shapes and lengths is.

    Raises:
        ModelError: If it is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not is_file(path):
        what = "is a folder" if is_folder(path) else "does not exist, or is no regular file"
        raise ModelError(f"checkpoint {str(path)!r} {what}")
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, dict):
        raise ModelError(f"{str(path)!r} holds a {type(content).__name__}, expected a checkpoint")
    if content.get("format") == FORMAT:
        try:
            content = checked(content)
            check_tensors(content.get("in_training", {}))
            return Checkpoint(check_tensors(content["state_dict"]), content)
        except ModelError as problem:
            raise ModelError(f"{str(path)!r} is damaged: {problem}") from problem
    weights, note = _find_weights(content, str(path))
    epoch = content.get("epoch")
    counts = type(epoch) is int and 0 <= epoch < 2**31
    said = {"epoch": epoch} if counts else {}
    try:
        return Checkpoint(check_tensors(weights), said, note)
    except ModelError as problem:
        raise ModelError(f"checkpoint {str(path)!r} cannot be used: {problem}") from problem


def check_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, each a plain tensor: no other layout, no wrapper, with values.

    Raises:
        ModelError: Naming the first that is something else.
    """
    for name, value in weights.items():
        odd = None if is_extra(name) else oddity(value)
        if odd is not None:
            raise ModelError(f"{name} is {odd}, expected a dense tensor with its values")
    return weights


def oddity(value: Tensor) -> str | None:
    """What keeps a tensor from being copied into a plain parameter, or None."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    if value.is_meta:
        return "a meta tensor without values"
    if value.is_quantized:
        return f"a quantized tensor ({value.dtype})"
    if value.layout != torch.strided:
        return f"a sparse tensor ({value.layout})"
    return None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(path)
    except (SafetensorError, OSError) as problem:
        raise ModelError(f"{str(path)!r} is cut off or not safetensors: {problem}") from problem


def _read_torch(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK" or zipfile.is_zipfile(file)
            if is_zip:
                _check_sums(file, str(path))
            file.seek(0)
            return _load(file, str(path), is_zip=is_zip)
    except OSError as problem:
        raise ModelError(f"checkpoint {str(path)!r} cannot be read: {problem}") from problem


def _check_sums(file: BinaryIO, path: str) -> None:
    """Compare the checksums in a zip file, which `torch.load` passes over.

    Raises:
        ModelError: If one differs, or the file is no whole zip file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip() or next(filter(_is_called_folder, archive.infolist()), None)
    except Exception as problem:  # zipfile raises many kinds where a field is damaged
        if is_out_of_memory(problem):
            raise
        raise ModelError(f"{path!r} is cut off or damaged: {_short(problem)}") from problem
    if damaged is not None:
        name = getattr(damaged, "filename", damaged)
        raise ModelError(f"{path!r} is damaged: its part {name!r} is not what was written")


def _is_called_folder(part: zipfile.ZipInfo) -> bool:
    """Whether its attributes say so and its name does not: torch would read nothing, and go on."""
    return bool(part.external_attr & _DOS_FOLDER) and not part.is_dir()


def _load(file: BinaryIO, path: str, *, is_zip: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        if not is_zip and "GLOBAL" not in str(problem):
            raise ModelError(f"{path!r} is not a checkpoint") from problem
        named = re.search(r"GLOBAL (\S+)", str(problem))
        what = f"objects ({named.group(1)})" if named else "objects"
        raise ModelError(
            f"checkpoint {path!r} holds pickled {what}, not only tensors and plain values; "
            "they are never loaded, as that would run code. Save its state dict alone"
        ) from problem
    except Exception as problem:  # an unpickler of bytes that anybody wrote
        if is_out_of_memory(problem):
            raise
        raise ModelError(f"{path!r} is cut off or not a checkpoint: {_short(problem)}") from problem


def _short(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__


def _find_weights(
    content: dict[str, Any], path: str, depth: int = 0
) -> tuple[dict[str, Tensor], str | None]:
    if content and all(
        isinstance(k, str) and (isinstance(v, Tensor) or is_extra(k)) for k, v in content.items()
    ):
        return _without_prefixes(content), None
    present = [key for key in WEIGHT_KEYS if isinstance(content.get(key), dict)]
    if not present or depth > _DEEPEST:
        raise ModelError(
            f"{path!r} has no weights under {', '.join(WEIGHT_KEYS)}; its keys: "
            f"{', '.join(map(str, list(content)[:10])) or 'none'}"
        )
    weights, note = _find_weights(content[present[0]], path, depth + 1)
    if len(present) > 1:
        others = ", ".join(map(repr, present[1:]))
        note = f"the weights under {present[0]!r} are used, not those under {others}"
    return weights, note


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names as the bare model has them: wrappers put one prefix before all of them."""
    if "n_averaged" in weights:
        weights = _renamed(weights, {name: name for name in weights if name != "n_averaged"})
    for prefix in WRAPPERS * 2:
        if weights and all(name.startswith(prefix) for name in weights):
            names = {name: name.removeprefix(prefix) for name in weights}
            weights = _renamed(weights, names, prefix)
    return weights


def _renamed(
    weights: Mapping[str, Tensor], names: Mapping[str, str], prefix: str = ""
) -> dict[str, Tensor]:
    """The weights that have a new name, with the modules' versions, which some modules ask for."""
    renamed = OrderedDict((new, weights[old]) for old, new in names.items())
    versions: dict[str, Any] = getattr(weights, "_metadata", {})
    renamed._metadata = {  # type: ignore[attr-defined]
        (module + ".").removeprefix(prefix).removesuffix("."): version
        for module, version in versions.items()
        if (module + ".").startswith(prefix)
    }
    return renamed


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], name: str) -> None:
    """Put a checkpoint's weights into a model, all of them, cast to the model's precision.

    Args:
        model: Changed in place.
        state_dict: The checkpoint's tensors.
        name: What to call the checkpoint in an error.

    Raises:
        ModelError: If names, shapes or kinds of numbers differ; the first of each are named.
    """
    model.load_state_dict(fitting(model, state_dict, name))


def fitting(model: nn.Module, state_dict: Mapping[str, Tensor], name: str) -> Mapping[str, Tensor]:
    """The weights by the model's own names, known to fit; the model is as it was.

    Raises:
        ModelError: If names, shapes or kinds of numbers differ; the first of each are named.
    """
    own = model.state_dict()
    for prefix in ("model.", "net."):  # of a training framework's wrapper
        if set(state_dict) == {prefix + key for key in own}:
            state_dict = _renamed(state_dict, {prefix + key: key for key in own}, prefix)
    both = [key for key in own if key in state_dict and not is_extra(key)]
    shapes = [
        f"{key} is {tuple(state_dict[key].shape)}, the model's is {tuple(own[key].shape)}"
        for key in both
        if own[key].shape != state_dict[key].shape
    ]
    kinds = [
        f"{key} is {state_dict[key].dtype}, the model's is {own[key].dtype}"
        for key in both
        if not torch.can_cast(state_dict[key].dtype, own[key].dtype)
    ]
    problems = []
    for what, keys in (
        ("missing", [key for key in own if key not in state_dict]),
        ("unexpected", [key for key in state_dict if key not in own]),
        ("of another shape", shapes),
        ("of another kind of number", kinds),
    ):
        if keys:
            problems.append(f"{len(keys)} {what}, first {keys[0]}")
    if problems:
        raise ModelError(f"checkpoint {name!r} does not fit the model: {'; '.join(problems)}")
    if not getattr(state_dict, "_metadata", None):  # names and shapes are those of its own version
        state_dict = OrderedDict(state_dict)
        state_dict._metadata = own._metadata  # type: ignore[attr-defined]
    return state_dict
