"""Hugging Face's models from a local folder or config; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from torch import nn

from hesstrace_cli.config import shortened
from hesstrace_cli.errors import ModelError
from hesstrace_cli.failures import is_out_of_memory
from hesstrace_cli.paths import is_file, is_folder

PREFIX = "hf:"
_CONFIG = "config.json"
_WEIGHTS = ("*.safetensors", "*.bin")


def hugging_face(spec: str, *, num_classes: int, task: str, **changes: Any) -> nn.Module:
    """The model in `hf:DIR`, with its weights where it has some, or of `hf:CONFIG.json`.

    For tokens it is a causal language model, for classes one of sequences. A new one gets as many
    outputs as there are classes.

    Args:
        spec: With the prefix.
        num_classes: The classes.
        task: What outputs and targets are for.
        changes: Of settings in the config.

    Raises:
        ModelError: If the path or what it holds is no model.
    """
    try:
        import transformers
    except ImportError as problem:
        raise ModelError(
            f"{spec!r} needs Hugging Face's library: pip install 'hesstrace[hf]' ({problem})"
        ) from problem
    changes.pop("in_shape", None)
    place = Path(spec.removeprefix(PREFIX))
    file = place / _CONFIG if is_folder(place) else place
    if not is_file(file):
        what = f"has no {_CONFIG}" if is_folder(place) else "does not exist"
        raise ModelError(
            f"{str(place)!r} {what}; hf: takes a local folder, or a config's file, and nothing is "
            "downloaded"
        )
    with _quiet(transformers.utils.logging):
        return _built(transformers, place, file, num_classes, task, changes)


def _built(
    transformers: Any, place: Path, file: Path, num_classes: int, task: str, changes: dict[str, Any]
) -> nn.Module:
    spec = f"{PREFIX}{place}"
    kinds: dict[str, Any] = {
        "tokens": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }
    if task not in kinds:
        raise ModelError(f"{spec!r} is for --task {' and '.join(kinds)}, not for {task}")
    given = {"num_labels" if task == "classification" else "vocab_size": num_classes}
    # Without the last it would ask on the terminal whether to run code that a config names.
    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    has_weights = is_folder(place) and any(any(place.glob(glob)) for glob in _WEIGHTS)
    try:
        config = transformers.AutoConfig.from_pretrained(str(file), **how)
        unknown = [name for name in changes if not hasattr(config, name)]
        if unknown:
            raise ModelError(
                f"{spec!r}: its config has no {shortened(unknown[0])}, which --model-arg sets"
            )
        if not has_weights or task == "classification":
            changes = {**given, **changes}
        config.update({"use_cache": False, **changes})
        if not has_weights:
            made: nn.Module = kinds[task].from_config(config, trust_remote_code=False)
            return made
        how["output_loading_info"] = True
        loaded, info = kinds[task].from_pretrained(str(place), config=config, **how)
        missing = sorted(info["missing_keys"])
        if missing and task == "tokens":  # of a classifier the last layer is new
            raise ModelError(
                f"{str(place)!r}: its weights lack {len(missing)} of the model's, the first "
                f"{shortened(missing[0])}"
            )
        of_it: nn.Module = loaded.float()
        return of_it
    except ModelError:
        raise
    except Exception as problem:  # the library raises many kinds
        if is_out_of_memory(problem):
            raise
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        if "trust_remote_code" in str(problem):
            reason = "it names code of its own (auto_map), which is not run"
        raise ModelError(f"{str(place)!r} holds no model that can be built: {reason}") from problem


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without the library's advice and its bars, which no log file can hold."""
    before, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    torchs = getLogger("torch.utils._pytree")  # says what the libraries that it imports do
    level = torchs.level
    torchs.setLevel(ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torchs.setLevel(level)
        logging.set_verbosity(before)
        if has_bars:
            logging.enable_progress_bar()
