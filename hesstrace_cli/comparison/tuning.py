"""A strength looked for on validation, in an Optuna study that lies in the folder and is resumed.

Successive halving: n strengths are trained to the first rung (a ninth of the epochs), the best
third of them on to the second (a third of the epochs), the best third of these to the end; of
those as good as the best the larger ones, since few epochs favour small strengths. A run is left
at its rung and gone on with, to the bit; the schedules are those of the whole run. The strengths
of the first bracket lie evenly in the range's logarithm. Where the budget pays for more brackets,
Optuna's TPE suggests theirs, having seen those before.

Source:
    Jamieson, Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
    2016; Falkner et al., "BOHB", 2018 (brackets whose trials a model suggests).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
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
)
from hesstrace_cli.errors import ConfigError, NumericsError
from hesstrace_cli.storage.records import read_epochs
from hesstrace_cli.storage.resume import PLACE
from hesstrace_cli.storage.runs import default_folder

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

SCHEMA = "hesstrace/tune/1"
STUDY = "study.journal"

_FACTOR = 3  # of a rung's strengths one in so many goes on, to so many times the epochs
_MOST = 9  # strengths of a bracket: two a decade of the usual range
_FEWEST = 3  # that the first must have for a choice
_TIE = 0.1  # share of what was learnt by which a loss may be higher and as good
_NAME = "strength"

Evaluate = Callable[[Sequence[float], int], Sequence[Sequence[float] | None]]
"""Trains the runs of strengths up to an epoch; their validation losses after each epoch so far,
None of one that diverged."""


def root(config: TuneConfig) -> Path:
    """The search's folder."""
    return Path(config.out or f"searches/{config.tuned()}")


def planned(config: TuneConfig, strength: float, until: int) -> PlannedRun:
    """The run of a strength, up to an epoch."""
    others = [f"{n}={s!r}" for n, s in parse_terms(config.reg) if s is not None]
    return _run(config, [*others, f"{config.tuned()}={strength!r}"], until)


def plain(config: TuneConfig) -> TrainConfig:
    """The run without any regularizer, whose time the budget counts in."""
    return _run(config, ["none"], None).config


def _run(config: TuneConfig, entries: Sequence[str], until: int | None) -> PlannedRun:
    own = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
    name = regularizers_name(parse_regularizers(entries, None))
    run = TrainConfig(**{**own, "reg": [name], "resume": False, "resume_or_start": False})
    folder = default_folder(run, str(root(config) / "runs"))
    run = replace(run, out=str(folder))
    return PlannedRun(0, name, run, None if until == run.epochs else until)


def val_losses(run: PlannedRun, epochs: int) -> list[float] | None:
    """On the validation split after each of the epochs; None where the run diverged."""
    if run.diverged.is_file():
        return None
    found = [epoch.get("val_loss") for epoch in read_epochs(run.folder.metrics)[:epochs]]
    return [math.inf if loss is None else loss for loss in found]


def settings_of(config: TuneConfig) -> dict[str, Any]:
    """What the trials of a search depend on, by key."""
    own = {item.name for item in fields(TuneConfig)} - {*PLACE, "jobs", "json"}
    return {key_of(name): getattr(config, name) for name in sorted(own)}


def command(config: TuneConfig, strength: float) -> list[str]:
    """What trains with a strength: words behind `hesstrace`."""
    run = replace(planned(config, strength, config.epochs).config, out=None)
    return arguments(run)[:-1]  # it begins


def rungs(epochs: int) -> list[int]:
    """The epochs after which the strengths are compared, the last one the run's own."""
    return sorted({math.ceil(epochs / _FACTOR**k) for k in (0, 1, 2)})


def brackets(budget: float, cost: float, steps: Sequence[int]) -> list[int]:
    """How many strengths each bracket begins with.

    Args:
        budget: In plain runs' time.
        cost: Of a step over that of a plain one.
        steps: The rungs.

    Raises:
        ConfigError: If it does not pay for a choice.
    """
    left, found = budget * steps[-1] / cost, list[int]()
    while sizes := [n for n in range(1, _MOST + 1) if _epochs(n, steps) <= left]:
        found.append(sizes[-1])
        left -= _epochs(sizes[-1], steps)
    if not found or found[0] < _FEWEST:
        least = math.ceil(10 * _epochs(_FEWEST, steps) * cost / steps[-1]) / 10
        raise ConfigError(
            f"--budget {budget:g} pays for fewer than {_FEWEST} strengths, as a step takes "
            f"{cost:.2g} times that of a plain one; give at least --budget {least:g}"
        )
    return found


def _epochs(size: int, steps: Sequence[int]) -> int:
    """What a bracket of so many strengths trains in all."""
    total = 0
    for before, after in pairwise([0, *steps]):
        total += size * (after - before)
        size = max(1, size // _FACTOR)
    return total


def spread(low: float, high: float, count: int) -> list[float]:
    """Strengths from `low` to `high`, evenly in the logarithm, of three digits."""
    inner = [low * (high / low) ** (i / (count - 1)) for i in range(1, count - 1)]
    return [low, *(float(f"{value:.3g}") for value in inner), high]


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
    bounds: tuple[float, float],
    sizes: Sequence[int],
    steps: Sequence[int],
    evaluate: Evaluate,
    seed: int,
) -> None:
    """Run the study to its end; what is in it already is not done again.

    It depends on what the trials gave alone, not on when they ended or where it was stopped.

    Args:
        study: As `open_study` gives it.
        bounds: The least and the largest strength.
        sizes: The strengths of each bracket.
        steps: The rungs.
        evaluate: Asked again for what is known after a stop.
        seed: Of the suggestions.

    Raises:
        NumericsError: If every run diverged.
    """
    first = 0
    for number, size in enumerate(sizes):
        designed = spread(*bounds, size) if number == 0 else [None] * size
        for place, value in enumerate(designed, start=first):
            _ask(study, place, bounds, value, seed + place)
        _halve(study, range(first, first + size), steps, evaluate)
        first += size
    if best(study) is None:
        raise NumericsError("every strength diverged; give a --range of smaller ones")


