"""A strength looked for on validation, in an Optuna study that lies in the folder and is resumed.

The first part of the run is trained once, with the strength that the search begins with, and for
every strength that is tried a run branches off from there and goes on to its end: only there their
losses can be compared, as what a penalty is for, overfitting, comes late. The schedules are those
of whole runs, so that the branch of the first strength is its whole run, to the bit.

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
    TrainConfig,
    TuneConfig,
    key_of,
    parse_regularizers,
    parse_terms,
    regularizers_name,
    usual_strength,
)
from hesstrace_cli.errors import ConfigError, NumericsError
from hesstrace_cli.storage.branches import VALIDATION, branch_off
from hesstrace_cli.storage.resume import PLACE
from hesstrace_cli.storage.runs import default_folder

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

SCHEMA = "hesstrace/tune/1"
STUDY = "study.journal"
SHARED = "shared"
BRANCHES = "branches"

_MOST = 7  # strengths that are tried; a larger budget shares fewer epochs instead
_FEWEST = 3
_SHARED = 1 / 2  # of the epochs, at most, that the runs of more than the fewest have in common
_MOST_SHARED = 3 / 4  # that those of the fewest have
_NAME, _RESULT = "strength", "validation"  # in a trial
_UNSHARED = ("swa", "ema")  # the average kept so far depends on the strength


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
"""Trains the runs of strengths to their ends; None of one that diverged."""


@dataclass(frozen=True)
class Plan:
    """What a budget pays for.

    Attributes:
        size: Strengths that are tried.
        shared: Epochs that their runs have in common.
        epochs: Of a whole run.
    """

    size: int
    shared: int
    epochs: int

    @property
    def trained(self) -> int:
        """Epochs in all."""
        return self.shared + self.size * (self.epochs - self.shared)

    def rounds(self) -> list[int]:
        """Strengths that are trained side by side: the first, then two of them, the last alone."""
        pairs, left = divmod(self.size - 2, 2)
        return [1, *[2] * pairs, *[1] * (1 + left)] if self.size > _FEWEST else [1] * self.size


def plan(budget: float, cost: float, epochs: int, *, shares: bool = True) -> Plan:
    """As many strengths as can be, and of those plans the one that shares the fewest epochs.

    Args:
        budget: In plain runs' time.
        cost: Of a step over that of a plain one.
        epochs: Of a run.
        shares: Whether runs of different strengths may have their first epochs in common.

    Raises:
        ConfigError: If it does not pay for a choice.
    """
    runs = budget / cost
    for size in range(_MOST, _FEWEST - 1, -1):
        share = (_SHARED if size > _FEWEST else _MOST_SHARED) if shares else 0.0
        shared = max(0, math.ceil(epochs * (size - runs) / (size - 1) - 1e-9))
        if shared <= share * epochs:
            return Plan(size, shared, epochs)
    least = Plan(_FEWEST, math.floor(_MOST_SHARED * epochs) if shares else 0, epochs)
    enough = math.ceil(10 * least.trained * cost / epochs - 1e-9) / 10
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
    return float(f"{math.sqrt(low * high):.3g}")


def shares(config: TuneConfig) -> bool:
    """Whether runs of different strengths may have their first epochs in common."""
    return config.tuned() not in _UNSHARED


def shared(config: TuneConfig, epochs: int) -> PlannedRun:
    """What the runs have in common, so many epochs of it."""
    return _run(config, start(config), SHARED, epochs)


def branch(config: TuneConfig, strength: float) -> PlannedRun:
    """The run of a strength: of all but its shared epochs, or of all."""
    return Branch(**vars(_run(config, strength, BRANCHES, config.epochs)))


@dataclass(frozen=True)
class Branch(PlannedRun):
    """A run of which nothing but its loss on the validation split is asked."""

    @property
    def done(self) -> bool:
        """Whether that is there, or it has diverged."""
        return self.diverged.is_file() or (self.folder.path / VALIDATION).is_file()


def plain(config: TuneConfig) -> TrainConfig:
    """The run without any regularizer, whose time the budget counts in."""
    return replace(_run(config, 0.0, SHARED, 0).config, reg=["none"])


def _run(config: TuneConfig, strength: float, place: str, until: int) -> PlannedRun:
    own = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
    others = [f"{n}={s!r}" for n, s in parse_terms(config.reg) if s is not None]
    entries = [*others, f"{config.tuned()}={strength!r}"]
    name = regularizers_name(parse_regularizers(entries, None))
    run = TrainConfig(**{**own, "reg": [name], "resume": False, "resume_or_start": False})
    folder = default_folder(run, str(root(config) / place))
    return PlannedRun(0, name, replace(run, out=str(folder)), until)


def branch_from(trunk: PlannedRun, run: PlannedRun) -> None:
    """Let a run, if it is not begun, go on from where another one is.

    Raises:
        NumericsError: If that one diverged.
    """
    if trunk.diverged.is_file():
        raise NumericsError(
            f"the run of {trunk.regularizer}, which the search begins with, diverged; give a "
            "--range of smaller strengths"
        )
    branch_off(trunk.folder, run.config)


def validation(run: PlannedRun) -> Validation | None:
    """What a run came to; None where it diverged."""
    if run.diverged.is_file():
        return None
    return Validation(**json.loads((run.folder.path / VALIDATION).read_text()))


def settings_of(config: TuneConfig) -> dict[str, Any]:
    """What the trials of a search depend on, by key."""
    own = {item.name for item in fields(TuneConfig)} - {*PLACE, "jobs", "json"}
    return {key_of(name): getattr(config, name) for name in sorted(own)}


def command(config: TuneConfig, strength: float) -> list[str]:
    """What trains with a strength: words behind `hesstrace`."""
    run = replace(branch(config, strength).config, out=None)
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
    study: Study, plan: Plan, bounds: tuple[float, float], start: float, evaluate: Evaluate
) -> None:
    """Run the study to its end; what is in it already is not done again.

    It depends on what the trials gave alone, not on when they ended or where it was stopped.

    Args:
        study: As `open_study` gives it.
        plan: How many strengths.
        bounds: The least and the largest of them.
        start: The first of them.
        evaluate: Asked again for what is known after a stop.

    Raises:
        NumericsError: If every run diverged.
    """
    from hesstrace_cli.comparison.walk import Walk

    study.sampler, first = Walk(bounds, start), 0
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


def chosen(study: Study, start: float) -> FrozenTrial:
    """The trial whose strength is nearest to the first, of those as good as the best.

    As good is what is above it by no more than the standard error of the difference.
    """
    from hesstrace_cli.comparison.walk import distance

    done = _completed(study)
    above = {trial.number: _result(trial).above(_result(done[0])) for trial in done}
    alike = [trial for trial in done if above[trial.number][0] <= above[trial.number][1]]
    return min(alike, key=lambda trial: distance(strength_of(trial), start))


def _result(trial: FrozenTrial) -> Validation:
    return Validation(**trial.user_attrs[_RESULT])


def trial_records(study: Study, config: TuneConfig) -> list[records.Trial]:
    """What each trial came to, in the order of their strengths."""
    done = _completed(study)
    found: list[records.Trial] = []
    for trial in study.get_trials(deepcopy=False):
        strength, diverged = strength_of(trial), trial not in done
        above, stderr = (None, None) if diverged else _result(trial).above(_result(done[0]))
        found.append({
            "strength": strength,
            "epochs": branch(config, strength).epochs_done() if diverged else config.epochs,
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
    found, trials = chosen(study, first), trial_records(study, config)
    strength, cost = strength_of(found), study.user_attrs["step_cost"]
    own = sum(max(0, trial["epochs"] - plan.shared) for trial in trials)
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
        "spent": (plan.shared + own) * cost / config.epochs,
        "step_cost": cost,
        "shared_epochs": plan.shared,
        "command": command(config, strength),
    }
