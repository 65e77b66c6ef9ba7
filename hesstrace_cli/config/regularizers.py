"""What may stand behind `--reg`: the regularizers' names and strengths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from hesstrace_cli.config.declared import Declared, built_in, declared_by_user
from hesstrace_cli.config.scales import SCALES, Scale
from hesstrace_cli.config.yaml_text import shortened
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.hints import did_you_mean, likely

REGULARIZERS: dict[str, Declared] = built_in()

UNUSED_LAMBDA = (
    "--lambda is given, but no penalty without a strength of its own that it could be for; "
    "write, say, --reg trace --lambda 0.01"
)


def _declared(name: str) -> Declared:
    return REGULARIZERS[name] if name in REGULARIZERS else declared_by_user(name)


def _is_penalty(name: str) -> bool:
    return _declared(name).is_penalty


def takes_lambda(terms: Sequence[tuple[str, float | None]]) -> bool:
    """Whether a penalty without a strength of its own is among the terms."""
    return any(_is_penalty(name) and strength is None for name, strength in terms)


def parse_terms(entries: Sequence[str]) -> list[tuple[str, float | None]]:
    """Split `NAME[=STRENGTH]` entries, joined with commas or not; "none" alone gives no term.

    Raises:
        ConfigError: If a name is unknown or given twice, "none" stands beside another, or a
            strength is out of range.
    """
    parts = [part.strip() for entry in entries for part in entry.split(",")]
    terms = [_parse_term(part) for part in parts if part != "none"]
    if "none" in parts and len(parts) > 1:
        rows = " ".join(f"--reg {part}" for part in parts)
        raise ConfigError(
            f"--reg joins none with others ({shortened(','.join(parts))}): a comma joins "
            f"regularizers within one row, and none is a row of its own; in compare write {rows}"
        )
    names = [name for name, _ in terms]
    if len(set(names)) < len(names):
        raise ConfigError(f"a regularizer is given twice: {shortened(', '.join(entries))}")
    _refuse_rivals(names)
    return terms


def _refuse_rivals(names: Sequence[str]) -> None:
    """Refuse two that do what only one of those used together may do."""
    first: dict[str, str] = {}
    for name in names:
        role = _declared(name).alone_to
        if role and first.setdefault(role, name) != name:
            raise ConfigError(f"{first[role]} and {name} both {role}; use one of them")


def _parse_term(part: str) -> tuple[str, float | None]:
    name, text = _split(part)
    if name == "none":
        raise ConfigError(f"none has no strength, {shortened(part)} was given")
    if name not in REGULARIZERS and not _is_class(name):
        known = ["none", *REGULARIZERS]
        raise ConfigError(
            f"no regularizer is called {shortened(name)}{_meant(part, known)} "
            f"Known: {', '.join(known)}, or FILE.py:Class; or a setting with its value, as "
            "weight-decay=0.001"
        )
    return name, None if text is None else _strength(name, text)


def _split(part: str) -> tuple[str, str | None]:
    """The name and what stands behind it; a file's name may have an equals sign itself."""
    name, equals, text = part.partition("=")
    if name not in (*REGULARIZERS, "none") and ":" in part:
        name, equals, text = (part, "", "") if _is_class(part) else part.rpartition("=")
    return (name, text) if equals else (part, None)


def _is_class(name: str) -> bool:
    """Whether a name has the form of a user's class: `trace:0.01` has not."""
    where, _, what = name.rpartition(":")
    return bool(where) and what.isidentifier()


def _meant(part: str, known: Sequence[str]) -> str:
    """Half a sentence for a name that is not known, or known with its strength put otherwise."""
    name, _, text = re.sub(r"[\s:(]+", "=", part.rstrip(") "), count=1).partition("=")
    near = likely(name, known)
    if near and near != "none" and _is_number(text):
        return f"; did you mean {near}={text}?"
    return did_you_mean(name, known)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _strength(name: str, text: str) -> float:
    maximum = _declared(name).maximum
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= maximum or math.isinf(value):
        upto = "" if math.isinf(maximum) else f" and at most {maximum:g}"
        raise ConfigError(
            f"the strength of {name} is {shortened(text)}, expected a number that is at least "
            f"0{upto}"
        )
    if scale_of(name) is SCALES["whole"] and value != int(value):
        raise ConfigError(
            f"the strength of {name} is {shortened(text)}, expected a whole number of at least 0"
        )
    return value


