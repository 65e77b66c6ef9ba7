"""The settings of the commands that train many runs: `compare` and `tune`."""

from __future__ import annotations

from dataclasses import dataclass

from hesstrace_cli.config.data import DataConfig
from hesstrace_cli.config.fields import option
from hesstrace_cli.config.regularizers import (
    UNUSED_LAMBDA,
    parse_range,
    parse_terms,
    takes_lambda,
    usual_range,
)
from hesstrace_cli.config.rows import Row, open_names, parse_tune, split, tuned_rows
from hesstrace_cli.config.train import TrainConfig
from hesstrace_cli.config.yaml_text import shortened
from hesstrace_cli.errors import ConfigError

_OF_THE_SPLIT = ("val-fraction", "train-examples")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TrainConfig):
    """Settings of `hesstrace compare`: train's, each `reg` one row, times the seeds."""

    reg: list[str] = option(
        ["none", "trace"],
        "one row of the table: none, NAME[=STRENGTH], or SETTING=VALUE as weight-decay=0.001, "
        "several joined with commas; repeat it for more rows",
        panel="Regularization",
        metavar="NAME[=STRENGTH],...",
    )
    model: str = option(
        "small-cnn", "one model, or several joined with commas", panel="Model and data"
    )
    dataset: str = option(
        "digits", "one data set, or several joined with commas", panel="Model and data"
    )
    seeds: list[int] = option([0, 1, 2], "seeds, 0,1,2", panel="Comparison", minimum=0)
    tune: list[str] = option(
        [],
        "strengths, or values of a setting, to choose from on validation, for rows with NAME and "
        "no strength or value; as many for each NAME",
        panel="Comparison",
        metavar="NAME=V1:V2:...",
    )
    tune_by: str | None = option(
        None,
        "what --tune chooses by (default: the task's own: accuracy, perplexity, ...)",
        panel="Comparison",
        choices=("loss", "accuracy"),
    )
    tune_seeds: list[int] = option(
        [],
        "seeds that --tune chooses by (default: all); with the others, the chosen alone is trained",
        panel="Comparison",
        minimum=0,
    )
    equal: str = option(
        "epochs",
        "what all rows get: the same epochs, or the time of the slowest row's (measured before the "
        "first run, and kept in the folder)",
        panel="Comparison",
        choices=("epochs", "time"),
    )
    jobs: int = option(1, "runs at a time, over the GPUs there are", panel="Comparison", minimum=1)
    plan: bool = option(
        False, "print one complete command a line, and train nothing", panel="Comparison"
    )

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        self._check_combinations()
        self.candidates()
        if self.tune_by is not None and not self.tune:
            raise ConfigError("--tune-by says what --tune chooses by, and there is no --tune")
        if self.tune_seeds and not self.tune:
            raise ConfigError("--tune-seeds says what --tune chooses by, and there is no --tune")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ConfigError(f"--seeds is {self.seeds}, expected different whole numbers")
        if set(self.tune_seeds) - set(self.seeds):
            raise ConfigError(f"--tune-seeds is {self.tune_seeds}, expected some of {self.seeds}")
        for key in ("dataset", "model"):
            names = getattr(self, key).split(",")
            if not all(names) or len(set(names)) < len(names):
                raise ConfigError(
                    f"--{key} is {shortened(getattr(self, key))}, expected different names, joined "
                    "with commas"
                )

    def candidates(self) -> list[list[Row]]:
        """For each row of the table what it is, or those to choose from.

        Raises:
            ConfigError: If a row cannot be understood, or two are the same.
        """
        choices = parse_tune(self.tune, TrainConfig)
        rows_terms = [parse_terms([split(entry, TrainConfig)[0]]) for entry in self.reg]
        takes = [
            takes_lambda([term for term in terms if term[0] not in choices]) for terms in rows_terms
        ]
        if self.lambda_ is not None and not any(takes):
            raise ConfigError(UNUSED_LAMBDA)
        if choices and not self.val_fraction:
            raise ConfigError("--tune chooses on the validation split; --val-fraction is 0")
        splits = [key for key in _OF_THE_SPLIT if key in choices]
        if splits:
            raise ConfigError(
                f"--tune chooses on the validation split, and every {splits[0]} has another; give "
                f"rows, --reg {splits[0]}=VALUE"
            )
        rows = [
            tuned_rows(entry, self.lambda_ if taken else None, choices, TrainConfig)
            for entry, taken in zip(self.reg, takes, strict=True)
        ]
        tuned = {name for entry in self.reg for name in open_names(entry, TrainConfig)}
        if set(choices) - tuned:
            missing = ", ".join(sorted(set(choices) - tuned))
            raise ConfigError(f"--tune names {missing}, but no --reg has it without a strength")
        for row in (row for candidates in rows if len(candidates) > 1 for row in candidates):
            if not row.settings.get("val_fraction", self.val_fraction):
                raise ConfigError(
                    f"--tune chooses on the validation split, and the row {row.name} has none"
                )
        names = [row.name for candidates in rows for row in candidates]
        if len(set(names)) < len(names):
            raise ConfigError(f"two rows are the same: {', '.join(names)}")
        return rows


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Settings of `hesstrace tune`: train's, with one regularizer whose strength is looked for."""

    reg: list[str] = option(
        ["trace"],
        "the regularizer to tune, a NAME without strength; others beside it as NAME=STRENGTH",
        panel="Regularization",
        metavar="NAME[=STRENGTH]",
    )
    budget: float = option(
        5.0, "what all trials may take together, in plain runs' time by the measured cost of a "
        "step", panel="Search", above=0,
    )  # fmt: skip
    range: str | None = option(
        None, "strengths to look among (default: from a hundredth of the regularizer's own default "
        "to a hundred times it)", panel="Search", metavar="LOW:HIGH",
    )  # fmt: skip
    jobs: int = option(1, "runs at a time, over the GPUs there are", panel="Search", minimum=1)
    json: str | None = option(None, "write JSON to this file, - for stdout", panel="Output")

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        self._check_combinations()
        if self.lambda_ is not None:
            raise ConfigError("--lambda is a strength, and tune looks for one; leave it out")
        if not self.val_fraction:
            raise ConfigError("tune chooses on the validation split; --val-fraction is 0")
        self.bounds()

    def tuned(self) -> str:
        """The name of the regularizer whose strength is looked for.

        Raises:
            ConfigError: If there is not one alone.
        """
        regularizers, settings = split(",".join(self.reg), TrainConfig)
        if settings:
            key = next(iter(settings))
            raise ConfigError(
                f"tune looks for the strength of a regularizer, and {key} is a setting: give "
                f"--{key} beside it; values of a setting are chosen from by compare --tune "
                f"{key}=V1:V2:..."
            )
        names = [name for name, strength in parse_terms([regularizers]) if strength is None]
        if len(names) != 1:
            given = ", ".join(names) or "none"
            raise ConfigError(
                f"tune looks for the strength of one regularizer, given without one; here {given}: "
                "write, say, --reg trace, or --reg trace --reg cutout=8"
            )
        return names[0]

    def bounds(self) -> tuple[float, float]:
        """The least and the largest strength to look among, both above 0.

        Raises:
            ConfigError: If the range cannot be read, or there is no default one.
        """
        name = self.tuned()
        if self.range is not None:
            return parse_range(name, self.range)
        return usual_range(name)
