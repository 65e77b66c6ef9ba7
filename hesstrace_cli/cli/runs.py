"""Runs of a comparison or a search trained in this process or in others, under one live table."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from hesstrace_cli.cli import screen
from hesstrace_cli.cli.output import say_once
from hesstrace_cli.cli.signals import StopRequest
from hesstrace_cli.cli.train import report_negative
from hesstrace_cli.errors import ConfigError, NumericsError

if TYPE_CHECKING:
    from hesstrace_cli.comparison.grid import Job, PlannedRun


def command_line(arguments: Sequence[str]) -> str:
    """The command, to be read by any shell, in one line.

    Raises:
        ConfigError: If a line cannot hold it.
    """
    for word in arguments:
        if not word.isprintable():
            raise ConfigError(
                f"--plan prints a command a line, which cannot hold {word!r}: it has a line break "
                "or another character that does not show; rename it"
            )
    return "hesstrace " + shlex.join(arguments)


def train_all(pending: Sequence[PlannedRun], jobs: int) -> None:
    """Train what is pending under one live table; a run that diverges is noted and passed by."""
    from hesstrace_cli.comparison.grid import note_divergence

    total = sum(_last(run) for run in pending)
    with screen.Board(len(pending), total) as board:
        ended = _one_by_one(pending, board) if jobs == 1 else _side_by_side(pending, jobs, board)
        for run, problem in ended:
            board.add_done(_last(run))
            if problem is None:
                where = "finished" if run.until is None else f"is after epoch {run.until}"
                name = f"{run.regularizer} seed {run.config.seed}"
                screen.say(f"{board.done}/{len(pending)} {name} {where}")
            else:
                note_divergence(run, problem)
                screen.say(f"warning: {run.config.out} diverged: {problem}")


def _last(run: PlannedRun) -> int:
    """The epoch it is trained to."""
    return run.until or run.epochs


def _one_by_one(
    pending: Sequence[PlannedRun], board: screen.Board
) -> Iterator[tuple[PlannedRun, str | None]]:
    """Each run as it ends, trained in this process, with the problem where it diverged."""
    from hesstrace_cli.training.paused import advance_until
    from hesstrace_cli.training.run import Run

    said: set[str] = set()
    for number, planned in enumerate(pending, start=1):
        name, epochs = f"{planned.regularizer} seed {planned.config.seed}", _last(planned)
        board.show([(name, 0, epochs)], len(pending) - number)
        try:
            run = Run(planned.config)
            say_once(run.trainer.data.task_note, said)
            with StopRequest() as stop:
                for progress in advance_until(run, planned.until, stop):
                    if progress.record is not None:
                        report_negative(progress.record)
                        board.show([(name, progress.epoch, epochs)], len(pending) - number)
        except NumericsError as problem:
            yield planned, str(problem)
        else:
            yield planned, None


def _side_by_side(
    pending: Sequence[PlannedRun], jobs: int, board: screen.Board
) -> Iterator[tuple[PlannedRun, str | None]]:
    """Each run as it ends, trained in a process of its own, so many at a time."""
    from hesstrace_cli.comparison.grid import run_side_by_side

    with StopRequest() as stop:
        yield from run_side_by_side(pending, jobs, _drawn_on(board), stop)


def _drawn_on(board: screen.Board) -> Callable[[list[Job], int], None]:
    def draw(jobs: list[Job], waiting: int) -> None:
        lines = [
            (f"{job.run.regularizer} seed {job.run.config.seed}", job.run.epochs_done(),
             _last(job.run))
            for job in jobs
        ]  # fmt: skip
        board.show(lines, waiting)

    return draw
