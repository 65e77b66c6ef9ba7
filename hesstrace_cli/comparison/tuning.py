"""A strength looked for on validation, in an Optuna study that lies in the folder and is resumed.

The regularizer's own default is the first strength, its neighbours follow, each a run of its own on
the schedules of a whole one, to the same epoch: the last, or one of the last third of the run.
Earlier, weak penalties are ahead, as what a penalty is for, overfitting, comes late; and where runs
share their first epochs, they are not told apart by what a strength does in these.

Of the strengths that validation cannot tell from the best, by a standard error of the difference
over the same examples, the one nearest to the first is taken.

Source:
    Breiman, Friedman, Olshen, Stone, "Classification and regression trees", 1984 (the rule of one
    standard error).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesstrace_cli import records
from hesstrace_cli.comparison.grid import PlannedRun, arguments
from hesstrace_cli.config import (
    SCALES,
    Scale,
    TrainConfig,
    TuneConfig,
    is_late,
    key_of,
    parse_regularizers,
    parse_terms,
    regularizers_name,
    scale_of,
    usual_strength,
)
from hesstrace_cli.errors import ConfigError, NumericsError
from hesstrace_cli.storage.resume import PLACE
from hesstrace_cli.storage.runs import default_folder

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

SCHEMA = "hesstrace/tune/1"
STUDY = "study.journal"
RUNS = "runs"

_MOST = 7  # strengths that are tried
_FEWEST = 2
_SHORT, _SHORTEST = 3 / 4, 2 / 3  # of the epochs, that each is trained for: of more, of the fewest
_NAME, _RESULT = "strength", "validation"  # in a trial


@dataclass(frozen=True)
class Validation:
    """Losses on the validation split.

    Attributes:
        losses: The mean of each block of examples.
        terms: That each mean is over.
    """

    losses: list[float]
    terms: list[int]

    @property
    def loss(self) -> float:
        """The mean over all."""
        return sum(map(math.prod, zip(self.losses, self.terms, strict=True))) / sum(self.terms)

    def above(self, other: Validation) -> tuple[float, float]:
        """How much higher the loss is than another's over the same blocks, and the standard error.

        The error is infinite where there is one block alone.
        """
        mean, total, count = self.loss - other.loss, sum(self.terms), len(self.terms)
        pairs = zip(self.losses, other.losses, self.terms, strict=True)
        squares = sum((n * (a - b - mean)) ** 2 for a, b, n in pairs)
        return mean, math.sqrt(squares * count / (count - 1)) / total if count > 1 else math.inf


Evaluate = Callable[[Sequence[float]], Sequence[Validation | None]]
"""Trains the runs of strengths, as far as they go; None of one that diverged."""


@dataclass(frozen=True)
class Plan:
    """What a budget pays for.

    Attributes:
        size: Strengths that are tried.
        until: The epoch after which they are compared.
    """

    size: int
    until: int

    def rounds(self) -> list[int]:
        """Strengths that are trained side by side: the first, then two of them, the last alone."""
        pairs, left = divmod(self.size - 2, 2)
        return [1, *[2] * pairs, *[1] * (1 + left)] if self.size > 3 else [1] * self.size


def plan(budget: float, cost: float, epochs: int, *, whole: bool = False) -> Plan:
    """As many strengths as can be trained for three quarters of the epochs, for as many as can be.

    Two of them for two thirds, where the budget pays for no more.

    Args:
        budget: In plain runs' time.
        cost: Of a step over that of a plain one.
        epochs: Of a run.
        whole: Whether all epochs are needed, as what a strength does is seen in the last ones.

    Raises:
        ConfigError: If it does not pay for a choice.
    """
    short, shortest = (1.0, 1.0) if whole else (_SHORT, _SHORTEST)
    for size in range(_MOST, _FEWEST - 1, -1):
        until = min(epochs, math.floor(epochs * budget / cost / size + 1e-9))
        if until >= epochs * (short if size > _FEWEST else shortest) - 1e-9:
            return Plan(size, until)
    least = math.ceil(shortest * epochs - 1e-9)
    enough = math.ceil(10 * _FEWEST * least * cost / epochs - 1e-9) / 10
    raise ConfigError(
        f"--budget {budget:g} pays for fewer than {_FEWEST} strengths, as a step takes {cost:.2g} "
        f"times that of a plain one; give at least --budget {enough:g}"
    )


def root(config: TuneConfig) -> Path:
    """The search's folder."""
    return Path(config.out or f"searches/{config.tuned()}")


