"""Flags over YAML over defaults: a command's settings read, converted strictly, and written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from hesstrace_cli.config.commands import DataConfig
from hesstrace_cli.config.fields import key_of
from hesstrace_cli.config.yaml_text import MOST_CHARACTERS, load_yaml, shortened
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.hints import did_you_mean

ConfigT = TypeVar("ConfigT", bound=DataConfig)

_LONGEST_TEXT = 1 << 16  # bytes; no path is longer


def resolve(config_class: type[ConfigT], flags: Mapping[str, Any], file: str | None) -> ConfigT:
    """Merge flags over YAML over defaults.

    Args:
        config_class: The command's dataclass.
        flags: The flags that were given, by field name; None means not given.
        file: A YAML file with the same names, or None.

    Raises:
        ConfigError: For a file that cannot be read, an unknown key, a wrong type or range.
    """
    hints = get_type_hints(config_class)
    given = read_yaml(config_class, file) if file is not None else {}
    given.update({name: value for name, value in flags.items() if value is not None})
    return config_class(**{name: _convert(name, hints[name], v) for name, v in given.items()})


def read_yaml(config_class: type[DataConfig], file: str) -> dict[str, Any]:
    """The settings in a YAML file, by field name, not yet converted."""
    where = f"config {shortened(file)}"
    try:
        with Path(file).open() as text:
            content = load_yaml(text.read(MOST_CHARACTERS + 1))
    except OSError as problem:
        raise ConfigError(f"{where} cannot be read: {problem.strerror}") from problem
    except ValueError as problem:
        raise ConfigError(f"{where} is not YAML that can be used: {problem}") from problem
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds a {type(content).__name__}, expected keys")
    names = {key_of(item.name): item.name for item in dataclasses.fields(config_class)}
    settings = {}
    for key, value in content.items():
        name = names.get(str(key).replace("_", "-"))
        if name is None:
            raise ConfigError(
                f"{where}: unknown key {shortened(key)}{did_you_mean(str(key), [*names])}"
            )
        if value is not None:
            settings[name] = value
    return settings


def to_yaml(config: DataConfig) -> str:
    """The whole resolved config as YAML, to be read again by `resolve`."""
    content = {key_of(name): value for name, value in dataclasses.asdict(config).items()}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


class _Unfit(ValueError):
    """Says what was expected instead."""


def _convert(name: str, hint: Any, value: Any) -> Any:
    """Convert a flag's text or a YAML value to the type of the field, strictly."""
    kinds = str(hint).removesuffix(" | None").replace("typing.", "")
    try:
        if kinds.startswith("dict"):
            return _to_mapping(value)
        if kinds.startswith("list"):
            return [_to_number_or_text(kinds, item) for item in _to_list(value, kinds)]
        return _to_number_or_text(str(getattr(hint, "__name__", kinds)), value)
    except (TypeError, ValueError, OverflowError) as problem:
        expected = _expected(kinds if not isinstance(hint, type) else hint.__name__)
        if isinstance(problem, _Unfit):
            expected = str(problem)
        raise ConfigError(
            f"--{key_of(name)} is {shortened(value)}, expected {expected}"
        ) from problem


def _to_list(value: Any, kinds: str) -> list[Any]:
    if isinstance(value, str):
        return [value] if "str" in kinds else [part for part in value.split(",")]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _to_number_or_text(kind: str, value: Any) -> Any:
    if isinstance(value, bool) != ("bool" in kind) or not isinstance(value, (int, float, str)):
        raise TypeError
    if "float" in kind:
        return float(value)
    if "int" in kind:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    if "str" in kind:
        if not (isinstance(value, str) and value):
            raise TypeError
        _check_text(value)
    return value


def _check_text(text: str) -> None:
    """Refuse what can be no file's name, so that whatever takes it for one finds out here."""
    try:
        fits = "\0" not in text and len(os.fsencode(text)) <= _LONGEST_TEXT
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise _Unfit(f"at most {_LONGEST_TEXT} characters, all of which a file's name may have")


def _to_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        made = {str(key): item for key, item in value.items()}
    else:
        items = [value] if isinstance(value, str) else value
        pairs = [str(item).partition("=") for item in items]
        if any(not equals or not key for key, equals, _ in pairs):
            raise ValueError
        made = {key: _value_of(key, text) for key, _, text in pairs}
    for text in _texts(made):
        _check_text(text)
    return made


def _value_of(key: str, text: str) -> Any:
    try:
        return load_yaml(text)
    except ValueError as problem:
        raise _Unfit(f"a value of {key} that can be read: {problem}") from problem


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value that was read from YAML."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (*_texts(key), *_texts(item))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _expected(kinds: str) -> str:
    if kinds.startswith("dict"):
        return "KEY=VALUE"
    if kinds.startswith("list[float"):
        return "numbers, joined with commas"
    if kinds.startswith("list[int"):
        return "whole numbers, joined with commas"
    for kind, text in (("int", "a whole number"), ("float", "a number"), ("bool", "true or false")):
        if kind in kinds:
            return text
    return "a text"
