"""A row of a comparison: regularizers with their strengths, and settings of its own.

    trace=0.01,weight-decay=0.001

A name behind `--reg` is a regularizer's or a setting's of `hesstrace train`; no two are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from hesstrace_cli.config.convert import convert
from hesstrace_cli.config.fields import key_of
from hesstrace_cli.config.regularizers import (
    REGULARIZERS,
    parse_regularizers,
    parse_strengths,
    parse_terms,
    regularizers_name,
    settings_used,
    shortest,
)
from hesstrace_cli.config.yaml_text import shortened
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.hints import likely

_OF_NO_ROW = (
    "reg", "lambda_", "seed", "out", "resume", "resume_or_start", "dataset", "model", "model_arg",
    "mean", "std",
    # What losses and metrics are of: rows with others could not be compared.
    "data_dir", "task", "class_weights", "ignore_index", "tokens", "vocab_size", "train_tokens",
)  # fmt: skip
_BOOL = {"true": True, "false": False}


@dataclass(frozen=True)
class Row:
    """What one `--reg` asks for.

    Attributes:
        strengths: The regularizers' by name.
        settings: Values of `hesstrace train` by field name.
    """

    strengths: Mapping[str, float]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The canonical name: `name=strength`, `setting=value`, joined with commas, or "none"."""
        terms = [f"{key_of(name)}={_text(value)}" for name, value in self.settings.items()]
        if not self.strengths and terms:
            return ",".join(terms)
        return ",".join([regularizers_name(self.strengths), *terms])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return shortest(value) if isinstance(value, float) else str(value)


def _keys(config_class: type[Any]) -> dict[str, str]:
    """The field of each setting that a row may have, by its key."""
    fields = dataclasses.fields(config_class)
    return {key_of(item.name): item.name for item in fields if item.name not in _OF_NO_ROW}


def _converted(config_class: type[Any], key: str, text: str) -> Any:
    name = _keys(config_class)[key]
    hint = get_type_hints(config_class)[name]
    return convert(name, hint, _BOOL.get(text, text) if hint is bool else text)


def split(entry: str, config_class: type[Any]) -> tuple[str, dict[str, str | None]]:
    """The regularizers in a row, "none" where there are none, and the texts of its settings by key.

    Args:
        entry: Names, with strengths and values or without, joined with commas.
        config_class: Whose fields are the settings.

    Raises:
        ConfigError: If a setting is given twice, or cannot be one of a row.
    """
    settings: dict[str, str | None] = {}
    others: list[str] = []
    for part in entry.split(","):
        key, equals, text = (each.strip() for each in part.partition("="))
        if key in map(key_of, _OF_NO_ROW):
            raise ConfigError(
                f"--reg has {shortened(part.strip())}: {key} cannot be a row's own; give --{key}"
            )
        if key not in _keys(config_class):
            _refuse_misspelt(key, part, config_class)
            others.append(part)
            continue
        if key in settings:
            raise ConfigError(f"--reg has the setting {key} twice: {shortened(entry)}")
        settings[key] = text if equals else None
    return ",".join(others) or "none", settings


def _refuse_misspelt(key: str, part: str, config_class: type[Any]) -> None:
    """Refuse what is no regularizer's name, and nearest to a setting's."""
    keys = _keys(config_class)
    if key in ("none", *REGULARIZERS) or ":" in part:
        return
    near = likely(key, ("none", *REGULARIZERS, *keys))
    if near in keys:
        raise ConfigError(
            f"no regularizer or setting is called {shortened(key)}; did you mean {near!r}?"
        )


def parse_row(entries: Sequence[str], lambda_: float | None, config_class: type[Any]) -> Row:
    """The regularizers used at once, and the settings beside them.

    Args:
        entries: Of `--reg`, all for one row.
        lambda_: The strength of the one penalty given without its own.
        config_class: Whose fields are the settings.

    Raises:
        ConfigError: If a name is unknown, or a strength or value cannot be.
    """
    regularizers, settings = split(",".join(entries), config_class)
    missing = [key for key, text in settings.items() if text is None]
    if missing:
        raise ConfigError(f"--reg has {missing[0]} without a value; write {missing[0]}=VALUE")
    strengths = parse_regularizers([regularizers], lambda_)
    _refuse_unused(strengths, settings, config_class)
    return Row(strengths, _values(settings, config_class))


