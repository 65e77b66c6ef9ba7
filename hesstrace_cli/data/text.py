"""Texts as numbers: words, characters, bytes, or the tokens of a tokenizer in a local folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesstrace_cli.config import SEQ_LEN, TEXT, WIKITEXT, WORD, DataConfig, shortened
from hesstrace_cli.errors import ConfigError, DataError
from hesstrace_cli.failures import is_out_of_memory
from hesstrace_cli.paths import is_file, is_folder

_FILES = {
    "train": ("train.txt", "wiki.train.tokens"),
    "valid": ("valid.txt", "wiki.valid.tokens"),
    "test": ("test.txt", "wiki.test.tokens"),
}
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
_MARK = "\ufeff"  # that some programs begin a file with to say that it is UTF-8


@dataclass(frozen=True)
class Vocabulary:
    """What the numbers of tokens mean.

    Attributes:
        kind: As `--tokens` has it; "tokenizer" for a folder's.
        size: How many tokens there are.
        encode: The numbers of a text that is given as bytes; the second argument names it.
        digest: Differs where another token has a number.
    """

    kind: str
    size: int
    encode: Callable[[bytes, str], Tensor]
    digest: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.size} tokens, {self.digest}"


@dataclass(frozen=True)
class Text:
    """The parts of a text, each int64 of shape (n,), and what the numbers mean."""

    train: Tensor
    valid: Tensor | None
    test: Tensor
    vocabulary: Vocabulary


def read_text(config: DataConfig) -> Text:
    """Read the text that a config names; the vocabulary is that of the tokens trained on.

    Raises:
        DataError: If a file is missing, empty, not UTF-8, or too short for a window.
        ConfigError: If a setting contradicts another.
    """
    spec = str(config.dataset)
    folder = Path(config.data_dir or "data") / spec
    if spec.startswith(TEXT):
        folder = Path(spec.removeprefix(TEXT))
    valid = config.val_fraction != 0
    names = {part: _file(folder, part) for part in _FILES if valid or part != "valid"}
    raw = {part: _content(path) for part, path in names.items()}
    train, vocabulary = _of_training(raw["train"], str(names["train"]), config)
    numbers = {"train": train}
    for part in names.keys() - {"train"}:
        numbers[part] = vocabulary.encode(raw[part], str(names[part]))
    length = config.seq_len or SEQ_LEN
    for part, path in names.items():
        if len(numbers[part]) <= length:
            raise DataError(
                f"{str(path)!r} has {len(numbers[part])} tokens, expected more than --seq-len, "
                f"which is {length}: a window and the token behind it"
            )
    return Text(numbers["train"], numbers.get("valid"), numbers["test"], vocabulary)


def _file(folder: Path, part: str) -> Path:
    for name in _FILES[part]:
        if is_file(folder / name):
            return folder / name
    where = f"has no {' or '.join(_FILES[part])}"
    if not is_folder(folder):
        where = "is a file, expected a folder" if is_file(folder) else "does not exist"
    hint = "; --val-fraction 0 does without" if part == "valid" and is_folder(folder) else ""
    if folder.name == WIKITEXT and not is_folder(folder):
        hint = "; --data-dir names the folder that it is in, and nothing is fetched"
    raise DataError(f"{str(folder)!r} {where}{hint}")


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise DataError(f"{str(path)!r} cannot be read: {problem.strerror}") from problem
    if not content.strip():
        raise DataError(f"{str(path)!r} is empty")
    return content


def _of_training(content: bytes, name: str, config: DataConfig) -> tuple[Tensor, Vocabulary]:
    """The numbers of the training text, cut to `--train-tokens`, and the vocabulary."""
    kind = config.tokens or WORD
    most = config.train_tokens
    if kind in _SPLIT:
        items = _SPLIT[kind](_decoded(content, name))
        vocabulary = _of_items(items[:most], kind, config.vocab_size)
        numbers = vocabulary.encode(content, name)
    else:
        if config.vocab_size is not None:
            raise ConfigError(
                f"--vocab-size is for words and characters; --tokens is {shortened(kind)}, whose "
                "tokens are what they are; leave it out"
            )
        vocabulary = _BYTES if kind == "byte" else _of_folder(kind)
        numbers = vocabulary.encode(content, name)
    if most is not None and most > len(numbers):
        raise DataError(f"--train-tokens is {most}, {name!r} has {len(numbers)}")
    numbers = numbers[:most]
    if config.train_examples is not None:
        wanted = config.train_examples * (config.seq_len or SEQ_LEN) + 1
        if wanted > len(numbers):
            raise DataError(
                f"--train-examples is {config.train_examples} windows, {wanted} tokens; {name!r} "
                f"has {len(numbers)}"
            )
        numbers = numbers[:wanted]
    return numbers, vocabulary


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8").removeprefix(_MARK)
    except UnicodeDecodeError as problem:
        raise DataError(
            f"{name!r} is not UTF-8: byte {content[problem.start]:#04x} at position "
            f"{problem.start}; convert it, or read it with --tokens byte"
        ) from problem


# --- words and characters


def _words(text: str) -> list[str]:
    """What white space parts, and a token for the end of every line."""
    return [*text.removesuffix("\n").replace("\n", f" {END_OF_LINE} ").split(), END_OF_LINE]


_SPLIT: dict[str, Callable[[str], list[str]]] = {"word": _words, "char": list}


def _of_items(items: Sequence[str], kind: str, size: int | None) -> Vocabulary:
    """The most frequent of them, those as frequent in the text's order; 0 is every other one."""
    common = [item for item, _ in Counter(items).most_common() if item != UNKNOWN]
    known = [UNKNOWN, *common[: None if size is None else size - 1]]
    number = {item: i for i, item in enumerate(known)}

    def encode(content: bytes, name: str) -> Tensor:
        given = _SPLIT[kind](_decoded(content, name))
        return torch.from_numpy(
            np.fromiter((number.get(item, 0) for item in given), np.int64, len(given))
        )

    return Vocabulary(kind, len(known), encode, _digest(known))


