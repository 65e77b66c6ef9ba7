"""`hesstrace tune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hesstrace_cli.cli import screen
from hesstrace_cli.cli.options import with_options
from hesstrace_cli.cli.output import check_places, write_json
from hesstrace_cli.cli.runs import command_line, train_all
from hesstrace_cli.cli.signals import StopRequest
from hesstrace_cli.cli.train import warn_of_unused
from hesstrace_cli.config import TrainConfig, TuneConfig, parse_terms, resolve, scale_of
from hesstrace_cli.errors import ConfigError, HesstraceError, NumericsError
from hesstrace_cli.reporting import tables

_ROUNDS = 15  # of timing steps: the budget goes by it


@with_options(TrainConfig)
def train_until(
    epoch: Annotated[int, typer.Argument()], *, flags: dict[str, Any], config: str | None
) -> None:
    """Train up to an epoch: a run of `tune --jobs`, in a process of its own."""
    from hesstrace_cli.training.paused import advance_until
    from hesstrace_cli.training.run import Run

    run = Run(resolve(TrainConfig, flags, config))
    with StopRequest() as stop:
        for _ in advance_until(run, epoch, stop):
            pass


@with_options(TuneConfig)
def tune(*, flags: dict[str, Any], config: str | None) -> None:
    """Look for a regularizer's strength on validation, within a budget.

    The regularizer's default is trained first, its neighbours next, and losses late in the run are
    compared. A second call goes on with what is not finished.

    Example: hesstrace tune --reg trace --budget 5
    """
    screen.refuse_processes("tune")
    settings = resolve(TuneConfig, flags, config)
    warn_of_unused(settings, [name for name, _ in parse_terms(settings.reg)])
    with screen.doing("loading"):
        check_places(settings.json, None, [config])
        from hesstrace_cli.comparison import grid, tuning

    folder, bounds, first = tuning.root(settings), settings.bounds(), tuning.start(settings)
    lock = grid.lock(folder, (tuning.RUNS, tuning.STUDY))
    with screen.doing("timing a step"):
        study = tuning.open_study(
            folder, tuning.settings_of(settings), lambda: _step_cost(settings)
        )
    cost = study.user_attrs["step_cost"]
    plan = tuning.plan_of(settings, cost)
    screen.say(
        f"{plan.size} strengths of {settings.tuned()}, from {first:g} on, within {bounds[0]:g} and "
        f"{bounds[1]:g}, compared after epoch {plan.until} of {settings.epochs}; a step takes "
        f"{cost:.2f} times a plain one"
    )

    def evaluate(strengths: Sequence[float]) -> list[tuning.Validation | None]:
        runs = [tuning.planned(settings, strength, plan.until) for strength in strengths]
        try:
            train_all(grid.pending(runs), settings.jobs)
        except HesstraceError as problem:
            if problem.exit_code != ConfigError.exit_code or first in strengths:
                raise
            raise ConfigError(
                f"{problem}; the search came to {', '.join(f'{s:g}' for s in strengths)}: a "
                "--range, and another --out, keep it from there"
            ) from problem
        return [tuning.validation(run) for run in runs]

    tuning.search(study, plan, bounds, first, evaluate, scale_of(settings.tuned()))
    lock.release()
    _report(settings, tuning.record(study, plan, settings))


def _report(settings: TuneConfig, record: dict[str, Any]) -> None:
    command = command_line(record["command"])
    if not write_json({**record, "command": command}, settings.json):
        screen.show(tables.tuning_table(record))
    if record["at_edge"]:
        tried = len(record["trials"])
        which = "of two, one always is" if tried == 2 else f"of {tried}"
        screen.say(
            f"warning: {record['strength']:g} is at an edge of what was tried ({which}); look "
            "further with --range or a larger --budget, and another --out"
        )
    screen.say(f"train with: {command}")


def _step_cost(settings: TuneConfig) -> float:
    """The time of a step with the regularizer over that of a plain one."""
    from hesstrace_cli.comparison import tuning
    from hesstrace_cli.training.cost import step_costs

    least = tuning.planned(settings, settings.bounds()[0], 0)
    configs = {"none": tuning.plain(settings), "tuned": least.config}
    costs = step_costs(configs, rounds=_ROUNDS)
    if "tuned" not in costs:
        raise NumericsError(
            f"a step with {least.regularizer}, the least strength, is not finite; look at lower "
            "ones with --range"
        )
    return costs["tuned"].time