def start(config: TuneConfig) -> float:
    """The first strength: the regularizer's own default; of a range without it, the middle."""
    low, high = config.bounds()
    default = usual_strength(config.tuned())
    if default is not None and low <= default <= high:
        return default
    return scale_of(config.tuned()).middle(low, high)


def plan_of(config: TuneConfig, cost: float) -> Plan:
    """What the budget pays for, a step taking so many times a plain one."""
    names = [name for name, _ in parse_terms(config.reg)]
    return plan(config.budget, cost, config.epochs, whole=is_late(names))


@dataclass(frozen=True)
class Tried(PlannedRun):
    """A run that is left after an epoch, for its losses on the validation split there."""

    @property
    def done(self) -> bool:
        """Whether they are there, or it has diverged."""
        return self.diverged.is_file() or self.folder.validation.is_file()


def planned(config: TuneConfig, strength: float, until: int) -> Tried:
    """The run of a strength, to an epoch."""
    own = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
    others = [f"{n}={s!r}" for n, s in parse_terms(config.reg) if s is not None]
    entries = [*others, f"{config.tuned()}={strength!r}"]
    name = regularizers_name(parse_regularizers(entries, None))
    run = TrainConfig(**{**own, "reg": [name], "resume": False, "resume_or_start": False})
    folder = default_folder(run, str(root(config) / RUNS))
    return Tried(0, name, replace(run, out=str(folder)), until)


def plain(config: TuneConfig) -> TrainConfig:
    """The run without any regularizer, whose time the budget counts in."""
    return replace(planned(config, start(config), 0).config, reg=["none"])


def validation(run: PlannedRun) -> Validation | None:
    """What a run came to; None where it diverged."""
    if run.diverged.is_file():
        return None
    return Validation(**json.loads(run.folder.validation.read_text()))


def settings_of(config: TuneConfig) -> dict[str, Any]:
    """What the trials of a search depend on, by key."""
    own = {item.name for item in fields(TuneConfig)} - {*PLACE, "jobs", "json"}
    return {key_of(name): getattr(config, name) for name in sorted(own)}


def command(config: TuneConfig, strength: float) -> list[str]:
    """What trains with a strength: words behind `hesstrace`."""
    run = replace(planned(config, strength, config.epochs).config, out=None)
    return arguments(run)[:-1]  # it begins


