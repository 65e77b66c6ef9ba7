"""A setting: its default, help text, range and place in the help, declared once.

A field's metadata holds them; the command line and the checks are made from the fields.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from hesstrace_cli.config.yaml_text import shortened
from hesstrace_cli.errors import ConfigError

LARGEST = 2**31
"""Of any whole number, negative ones too; more of anything is a slip of the hand."""

_LARGEST_FLOAT = 3e38  # that float32 holds, in which tensors are

LARGEST_SHIFT, SMALLEST_SCALE = 1e30, 1e-30
"""Of the preprocessing of inputs, so that float32 can reckon on with what comes out."""


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


def whole_number(text: str) -> int | None:
    """The number that plain digits write; None for other text, and for more than `LARGEST`."""
    number = int(text) if re.fullmatch(r"[0-9]{1,10}", text) else LARGEST + 1
    return number if number <= LARGEST else None


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
            f"--{key_of(item.name)} is {shortened(value)}, expected one of "
            f"{', '.join(meta['choices'])}"
        )
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        largest = LARGEST if isinstance(number, int) else _LARGEST_FLOAT
        low, high = max(meta["minimum"], -largest), min(meta["maximum"], largest)
        if number == item.default:  # which may be endless
            continue
        above = meta["above"]
        if not (low <= number <= high and number > above):
            raise ConfigError(
                f"--{key_of(item.name)} is {shortened(number)}, expected "
                f"{_range_text(above, low, high)}"
            )


def _range_text(above: float, low: float, high: float) -> str:
    least = f"more than {above:g}" if above > -math.inf else f"at least {low:.10g}"
    return f"a number, {least} and at most {high:.10g}"
