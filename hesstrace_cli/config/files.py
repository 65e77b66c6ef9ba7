"""Flags over YAML over defaults: a command's settings read, converted strictly, and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from hesstrace_cli.config.convert import convert
from hesstrace_cli.config.data import DataConfig
from hesstrace_cli.config.fields import key_of
from hesstrace_cli.config.yaml_text import MOST_CHARACTERS, load_yaml, shortened
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.hints import did_you_mean

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
    return config_class(**{name: convert(name, hints[name], v) for name, v in given.items()})


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