def parse_regularizers(entries: Sequence[str], lambda_: float | None) -> dict[str, float]:
    """The regularizers used at once, each with its strength.

    Raises:
        ConfigError: If a name is unknown or given twice, a strength is out of range, or
            `--lambda` could mean none or more than one of the penalties.
    """
    terms = parse_terms(entries)
    open_penalties = [n for n, s in terms if s is None and _is_penalty(n)]
    if lambda_ is not None and not open_penalties:
        raise ConfigError(UNUSED_LAMBDA)
    if lambda_ is not None and len(open_penalties) > 1:
        raise ConfigError(
            f"--lambda could mean each of {', '.join(open_penalties)}; write NAME=STRENGTH for them"
        )
    strengths = {}
    for name, strength in terms:
        if strength is None:
            strength = lambda_ if name in open_penalties else None
        if strength is None:
            strength = _declared(name).default
        if strength is None:
            raise ConfigError(f"{name!r} has no default strength; write {name}=STRENGTH")
        strengths[name] = strength
    return strengths


def parse_strengths(name: str, text: str, entry: str) -> list[float]:
    """The strengths of one regularizer to choose from, of `S1:S2:...`.

    Args:
        name: The regularizer's.
        text: Its strengths.
        entry: What to show in an error.

    Raises:
        ConfigError: If the name is not one regularizer's alone, or a strength cannot be.
    """
    terms = parse_terms([name])
    if len(terms) > 1:
        raise ConfigError(
            f"--tune {shortened(entry)} names {len(terms)} regularizers, expected one; give "
            "--tune once for each"
        )
    if not terms or terms[0][1] is not None:
        raise ConfigError(f"--tune {shortened(entry)}: {name} takes no strengths")
    return [_strength(name, part) for part in text.split(":")]


_DECADES = 100.0  # of the usual range, below and above a regularizer's own default


def settings_used(names: Iterable[str]) -> set[str]:
    """The settings of `hesstrace train` that some of the regularizers go by, by field name."""
    return {setting for name in names for setting in _declared(name).settings}


def scale_of(name: str) -> Scale:
    """On which a regularizer's strengths are evenly apart.

    Raises:
        ConfigError: If a user's class declares one that there is not.
    """
    spacing = _declared(name).spacing
    if spacing not in SCALES:
        raise ConfigError(
            f"the spacing of {name} is {shortened(str(spacing))}, expected one of "
            f"{', '.join(SCALES)}"
        )
    return SCALES[spacing]


def is_late(names: Iterable[str]) -> bool:
    """Whether what one of the regularizers does is done in the last epochs of a run."""
    return any(_declared(name).acts_late for name in names)


def parse_range(name: str, text: str) -> tuple[float, float]:
    """The least and the largest strength of `LOW:HIGH`.

    Raises:
        ConfigError: If they cannot be read, or are not in this order and above 0.
    """
    low, colon, high = text.partition(":")
    bounds = (_strength(name, low), _strength(name, high)) if colon else (0.0, 0.0)
    if not 0 < bounds[0] < bounds[1]:
        raise ConfigError(
            f"--range is {shortened(text)}, expected LOW:HIGH, two numbers above 0, 0.0001:1"
        )
    return bounds


def usual_strength(name: str) -> float | None:
    """A regularizer's own default; None where it has none."""
    return _declared(name).default


def usual_range(name: str) -> tuple[float, float]:
    """Two decades below a regularizer's own default and two above it.

    Raises:
        ConfigError: If it has none.
    """
    declared = _declared(name)
    if not declared.default:
        raise ConfigError(f"{name!r} has no default strength to look around; give --range LOW:HIGH")
    scale = scale_of(name)
    place = scale.place(declared.default)
    low, high = scale.strength(place / _DECADES), scale.strength(place * _DECADES)
    return low, min(high, declared.maximum)


def regularizers_name(strengths: Mapping[str, float]) -> str:
    """The canonical name of regularizers: "none", or `name=strength` joined with commas."""
    return ",".join(f"{name}={shortest(value)}" for name, value in strengths.items()) or "none"


def shortest(value: float) -> str:
    """The shortest text that is read back as the same number."""
    text = f"{value + 0.0:g}"  # -0 is 0
    return text if float(text) == value else repr(value)