def open_study(
    folder: Path, settings: Mapping[str, Any], measure_cost: Callable[[], float]
) -> Study:
    """The study in the folder, or a new one; nobody else may have it open.

    Args:
        folder: Where it lies.
        settings: What its trials depend on, as JSON can hold it.
        measure_cost: Gives the cost of a step for a new study; an old one has it.

    Raises:
        ConfigError: If it is damaged, or of other settings.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = folder / STUDY
    file.with_name(STUDY + ".lock").unlink(missing_ok=True)  # of a process that was killed
    try:
        _drop_half_a_line(file)
        storage = JournalStorage(JournalFileBackend(str(file)))
        study = optuna.create_study(
            storage=storage, study_name="tune", direction="minimize", load_if_exists=True,
            pruner=optuna.pruners.NopPruner(),
        )  # fmt: skip
    except (ValueError, KeyError, AssertionError) as problem:
        raise ConfigError(f"{str(file)!r} is damaged, no study: {problem}; remove it") from problem
    except OSError as problem:
        raise ConfigError(f"{str(file)!r} cannot be used: {problem.strerror}") from problem
    before = study.user_attrs.get("settings")
    if before is None:
        study.set_user_attr("step_cost", measure_cost())
        study.set_user_attr("settings", dict(settings))  # last: the sign that it has begun
    elif differ := [k for k in settings if before.get(k) != settings[k]]:
        changed = "; ".join(f"{k} was {before.get(k)}, is {settings[k]}" for k in differ)
        raise ConfigError(
            f"{str(folder)!r} holds a study with other settings: {changed}. Choose another --out"
        )
    return study


def _drop_half_a_line(file: Path) -> None:
    """Take away what a killed process did not write to its end."""
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)


def search(
    study: Study,
    plan: Plan,
    bounds: tuple[float, float],
    start: float,
    evaluate: Evaluate,
    scale: Scale = SCALES["log"],
) -> None:
    """Run the study to its end; what is in it already is not done again.

    It depends on what the trials gave alone, not on when they ended or where it was stopped.

    Args:
        study: As `open_study` gives it.
        plan: How many strengths.
        bounds: The least and the largest of them.
        start: The first of them.
        evaluate: Asked again for what is known after a stop.
        scale: On which they are apart.

    Raises:
        NumericsError: If every run diverged.
    """
    from hesstrace_cli.comparison.walk import Walk

    study.sampler, first = Walk(bounds, start, scale), 0
    for size in plan.rounds():
        for number in range(first, first + size):
            _ask(study, number, bounds)
        trials = study.get_trials(deepcopy=False)[first : first + size]
        found = evaluate([strength_of(trial) for trial in trials])
        for trial, result in zip(trials, found, strict=True):
            _tell(study, trial, result)
        first += size
    if not _completed(study):
        raise NumericsError("every strength diverged; give a --range of smaller ones")


def _ask(study: Study, number: int, bounds: tuple[float, float]) -> None:
    """Make sure that the study has a trial of this number, with its strength."""
    from optuna import Trial
    from optuna.distributions import FloatDistribution

    trials = study.get_trials(deepcopy=False)
    if len(trials) <= number:
        study.ask({_NAME: FloatDistribution(*bounds, log=True)})
    elif _NAME not in trials[number].params:  # killed in the middle of what `ask` does
        Trial(study, trials[number]._trial_id).suggest_float(_NAME, *bounds, log=True)


def _tell(study: Study, trial: FrozenTrial, result: Validation | None) -> None:
    """Complete with its losses, or pruned where it diverged."""
    from optuna import Trial
    from optuna.trial import TrialState

    if trial.state.is_finished():
        return
    if result is None or not math.isfinite(result.loss):
        study.tell(trial.number, state=TrialState.PRUNED)
        return
    Trial(study, trial._trial_id).set_user_attr(_RESULT, asdict(result))
    study.tell(trial.number, result.loss)


def strength_of(trial: FrozenTrial) -> float:
    """The strength of a trial."""
    strength: float = trial.params[_NAME]
    return strength


def _completed(study: Study) -> list[FrozenTrial]:
    """Those that did not diverge, the one of the least loss first."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(done, key=lambda trial: (trial.value, trial.number))


def chosen(study: Study, start: float, scale: Scale = SCALES["log"]) -> FrozenTrial:
    """The trial whose strength is nearest to the first, of those as good as the best.

    As good is what is above it by no more than the standard error of the difference.
    """
    done = _completed(study)
    above = {trial.number: _result(trial).above(_result(done[0])) for trial in done}
    alike = [trial for trial in done if above[trial.number][0] <= above[trial.number][1]]
    return min(alike, key=lambda trial: scale.distance(strength_of(trial), start))


def _result(trial: FrozenTrial) -> Validation:
    return Validation(**trial.user_attrs[_RESULT])


def trial_records(study: Study, plan: Plan, config: TuneConfig) -> list[records.Trial]:
    """What each trial came to, in the order of their strengths."""
    done = _completed(study)
    found: list[records.Trial] = []
    for trial in study.get_trials(deepcopy=False):
        strength, diverged = strength_of(trial), trial not in done
        above, stderr = (None, None) if diverged else _result(trial).above(_result(done[0]))
        found.append({
            "strength": strength,
            "epochs": planned(config, strength, 0).epochs_done() if diverged else plan.until,
            "val_loss": trial.value if not diverged else None,
            "above_best": above,
            "stderr": stderr if stderr is not None and stderr < math.inf else None,
            "pruned": diverged,
        })  # fmt: skip
    return sorted(found, key=lambda record: record["strength"])


def record(study: Study, plan: Plan, config: TuneConfig) -> dict[str, Any]:
    """What the search came to; its `command` still in words.

    Args:
        study: Searched to its end.
        plan: How.
        config: The command's.
    """
    first = start(config)
    found = chosen(study, first, scale_of(config.tuned()))
    trials = trial_records(study, plan, config)
    strength, cost = strength_of(found), study.user_attrs["step_cost"]
    return {
        "schema": SCHEMA,
        "regularizer": config.tuned(),
        "strength": strength,
        "val_loss": found.value,
        "first": first,
        "trials": trials,
        "at_edge": strength in (trials[0]["strength"], trials[-1]["strength"]),
        "range": list(config.bounds()),
        "budget": config.budget,
        "spent": sum(trial["epochs"] for trial in trials) * cost / config.epochs,
        "step_cost": cost,
        "run": str(planned(config, strength, plan.until).folder.path),
        "command": command(config, strength),
    }