def _refuse_unused(
    strengths: Mapping[str, float], settings: Iterable[str], config_class: type[Any]
) -> None:
    """Refuse a setting that other regularizers go by alone: the row would be as without it."""
    if any(name not in REGULARIZERS for name in strengths):
        return  # a user's class may go by any
    keys, used = _keys(config_class), settings_used(strengths)
    for key in settings:
        theirs = [n for n, declared in REGULARIZERS.items() if keys[key] in declared.settings]
        if theirs and keys[key] not in used:
            raise ConfigError(
                f"--reg has {key} in a row without {' or '.join(theirs)}, which alone goes by it; "
                f"write {theirs[0]},{key}=VALUE"
            )


def _values(settings: Mapping[str, str | None], config_class: type[Any]) -> dict[str, Any]:
    keys = _keys(config_class)
    return {
        keys[key]: _converted(config_class, key, text)
        for key, text in settings.items()
        if text is not None
    }


def parse_tune(entries: Sequence[str], config_class: type[Any]) -> dict[str, list[Any]]:
    """The strengths or values to choose from, by regularizer or key, of `NAME=V1:V2:...`.

    Raises:
        ConfigError: If one cannot be read, is given twice, or has another number of values.
    """
    choices: dict[str, list[Any]] = {}
    for entry in entries:
        name, equals, text = entry.rpartition("=")
        if not equals or not name:
            raise ConfigError(
                f"--tune is {shortened(entry)}, expected NAME=V1:V2:..., trace=0.003:0.01"
            )
        if name in choices:
            raise ConfigError(f"--tune {shortened(entry)}: {name} is given twice")
        if name in _keys(config_class):
            choices[name] = [_converted(config_class, name, part) for part in text.split(":")]
        else:
            choices[name] = parse_strengths(name, text, entry)
        if len(set(choices[name])) < len(choices[name]):
            raise ConfigError(f"--tune {entry!r} has a value twice")
    if len({len(values) for values in choices.values()}) > 1:
        counts = ", ".join(f"{name} {len(values)}" for name, values in choices.items())
        raise ConfigError(f"--tune must give each as many values, for a fair choice: {counts}")
    return choices


def tuned_rows(
    entry: str, lambda_: float | None, choices: Mapping[str, Sequence[Any]], config_class: type[Any]
) -> list[Row]:
    """The rows that stand for one entry: one, or one for each combination to choose from.

    Raises:
        ConfigError: As `parse_row`.
    """
    regularizers, settings = split(entry, config_class)
    open_keys = [key for key, text in settings.items() if text is None]
    if set(open_keys) - set(choices):
        key = min(set(open_keys) - set(choices))
        raise ConfigError(
            f"--reg has {key} without a value; write {key}=VALUE, or --tune {key}=V1:V2:..."
        )
    names = [name for name, strength in parse_terms([regularizers]) if strength is None]
    strengths = parse_regularizers([regularizers], lambda_)
    _refuse_unused(strengths, settings, config_class)
    # In the order that they were written in, which is that of the row's name.
    values = {key: _values({key: text}, config_class) for key, text in settings.items()}
    rows = [Row(strengths, {name: v for own in values.values() for name, v in own.items()})]
    for name in (name for name in names if name in choices):
        rows = [
            Row({**row.strengths, name: value}, row.settings)
            for row in rows for value in choices[name]
        ]  # fmt: skip
    for key in open_keys:
        name = _keys(config_class)[key]
        rows = [
            Row(row.strengths, {**row.settings, name: value})
            for row in rows for value in choices[key]
        ]  # fmt: skip
    return rows


def open_names(entry: str, config_class: type[Any]) -> set[str]:
    """The regularizers and settings in a row without a strength or value."""
    regularizers, settings = split(entry, config_class)
    terms = parse_terms([regularizers])
    return {n for n, s in terms if s is None} | {k for k, text in settings.items() if text is None}
