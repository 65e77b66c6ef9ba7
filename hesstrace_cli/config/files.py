"""Flags over YAML over defaults: a command's settings read, converted strictly, and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from hesstrace_cli.config.commands import DataConfig
from hesstrace_cli.config.fields import key_of, nearest
from hesstrace_cli.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=DataConfig)


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


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's own loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, its keys counted."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ValueError(f"key {twice[0]!r} is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(config_class: type[DataConfig], file: str) -> dict[str, Any]:
    """The settings in a YAML file, by field name, not yet converted."""
    try:
        content = yaml.load(Path(file).read_text(), _EachKeyOnce)
    except OSError as problem:
        raise ConfigError(f"config {file!r} cannot be read: {problem.strerror}") from problem
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise ConfigError(f"config {file!r} is not YAML: {reason}") from problem
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config {file!r} holds a {type(content).__name__}, expected keys")
    names = {key_of(item.name): item.name for item in dataclasses.fields(config_class)}
    settings = {}
    for key, value in content.items():
        name = names.get(str(key).replace("_", "-"))
        if name is None:
            raise ConfigError(f"config {file!r}: unknown key {key!r}{nearest(str(key), [*names])}")
        if value is not None:
            settings[name] = value
    return settings


def to_yaml(config: DataConfig) -> str:
    """The whole resolved config as YAML, to be read again by `resolve`."""
    content = {key_of(name): value for name, value in dataclasses.asdict(config).items()}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _convert(name: str, hint: Any, value: Any) -> Any:
    """Convert a flag's text or a YAML value to the type of the field, strictly."""
    kinds = str(hint).removesuffix(" | None").replace("typing.", "")
    try:
        if kinds.startswith("dict"):
            return _to_mapping(value)
        if kinds.startswith("list"):
            return [_to_number_or_text(kinds, item) for item in _to_list(value, kinds)]
        return _to_number_or_text(str(getattr(hint, "__name__", kinds)), value)
    except (TypeError, ValueError, OverflowError, yaml.YAMLError) as problem:
        expected = _expected(kinds if not isinstance(hint, type) else hint.__name__)
        raise ConfigError(f"--{key_of(name)} is {value!r}, expected {expected}") from problem


def _to_list(value: Any, kinds: str) -> list[Any]:
    if isinstance(value, str):
        return [value] if "str" in kinds else [part for part in value.split(",")]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _to_number_or_text(kind: str, value: Any) -> Any:
    if isinstance(value, bool) != ("bool" in kind):
        raise TypeError
    if "float" in kind:
        return float(value)
    if "int" in kind:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    if "str" in kind and not (isinstance(value, str) and value):
        raise TypeError
    return value


def _to_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {str(key): item for key, item in value.items()}
    pairs = [str(item).partition("=") for item in ([value] if isinstance(value, str) else value)]
    if any(not equals or not key for key, equals, _ in pairs):
        raise ValueError
    return {key: yaml.safe_load(text) for key, _, text in pairs}


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
