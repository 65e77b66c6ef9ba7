"""`hesstrace compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hesstrace_cli import records
from hesstrace_cli.cli import screen
from hesstrace_cli.cli.options import with_options
from hesstrace_cli.cli.runs import command_line, train_all
from hesstrace_cli.cli.train import warn_of_unused
from hesstrace_cli.config import CompareConfig, TrainConfig, resolve
from hesstrace_cli.errors import ConfigError, NumericsError
from hesstrace_cli.reporting import comparisons, plots, tables
from hesstrace_cli.reporting.layout import markdown_table
from hesstrace_cli.reporting.text import for_markdown

if TYPE_CHECKING:
    from hesstrace_cli.comparison.found import Found
    from hesstrace_cli.comparison.grid import PlannedRun

_COSTS = "step_cost.json"


@with_options(CompareConfig)
def compare(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR | RUN_DIR...]", show_default=False)
    ] = None,
    *,
    flags: dict[str, Any],
    config: str | None,
) -> None:
    """Train every regularizer with every seed and tabulate metrics, loss and trace.

    Each --reg is a row; a second call runs only what is not finished. With folders, nothing is
    trained: the finished runs in them are tabulated.

    Example: hesstrace compare --reg none --reg trace=0.01 --seeds 0,1,2
    """
    screen.refuse_processes("compare")
    if folders:
        if flags or config is not None:
            raise ConfigError("compare takes folders to tabulate, or settings of runs, not both")
        _tabulate_folders(folders)
        return
    settings = resolve(CompareConfig, flags, config)

    names = {name for rows in settings.candidates() for row in rows for name in row.strengths}
    warn_of_unused(settings, names)

    with screen.doing("loading"):
        from hesstrace_cli.comparison import equal_time, grid

    runs = grid.plan(settings)
    equal_time.check_folder(grid.root(settings), equal=settings.equal)
    if settings.plan and settings.equal == "epochs":
        _print_plan(settings, runs)
        return
    lock = grid.lock(grid.root(settings))
    if settings.equal == "time":
        runs = _for_equal_time(grid.root(settings), runs)
    if settings.plan:
        _print_plan(settings, runs)
        lock.release()
        return
    chosen, measure = _trained(settings, runs)
    with screen.doing("timing a step of each row"):
        costs = _step_costs(grid.root(settings), chosen, measure=measure)
    _report(grid.results(chosen), costs, grid.root(settings))
    lock.release()


def _trained(settings: CompareConfig, runs: Sequence[PlannedRun]) -> tuple[list[PlannedRun], bool]:
    """The runs of the rows, of chosen strengths, ended, and whether any was trained now."""
    from hesstrace_cli.comparison import choice, grid

    tried = choice.to_choose_from(settings, runs)
    anew = _train(settings, tried)
    chosen = choice.choose_strengths(tried, settings.tune_by)
    if settings.tune:
        _say_choices(tried, chosen, settings.tune_by)
    rest = choice.of_other_seeds(runs, chosen)
    anew = _train(settings, [*tried, *rest]) or anew
    chosen = [*chosen, *rest]
    if settings.tune:
        edges = choice.at_edge(settings, chosen)
        choice.write_chosen(grid.root(settings), chosen, settings.tune_by, edges)
    else:  # what an earlier comparison there has chosen is not of this one
        choice.forget_chosen(grid.root(settings))
    return chosen, anew


def _train(settings: CompareConfig, runs: Sequence[PlannedRun]) -> bool:
    """Train those that are not done; whether there were any."""
    from hesstrace_cli.comparison import grid

    pending = grid.pending(runs)
    grid.write_planned(grid.root(settings), runs)
    if pending:
        train_all(pending, settings.jobs)
    return bool(pending)


def _print_plan(settings: CompareConfig, runs: Sequence[PlannedRun]) -> None:
    """Those of a choice that is yet to be made, or all."""
    from hesstrace_cli.comparison import choice, grid

    tried = choice.to_choose_from(settings, runs)
    if settings.tune_seeds and all(run.done for run in tried):
        chosen = choice.choose_strengths(tried, settings.tune_by)
        tried = [*tried, *choice.of_other_seeds(runs, chosen)]
    for run in tried:
        screen.echo(command_line(grid.arguments(run.config)))


def _for_equal_time(folder: Path, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs, each as long as it takes for the time of the slowest row; measured once."""
    from hesstrace_cli.comparison import equal_time
    from hesstrace_cli.training.cost import epoch_seconds

    measured = equal_time.measured_for(runs)
    epochs = equal_time.epochs_kept(folder, runs)
    if epochs is None:
        configs = {equal_time.cell_of(run): run.config for run in reversed(runs)}
        first = {cell: configs[cell] for cell in measured.values()}
        with screen.doing("timing epochs of each row"):
            seconds = epoch_seconds(first)
        epochs = equal_time.write_epochs(folder, runs, seconds)
    several = len({cell[:2] for cell in epochs}) > 1
    said = (f"{' '.join(cell if several else cell[2:])} {n}" for cell, n in epochs.items())
    screen.say(f"epochs for equal time: {', '.join(said)}")
    return equal_time.stretched(runs, epochs)


