"""`hesstrace compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hesstrace_cli.cli import screen
from hesstrace_cli.cli.options import with_options
from hesstrace_cli.cli.train import train_with_progress
from hesstrace_cli.config import CompareConfig, resolve
from hesstrace_cli.errors import ConfigError, NumericsError
from hesstrace_cli.reporting import tables


@with_options(CompareConfig)
def compare(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR | RUN_DIR...]", show_default=False)
    ] = None,
    *,
    flags: dict[str, Any],
    config: str | None,
) -> None:
    """Train every regularizer with every seed and tabulate accuracy, loss and trace.

    With folders, nothing is trained: the finished runs in them are tabulated.

    Example: hesstrace compare --reg none --reg trace=0.01 --seeds 0,1,2
    """
    from hesstrace_cli.comparison import collect, tabulate, write

    diverged: dict[str, int] = {}
    if folders:
        if flags or config:
            raise ConfigError("compare takes folders to tabulate, or settings of runs, not both")
        summaries = [s for folder in folders for s in collect(Path(folder))]
        out = Path(folders[0]) if len(folders) == 1 else None
    else:
        settings = resolve(CompareConfig, flags, config)
        summaries, diverged = _train_all(settings)
        out = Path(settings.out or "comparisons/compare")
    comparison = tabulate(summaries, diverged)
    rows = tables.comparison_rows(comparison)
    if out is not None:
        write(out, comparison, tables.markdown_table(tables.COMPARISON_HEAD, rows))
    title = "mean ± standard deviation over seeds"
    screen.show(tables.rich_table(title, tables.COMPARISON_HEAD, rows))
    if diverged and not summaries:
        raise NumericsError("every run diverged")


def _train_all(settings: CompareConfig) -> tuple[list[dict[str, Any]], dict[str, int]]:
    from hesstrace_cli.comparison import pending, plan
    from hesstrace_cli.runs import RunFolder
    from hesstrace_cli.training import Run

    runs = plan(settings)
    diverged: dict[str, int] = {}
    for planned in pending(runs):
        try:
            train_with_progress(
                Run(planned.config), f"{planned.regularizer} seed {planned.config.seed}"
            )
        except NumericsError as problem:
            screen.say(f"warning: {planned.config.out} diverged: {problem}")
            diverged[planned.regularizer] = diverged.get(planned.regularizer, 0) + 1
    finished = [(r, RunFolder(Path(r.config.out or "")).summary()) for r in runs]
    return [{**s, "folder": r.config.out} for r, s in finished if s is not None], diverged
