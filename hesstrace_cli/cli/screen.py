"""Two consoles: results to stdout, progress and messages to stderr."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from hesstrace_cli.errors import ConfigError

_LOG_WIDTH = 140


def results() -> Console:
    """Where results go; as wide as a log file can hold where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, quiet=is_second())


def messages() -> Console:
    """Where progress and messages go."""
    width = None if sys.stderr.isatty() else _LOG_WIDTH
    return Console(stderr=True, width=width, quiet=is_second())


def is_second() -> bool:
    """Of torchrun's processes the first alone speaks."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def say(text: str) -> None:
    """One line on stderr, as it is."""
    messages().print(text, markup=False, highlight=False, soft_wrap=True)


def refuse_processes(command: str) -> None:
    """Stop where `torchrun` started a command that runs in one process.

    Raises:
        ConfigError: If there are several.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(f"hesstrace {command} runs in one process; start it without torchrun")


def complain(text: str) -> None:
    """An error, which every process may say."""
    if is_second():
        text = f"process {os.environ['RANK']}: {text}"
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def echo(text: str) -> None:
    """A text on stdout as it is, for programs."""
    if not is_second():
        typer.echo(text)


def show(table: Table) -> None:
    """A table on stdout."""
    results().print(table)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Progress | None]:
    """A live bar on a terminal; None elsewhere, where lines are printed instead."""
    console = messages()
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(description, total=total, note="")
        yield progress


class Board:
    """One live table of the runs at work, with what is left; lines as they end elsewhere.

    Args:
        runs: How many runs there are.
        epochs: How many epochs they take together.
    """

    def __init__(self, runs: int, epochs: int) -> None:
        self.runs, self.epochs, self.done, self._epochs_done = runs, epochs, 0, 0
        self._console = messages()
        self._began = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Board:
        """Begin to draw, on a terminal."""
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the table away."""
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line above the table."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def add_done(self, epochs: int) -> None:
        """One run has ended, with so many epochs."""
        self.done += 1
        self._epochs_done += epochs

    def show(self, jobs: list[tuple[str, int, int]], waiting: int) -> None:
        """Draw the runs at work: name, epochs done, epochs."""
        if self._live is None:
            return
        done = self._epochs_done + sum(epochs for _, epochs, _ in jobs)
        left = "?"
        if done:
            seconds = (time.monotonic() - self._began) * (self.epochs - done) / done
            left = str(timedelta(seconds=round(seconds)))
        table = Table(title=f"{self.done} of {self.runs} runs done, {waiting} waiting, {left} left",
                      title_justify="left")  # fmt: skip
        table.add_column("run")
        table.add_column("epoch", justify="right")
        table.add_column("")
        for name, epochs, total in jobs:
            table.add_row(name, f"{epochs}/{total}", ProgressBar(total, epochs, width=30))
        self._live.update(table)


class StopRequest:
    """Remembers SIGINT or SIGTERM, so that the run can save before it stops.

    A second one kills, unless it comes within a second: then it is the first one on another way,
    as launchers pass on what their whole group has got already.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    def __call__(self) -> int | None:
        """The signal that came, or None."""
        return self.number

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > 1:
            raise KeyboardInterrupt

    def __enter__(self) -> StopRequest:
        """Take over the two signals."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {n: signal.signal(n, self._remember) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
