"""A flag's text or a value from YAML as the type of its setting, strictly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from hesstrace_cli.config.fields import key_of
from hesstrace_cli.config.yaml_text import load_yaml, shortened
from hesstrace_cli.errors import ConfigError

_LONGEST_TEXT = 1 << 16  # bytes; no path is longer


class _Unfit(ValueError):
    """Says what was expected instead."""


def convert(name: str, hint: Any, value: Any) -> Any:
    """Convert a flag's text or a YAML value to the type of the field, strictly.

    Args:
        name: Of the field.
        hint: Its type.
        value: As given.

    Raises:
        ConfigError: If it is of another type.
    """
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