def _digest(tokens: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogatepass")).hexdigest()[:8]


# --- bytes


def _bytes(content: bytes, _name: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).astype(np.int64))


_BYTES = Vocabulary("byte", 256, _bytes, _digest(()))


# --- a tokenizer's


def _of_folder(name: str) -> Vocabulary:
    """The tokenizer in a folder: `tokenizer.json`, or what else Hugging Face's classes read.

    Raises:
        ConfigError: If it is no folder, or the library is not installed.
        DataError: If no tokenizer is in it.
    """
    folder = Path(name)
    if not is_folder(folder):
        raise ConfigError(
            f"--tokens is {shortened(name)}, expected word, char, byte, or a tokenizer's folder"
        )
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as problem:
        raise ConfigError(
            f"a tokenizer's folder needs Hugging Face's libraries: pip install 'hesstrace[hf]' "
            f"({problem})"
        ) from problem
    try:
        made: Any
        if is_file(folder / "tokenizer.json"):
            made = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        else:
            # It would else ask on the terminal whether to run code that the folder names.
            made = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as problem:  # the libraries raise many kinds, down to their Rust core's own
        if is_out_of_memory(problem):
            raise
        raise _unreadable(folder, problem, "holds no tokenizer that can be read") from problem

    def encode(content: bytes, name: str) -> Tensor:
        text = _decoded(content, name)
        try:
            found = made(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as problem:
            if is_out_of_memory(problem):
                raise
            raise _unreadable(folder, problem, f"cannot take {name!r} apart") from problem
        if not found:
            raise DataError(
                f"{str(folder)!r} finds no token in {name!r}: the tokenizer's vocabulary is not in "
                "the folder"
            )
        return torch.tensor(found, dtype=torch.int64)

    numbered = sorted((number, token) for token, number in made.get_vocab().items())
    if not numbered:
        raise DataError(f"{name!r} holds a tokenizer without tokens")
    return Vocabulary(
        "tokenizer", 1 + numbered[-1][0], encode, _digest(f"{i} {t}" for i, t in numbered)
    )


def _unreadable(folder: Path, problem: Exception, what: str) -> DataError:
    """The error for a tokenizer that failed."""
    reason = " ".join(str(problem).split())[:200] or type(problem).__name__
    if "trust_remote_code" in str(problem):
        reason = "it names code of its own (auto_map), which is not run"
    return DataError(f"{str(folder)!r} {what}: {reason}")
