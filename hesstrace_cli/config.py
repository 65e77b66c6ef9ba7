"""The settings of every command: one dataclass each, the same names in flags and in YAML.

A field's metadata holds its help and its range; the command line is made from the fields, so
there is one place where a setting is declared. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from hesstrace_cli.errors import ConfigError

BUILT_IN_DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn")


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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Model, data and device: the settings that every command has."""

    model: str | None = option(
        None,
        "small-cnn, mlp, resnet18, resnet50, wrn-16-4, wrn-28-10, torchvision:NAME, "
        "FILE.py:factory or package.module:factory",
        panel="Model and data",
    )
    model_arg: dict[str, Any] = option(
        {}, "key=value for the model's factory; may be repeated", panel="Model and data",
        metavar="KEY=VALUE",
    )  # fmt: skip
    num_classes: int | None = option(
        None, "number of classes, where the data may lack some", panel="Model and data", minimum=1
    )
    dataset: str | None = option(
        None,
        "digits, mnist, fashion-mnist, cifar10, cifar100, svhn, imagefolder:DIR, FILE.npz "
        "or FILE.py:factory",
        panel="Model and data",
    )
    data_dir: str | None = option(
        None, "folder with torchvision's data files (default: data)", panel="Model and data"
    )
    download: bool = option(False, "allow torchvision to fetch the data", panel="Model and data")
    mean: list[float] | None = option(
        None, "means to subtract, one or one a channel (0.5,0.5,0.5)", panel="Model and data"
    )
    std: list[float] | None = option(
        None, "standard deviations to divide by", panel="Model and data", above=0
    )
    image_size: int | None = option(
        None, "resize the shorter side to this and crop the centre", panel="Model and data",
        minimum=1,
    )  # fmt: skip
    train_examples: int | None = option(
        None, "train on a fixed stratified subset of N examples", panel="Model and data", minimum=1
    )
    val_fraction: float | None = option(
        None,
        "share of the training data held out for validation (default: 0.1)",
        panel="Model and data",
        minimum=0,
        maximum=0.9,
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", panel="Machine")
    seed: int = option(0, "seed of all randomness", panel="Machine", minimum=0, maximum=2**31)
    batch_size: int = option(64, "examples per batch", panel="Machine", minimum=1)
    num_workers: int = option(0, "processes that load image files", panel="Machine", minimum=0)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_range(item, getattr(self, item.name))
        if (self.mean is None) != (self.std is None):
            raise ConfigError("--mean and --std go together; one of them is missing")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Settings of `hesstrace train`, complete enough to repeat the run."""

    model: str = inherited(DataConfig, "model", "small-cnn")
    dataset: str = inherited(DataConfig, "dataset", "digits")
    data_dir: str = inherited(DataConfig, "data_dir", "data")
    val_fraction: float = inherited(DataConfig, "val_fraction", 0.1)
    epochs: int = option(30, "passes over the training data", panel="Training", minimum=1)
    lr: float = option(0.05, "learning rate", panel="Training", above=0)
    momentum: float = option(0.9, "momentum of SGD", panel="Training", minimum=0, maximum=1)
    weight_decay: float = option(5e-4, "weight decay", panel="Training", minimum=0)
    optimizer: str = option("sgd", "optimizer", panel="Training", choices=("sgd", "adamw"))
    schedule: str = option(
        "cosine",
        "learning rate over the run; step: times 0.2 at 30, 60 and 80 %",
        panel="Training",
        choices=("constant", "cosine", "step"),
    )
    augment: str = option(
        "none", "augmentation of images", panel="Training", choices=("none", "crop-flip")
    )
    reg: list[str] = option(
        ["none"],
        "regularizer, NAME or NAME=STRENGTH (none, " + ", ".join(REGULARIZERS) + "); repeat it, "
        "or join with commas, for several at once",
        panel="Regularization",
        metavar="NAME[=STRENGTH]",
    )
    lambda_: float | None = option(
        None, "strength of the one penalty given without its own", panel="Regularization",
        minimum=0,
    )  # fmt: skip
    estimator: str = option(
        "dropout",
        "of the trace penalty: dense probes (SEHT-H) or dropped ones (SEHT-D)",
        panel="Trace penalty",
        choices=("hutchinson", "dropout"),
    )
    dropout_scheme: str = option(
        "tensor",
        "drop whole parameter tensors (fast) or single entries (the paper's)",
        panel="Trace penalty",
        choices=("tensor", "entry"),
    )
    keep_prob: float = option(
        0.3, "probability that a tensor or entry is kept; divided out", panel="Trace penalty",
        above=0, maximum=1,
    )  # fmt: skip
    num_probes: int = option(1, "probes per step", panel="Trace penalty", minimum=1)
    every: int = option(
        1, "add the penalty on every k-th step only", panel="Trace penalty", minimum=1
    )
    warmup: float = option(
        0.5, "fraction of the run over which the strength rises from 0", panel="Trace penalty",
        minimum=0, maximum=1,
    )  # fmt: skip
    curvature: str = option(
        "auto",
        "of the trace penalty: the Hessian, its Gauss-Newton part, or what suits the model",
        panel="Trace penalty",
        choices=("auto", "hessian", "ggn"),
    )
    out: str | None = option(
        None, "run folder (default: runs/<data>-<model>-<regularizers>-seed<seed>)", panel="Output"
    )
    init: str | None = option(None, "start from the weights of this checkpoint", panel="Output")
    resume: bool = option(False, "go on with the run in --out", panel="Output")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_row(self.reg, self.lambda_)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TrainConfig):
    """Settings of `hesstrace compare`: train's, each `reg` one row, times the seeds."""

    reg: list[str] = option(
        ["none", "trace"],
        "one row of the table, NAME[=STRENGTH] joined with commas; may be repeated",
        panel="Regularization",
        metavar="NAME[=STRENGTH],...",
    )
    seeds: list[int] = option([0, 1, 2], "seeds, 0,1,2", panel="Regularization", minimum=0)

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        self.rows()
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ConfigError(f"--seeds is {self.seeds}, expected different whole numbers")

    def rows(self) -> list[dict[str, float]]:
        """The regularizers of each row, with their strengths."""
        takes = [_takes_lambda(parse_terms([entry])) for entry in self.reg]
        if self.lambda_ is not None and not any(takes):
            raise ConfigError(_UNUSED_LAMBDA)
        rows = [
            parse_row([entry], self.lambda_ if taken else None)
            for entry, taken in zip(self.reg, takes, strict=True)
        ]
        names = [row_name(row) for row in rows]
        if len(set(names)) < len(names):
            raise ConfigError(f"two rows are the same: {', '.join(names)}")
        return rows


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(DataConfig):
    """Settings of `hesstrace estimate-trace`."""

    method: str = option(
        "auto", "estimator of the trace", panel="Estimate",
        choices=("auto", "hutchinson", "dropout"),
    )  # fmt: skip
    curvature: str = option(
        "hessian", "of the mean loss: the Hessian or its Gauss-Newton part", panel="Estimate",
        choices=("hessian", "ggn"),
    )  # fmt: skip
    num_probes: int | None = option(
        None, "fresh probes per batch in each pass (default: 2)", panel="Estimate", minimum=1
    )
    dropout_scheme: str = option(
        "tensor", "what --method dropout drops", panel="Estimate", choices=("tensor", "entry")
    )
    keep_prob: float = option(
        0.3, "probability that --method dropout keeps a tensor or entry", panel="Estimate",
        above=0, maximum=1,
    )  # fmt: skip
    rtol: float | None = option(
        None,
        "stop when the 95 % interval is within this fraction of the trace (default: 0.05, or one "
        "pass where only --num-probes is given)",
        panel="Estimate",
        minimum=0,
    )
    atol: float = option(0.0, "or within this absolute width", panel="Estimate", minimum=0)
    max_passes: int = option(100, "stop after this many passes", panel="Estimate", minimum=1)
    max_seconds: float = option(
        math.inf, "stop after the pass in which this time is over", panel="Estimate", above=0
    )
    per_layer: bool = option(False, "the trace of every parameter tensor too", panel="Estimate")
    split: str = option("train", "examples", panel="Estimate", choices=("train", "test"))
    num_examples: int | None = option(
        None, "estimate on a stratified subset of this many examples", panel="Estimate", minimum=1
    )
    dtype: str = option(
        "float32", "precision of the computation", panel="Estimate", choices=("float32", "float64")
    )
    json: str | None = option(None, "write JSON to this file, - for stdout", panel="Output")


_UNUSED_LAMBDA = (
    "--lambda is given, but no penalty without a strength of its own that it could be for; "
    "write, say, --reg trace --lambda 0.01"
)


def _takes_lambda(terms: Sequence[tuple[str, float | None]]) -> bool:
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
                f"no regularizer is called {name!r}{_nearest(name, known)} "
                f"Known: {', '.join(known)}"
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
        raise ConfigError(_UNUSED_LAMBDA)
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


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _check_range(item: dataclasses.Field[Any], value: Any) -> None:
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


def read_yaml(config_class: type[DataConfig], file: str) -> dict[str, Any]:
    """The settings in a YAML file, by field name, not yet converted."""
    try:
        content = yaml.safe_load(Path(file).read_text())
    except OSError as problem:
        raise ConfigError(f"config {file!r} cannot be read: {problem.strerror}") from problem
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
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
            raise ConfigError(f"config {file!r}: unknown key {key!r}{_nearest(str(key), [*names])}")
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
    except (TypeError, ValueError) as problem:
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
    if "str" in kind and not isinstance(value, str):
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