def _tabulate_folders(folders: Sequence[str]) -> None:
    with screen.doing("loading"):
        from hesstrace_cli.comparison.found import Found, collect

        each = [collect(Path(folder)) for folder in folders]
    found = Found(
        [run for one in each for run in one.finished],
        [run for one in each for run in one.diverged],
        [run for one in each for run in one.unfinished],
    )
    out = Path(folders[0]) if len(folders) == 1 else None
    _report(found, _read_costs(out), out)


def _report(found: Found, costs: dict[str, float], out: Path | None) -> None:
    from hesstrace_cli.comparison.found import CHOSEN
    from hesstrace_cli.comparison.groups import with_settings
    from hesstrace_cli.comparison.table import tabulate, write
    from hesstrace_cli.storage.records import read_chosen

    found = with_settings(found)
    finished = found.finished
    comparison = tabulate(finished, found.diverged, costs, found.unfinished)
    chosen = None if out is None else read_chosen(out / CHOSEN)
    if chosen is not None and chosen["by"]:
        comparison["chosen_by"] = chosen["by"]
        comparison["at_edge"] = chosen.get("at_edge", [])
    several = len({(row["dataset"], row["model"]) for row in comparison["rows"]}) > 1
    markdown = ""
    for table in tables.comparison_tables(comparison, several=several):
        screen.show(table, kept=out is not None)
        markdown += f"{for_markdown(table.title)}\n\n{markdown_table(table.head, table.rows)}\n"
    for line in (*_chosen_by(comparison), *tables.settings_lines(comparison)):
        screen.say(line)
        markdown += f"{for_markdown(line)}\n\n"
    screen.say(tables.READING)
    markdown += f"{tables.READING}\n"
    if out is not None:
        write(out, comparison, markdown)
        for name, figure in comparisons.of_comparison(comparison, finished):
            plots.save(figure, str(out / name))
        screen.say(f"results.json, results.csv, results.md and plots are in {out}")
    if found.diverged and not finished:
        raise NumericsError("every run diverged")


def _chosen_by(comparison: records.Comparison) -> Iterator[str]:
    metrics = [metric.replace("_", " ") for metric in comparison.get("chosen_by", ())]
    if metrics:
        yield f"Strengths are chosen by {' and '.join(metrics)} on validation."
    for edge in comparison.get("at_edge", ()):
        yield f"At the edge of what was tried, so that the best may lie beyond: {edge}."


def _say_choices(
    runs: Sequence[PlannedRun], chosen: Sequence[PlannedRun], metric: str | None
) -> None:
    from hesstrace_cli.comparison.choice import chosen_by

    names = list(dict.fromkeys(run.regularizer for run in chosen))
    left = list(dict.fromkeys(run.regularizer for run in runs if run.regularizer not in names))
    by = " and ".join(metric.replace("_", " ") for metric in chosen_by(runs, metric)) or "metric"
    screen.say(f"chosen by validation {by}: {'; '.join(names)}. Not: {'; '.join(left)}")


def _read_costs(out: Path | None) -> dict[str, float]:
    from hesstrace_cli.storage.records import read_costs

    return {} if out is None else read_costs(out / _COSTS)


def _step_costs(out: Path, runs: Sequence[PlannedRun], *, measure: bool) -> dict[str, float]:
    """Steps timed side by side in this session; those of an earlier one where nothing was run."""
    import json

    from hesstrace_cli.comparison.table import cost_key
    from hesstrace_cli.storage.files import write_atomically
    from hesstrace_cli.training.cost import step_costs

    if not measure:
        return _read_costs(out)
    places: dict[tuple[str, str], dict[str, TrainConfig]] = {}
    for run in runs:
        if not run.diverged.is_file():
            of_place = places.setdefault((run.config.dataset, run.config.model), {})
            of_place[run.regularizer] = run.config
    costs = {
        cost_key(*place, name): cost.time
        for place, configs in places.items()
        for name, cost in step_costs(configs).items()
    }
    write_atomically(out / _COSTS, json.dumps(costs, indent=2) + "\n")
    return costs