def _ask(
    study: Study, number: int, bounds: tuple[float, float], value: float | None, seed: int
) -> None:
    """Make sure that the study has a trial of this number, of a value or of one it suggests."""
    from optuna import Trial
    from optuna.distributions import FloatDistribution
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    study.sampler = TPESampler(seed=seed, n_startup_trials=1)  # resumed, it suggests the same
    trials = study.get_trials(deepcopy=False)
    if len(trials) <= number and value is not None:
        study.enqueue_trial({_NAME: value})
    if len(trials) <= number or trials[number].state == TrialState.WAITING:
        study.ask({_NAME: FloatDistribution(*bounds, log=True)})
    elif _NAME not in trials[number].params:  # killed in the middle of what `ask` does
        Trial(study, trials[number]._trial_id).suggest_float(_NAME, *bounds, log=True)


def _halve(study: Study, numbers: Sequence[int], steps: Sequence[int], evaluate: Evaluate) -> None:
    """Train the trials rung by rung, and tell the study what became of each."""
    alive = list(numbers)
    for epochs in steps:
        trials = study.get_trials(deepcopy=False)
        curves = dict(
            zip(alive, evaluate([strength_of(trials[n]) for n in alive], epochs), strict=True)
        )
        losses = {n: curve[-1] if curve else math.inf for n, curve in curves.items()}
        for number in alive:
            _report(study, trials[number], epochs, losses[number])
        keep = max(1, len(alive) // _FACTOR)
        ranked = [n for n in sorted(alive, key=lambda n: (losses[n], n)) if losses[n] < math.inf]
        if keep > 1 and ranked:
            ranked = _larger_first(ranked, trials, losses, curves[ranked[0]] or [0.0])
        is_last = epochs == steps[-1]
        going_on = [] if is_last else ranked[:keep]
        for number in alive:
            if number not in going_on:
                _end(study, trials[number], losses[number] if is_last else math.inf)
        alive = sorted(going_on)


def _larger_first(
    ranked: Sequence[int],
    trials: Sequence[FrozenTrial],
    losses: Mapping[int, float],
    best: Sequence[float],
) -> list[int]:
    """The ranked trials, of those about as good as the best the larger strengths first.

    Few epochs favour small strengths, as what a large one is for, overfitting, is yet to come.

    Args:
        ranked: By their losses.
        trials: By number.
        losses: By number.
        best: The losses of the first of them after each epoch; what it has learnt since the first
            epoch is what differences are small beside.
    """
    tie = best[-1] + _TIE * max(0.0, best[0] - best[-1])
    good = [number for number in ranked if losses[number] <= tie]
    good.sort(key=lambda number: -strength_of(trials[number]))
    return [*good, *(number for number in ranked if number not in good)]


def _report(study: Study, trial: FrozenTrial, epochs: int, loss: float) -> None:
    from optuna import Trial

    if not trial.state.is_finished() and epochs not in trial.intermediate_values:
        Trial(study, trial._trial_id).report(loss, epochs)


def _end(study: Study, trial: FrozenTrial, loss: float) -> None:
    """Complete with a loss, or pruned where it has none."""
    from optuna.trial import TrialState

    if trial.state.is_finished():
        return
    if loss < math.inf:
        study.tell(trial.number, loss)
    else:
        study.tell(trial.number, state=TrialState.PRUNED)


def strength_of(trial: FrozenTrial) -> float:
    """The strength of a trial, of three digits where it was suggested."""
    low, high = (getattr(trial.distributions[_NAME], end) for end in ("low", "high"))
    value = trial.params[_NAME]
    return value if value in (low, high) else min(max(float(f"{value:.3g}"), low), high)


def best(study: Study) -> FrozenTrial | None:
    """The trial that went to its end with the least validation loss; None where none did."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(done, key=lambda trial: (trial.value, trial.number), default=None)


def trial_records(study: Study) -> list[records.Trial]:
    """What each trial came to, in the order of their strengths."""
    from optuna.trial import TrialState

    found: list[records.Trial] = []
    for trial in study.get_trials(deepcopy=False):
        epochs = trial.last_step or 0
        loss = trial.intermediate_values.get(epochs, math.inf)
        found.append({
            "strength": strength_of(trial),
            "epochs": epochs,
            "val_loss": loss if loss < math.inf else None,
            "pruned": trial.state != TrialState.COMPLETE,
        })  # fmt: skip
    return sorted(found, key=lambda record: record["strength"])


def record(study: Study, config: TuneConfig) -> dict[str, Any]:
    """What the search came to; its `command` still in words.

    Args:
        study: Searched to its end.
        config: The command's.
    """
    found = best(study)
    assert found is not None
    strength, trials = strength_of(found), trial_records(study)
    cost = study.user_attrs["step_cost"]
    return {
        "schema": SCHEMA,
        "regularizer": config.tuned(),
        "strength": strength,
        "val_loss": found.value,
        "trials": trials,
        "at_edge": strength in (trials[0]["strength"], trials[-1]["strength"]),
        "range": list(config.bounds()),
        "budget": config.budget,
        "spent": sum(trial["epochs"] for trial in trials) * cost / config.epochs,
        "step_cost": cost,
        "run": str(planned(config, strength, config.epochs).folder.path),
        "command": command(config, strength),
    }
