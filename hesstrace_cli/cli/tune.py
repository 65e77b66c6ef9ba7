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
from hesstrace_cli.config import TrainConfig, TuneConfig, parse_terms, resolve
from hesstrace_cli.errors import NumericsError
from hesstrace_cli.reporting import tables


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

    Many strengths are trained for a few epochs, the best of them on to the end. A second call goes
    on with what is not finished.

    Example: hesstrace tune --reg trace --budget 5
    """
    screen.refuse_processes("tune")
    settings = resolve(TuneConfig, flags, config)
    warn_of_unused(settings, [name for name, _ in parse_terms(settings.reg)])
    with screen.doing("loading"):
        check_places(settings.json, None, [config])
        from hesstrace_cli.comparison import grid, tuning

    folder, bounds = tuning.root(settings), settings.bounds()
    lock = grid.lock(folder, ("runs", tuning.STUDY))
    with screen.doing("timing a step"):
        study = tuning.open_study(
            folder, tuning.settings_of(settings), lambda: _step_cost(settings)
        )
    steps, cost = tuning.rungs(settings.epochs), study.user_attrs["step_cost"]
    sizes = tuning.brackets(settings.budget, cost, steps)
    screen.say(
        f"{' + '.join(map(str, sizes))} strengths of {settings.tuned()}, from {bounds[0]:g} to "
        f"{bounds[1]:g}, compared by validation loss after {', '.join(map(str, steps))} epochs; a "
        f"step takes {cost:.2f} times a plain one"
    )

    def evaluate(strengths: Sequence[float], epochs: int) -> list[list[float] | None]:
        runs = [tuning.planned(settings, strength, epochs) for strength in strengths]
        train_all(grid.pending(runs), settings.jobs)
        return [tuning.val_losses(run, epochs) for run in runs]

    tuning.search(study, bounds, sizes, steps, evaluate, settings.seed)
    lock.release()
    _report(settings, tuning.record(study, settings))


def _report(settings: TuneConfig, record: dict[str, Any]) -> None:
    command = command_line(record["command"])
    if not write_json({**record, "command": command}, settings.json):
        screen.show(tables.tuning_table(record))
    if record["at_edge"]:
        screen.say(
            f"warning: {record['strength']:g} is at an edge of what was tried; look further with "
            "--range and another --out"
        )
    screen.say(f"train with: {command}")


def _step_cost(settings: TuneConfig) -> float:
    """The time of a step with the regularizer over that of a plain one."""
    from hesstrace_cli.comparison import tuning
    from hesstrace_cli.training.cost import step_costs

    least = tuning.planned(settings, settings.bounds()[0], settings.epochs)
    costs = step_costs({"none": tuning.plain(settings), "tuned": least.config})
    if "tuned" not in costs:
        raise NumericsError(
            f"a step with {least.regularizer}, the least strength, is not finite; look at lower "
            "ones with --range"
        )
    return costs["tuned"].time
