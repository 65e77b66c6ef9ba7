"""What may stand behind `--reg`: the regularizers' names and strengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hesstrace_cli.config.fields import nearest
from hesstrace_cli.errors import ConfigError


@dataclass(frozen=True)
class StrengthSpec:
    """What the number behind NAME= means for one regularizer.

    Attributes:
        default: Used where none is given.
        unit: What the strength multiplies or measures.
        maximum: Largest value allowed; infinite where any is.
        is_penalty: Whether it adds a weighted term to the loss, so that `--lambda` may name it.
    """

    default: float
    unit: str
    maximum: float = math.inf
    is_penalty: bool = False


REGULARIZERS: dict[str, StrengthSpec] = {
    "trace": StrengthSpec(0.01, "weight of tr(H) or tr(G) of the mean loss", is_penalty=True),
}


UNUSED_LAMBDA = (
    "--lambda is given, but no penalty without a strength of its own that it could be for; "
    "write, say, --reg trace --lambda 0.01"
)


def takes_lambda(terms: Sequence[tuple[str, float | None]]) -> bool:
    """Whether a penalty without a strength of its own is among the terms."""
    return any(REGULARIZERS[name].is_penalty and strength is None for name, strength in terms)


def parse_terms(entries: Sequence[str]) -> list[tuple[str, float | None]]:
    """Split `NAME[=STRENGTH]` entries, joined with commas or not; "none" gives no term."""
    terms: list[tuple[str, float | None]] = []
    for part in (part.strip() for entry in entries for part in entry.split(",")):
        name, equals, text = part.partition("=")
        if name == "none" and not equals:
            continue
        if name not in REGULARIZERS:
            known = ["none", *REGULARIZERS]
            raise ConfigError(
                f"no regularizer is called {name!r}{nearest(name, known)} Known: {', '.join(known)}"
            )
        terms.append((name, _strength(name, text) if equals else None))
    names = [name for name, _ in terms]
    if len(set(names)) < len(names):
        raise ConfigError(f"a regularizer is given twice: {', '.join(entries)}")
    return terms


def _strength(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= REGULARIZERS[name].maximum or math.isinf(value):
        limit = REGULARIZERS[name].maximum
        upto = "" if math.isinf(limit) else f" and at most {limit:g}"
        raise ConfigError(
            f"the strength of {name} is {text!r}, expected a number that is at least 0{upto}"
        )
    return value


def parse_row(entries: Sequence[str], lambda_: float | None) -> dict[str, float]:
    """The regularizers used at once, each with its strength.

    Raises:
        ConfigError: If a name is unknown or given twice, a strength is out of range, or
            `--lambda` could mean none or more than one of the penalties.
    """
    terms = parse_terms(entries)
    open_penalties = [n for n, s in terms if s is None and REGULARIZERS[n].is_penalty]
    if lambda_ is not None and not open_penalties:
        raise ConfigError(UNUSED_LAMBDA)
    if lambda_ is not None and len(open_penalties) > 1:
        raise ConfigError(
            f"--lambda could mean each of {', '.join(open_penalties)}; write NAME=STRENGTH for them"
        )
    row = {}
    for name, strength in terms:
        if strength is None:
            strength = lambda_ if name in open_penalties else None
        row[name] = REGULARIZERS[name].default if strength is None else strength
    return row


def row_name(row: Mapping[str, float]) -> str:
    """The canonical name of a row: "none", or `name=strength` joined with commas."""
    return ",".join(f"{name}={strength:g}" for name, strength in row.items()) or "none"
