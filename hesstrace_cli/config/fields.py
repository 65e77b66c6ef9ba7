"""A setting: its default, help text, range and place in the help, declared once.

A field's metadata holds them; the command line and the checks are made from the fields.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from difflib import get_close_matches
from typing import Any

from hesstrace_cli.errors import ConfigError


def option(
    default: Any,
    help: str,
    *,
    panel: str,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    choices: Sequence[str] = (),
    metavar: str | None = None,
) -> Any:
    """Declare a setting: its default, help text, range and place in the help."""
    metadata = {
        "help": help,
        "panel": panel,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "choices": tuple(choices),
        "metavar": metavar,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def inherited(parent: Any, name: str, default: Any) -> Any:
    """Declare a setting of the parent class again, with another default."""
    return field(
        default=default,
        metadata=next(f.metadata for f in dataclasses.fields(parent) if f.name == name),
    )


def key_of(field_name: str) -> str:
    """The name of a field as a flag and YAML key: `lambda_` is `lambda`, `_` is `-`."""
    return field_name.rstrip("_").replace("_", "-")


def nearest(name: str, known: Sequence[str]) -> str:
    """Half a sentence that names the nearest known name, or a full stop."""
    near = get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {near[0]!r}?" if near else "."


def check_range(item: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value that is outside the range or choices of its field.

    Raises:
        ConfigError: Saying what was given and what was expected.
    """
    meta = item.metadata
    if value is None or not meta:
        return
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(
            f"--{key_of(item.name)} is {value!r}, expected one of {', '.join(meta['choices'])}"
        )
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        low, high, above = meta["minimum"], meta["maximum"], meta["above"]
        endless = math.isinf(number) and item.default != math.inf
        if endless or not (low <= number <= high and number > above):
            raise ConfigError(f"--{key_of(item.name)} is {number}, expected {_range_text(meta)}")


def _range_text(meta: Mapping[str, Any]) -> str:
    parts = []
    if meta["above"] > -math.inf:
        parts.append(f"more than {meta['above']:g}")
    if meta["minimum"] > -math.inf:
        parts.append(f"at least {meta['minimum']:g}")
    if meta["maximum"] < math.inf:
        parts.append(f"at most {meta['maximum']:g}")
    return "a number, " + " and ".join(parts) if parts else "a number"
