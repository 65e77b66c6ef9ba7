"""Two consoles: results to stdout, progress and messages to stderr."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

_LOG_WIDTH = 140


def results() -> Console:
    """Where results go; as wide as a log file can hold where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)


def messages() -> Console:
    """Where progress and messages go."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else _LOG_WIDTH)


def say(text: str) -> None:
    """One line on stderr, as it is."""
    messages().print(text, markup=False, highlight=False, soft_wrap=True)


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


class StopRequest:
    """Remembers SIGINT or SIGTERM, so that the run can save before it stops; a second one kills."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> int | None:
        """The signal that came, or None."""
        return self.number

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> StopRequest:
        """Take over the two signals."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {n: signal.signal(n, self._remember) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
