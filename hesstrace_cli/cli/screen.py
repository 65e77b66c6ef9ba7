"""Two consoles: results to stdout, progress and messages to stderr."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TextIO

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from hesstrace_cli.cli.streams import silence_stdout
from hesstrace_cli.distributed import launcher
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.reporting.layout import Table, fitted
from hesstrace_cli.reporting.text import for_screen

_LOG_WIDTH = 140  # of a table where no screen sets it
_ENDLESS = 10**6
_drawing_on: list[Console] = []  # the console of a live display, above which messages are to stand


def _console(stream: TextIO | None, *, stderr: bool = False) -> Console:
    """A console that draws on a terminal alone; elsewhere plain lines, as long as they are."""
    at_terminal = stream is not None and not stream.closed and stream.isatty()
    width = None if at_terminal else _ENDLESS
    return Console(stderr=stderr, width=width, force_terminal=at_terminal, quiet=is_second())


def messages() -> Console:
    """Where progress and messages go."""
    return _drawing_on[-1] if _drawing_on else _console(sys.stderr, stderr=True)


@contextmanager
def _drawing(console: Console) -> Iterator[None]:
    _drawing_on.append(console)
    try:
        yield
    finally:
        _drawing_on.pop()


def is_second() -> bool:
    """Of torchrun's processes the first alone speaks, and one whose place cannot be known."""
    try:
        return launcher.place().rank > 0
    except ConfigError:
        return False


def say(text: str) -> None:
    """One line on stderr, made safe; a terminal wraps it between words."""
    console = messages()
    console.print(Text(for_screen(text)), soft_wrap=not console.is_terminal)


def refuse_processes(command: str) -> None:
    """Stop where `torchrun` started a command that runs in one process.

    Raises:
        ConfigError: If there are several.
    """
    if launcher.place().size > 1:
        raise ConfigError(f"hesstrace {command} runs in one process; start it without torchrun")


def complain(text: str) -> None:
    """An error, made safe, as one line; every process may say it."""
    if is_second():
        text = f"process {launcher.place().rank}: {text}"
    _write_line(text)


def _write_line(text: str) -> None:
    console = _console(sys.stderr, stderr=True)
    console.quiet = False
    console.print(Text(for_screen(text)), soft_wrap=not console.is_terminal)


def warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    *_: object,
    **__: object,
) -> None:
    """A library's warning, in the place of Python's own way to show it."""
    say(f"{filename}:{lineno}: {category.__name__}: {message}")


def show_bug(
    kind: type[BaseException], problem: BaseException, place: TracebackType | None
) -> None:
    """The traceback of an error that is none of the user's, its texts made safe."""
    for line in "".join(traceback.format_exception(kind, problem, place)).rstrip().split("\n"):
        _write_line(line)


def echo(text: str) -> None:
    """A text on stdout as it is, for programs: it must hold printable characters alone."""
    if not is_second():
        _write_result(text + "\n")


def show(table: Table, *, kept: bool = False) -> None:
    """A table on stdout, as wide as the terminal.

    Args:
        table: What to show.
        kept: Whether a file holds it too, so that nothing is lost where nobody reads stdout.
    """
    console = _console(sys.stdout)
    with console.capture() as drawn:
        if console.is_terminal:
            console.print(fitted(table, console.width))
        else:
            console.print(fitted(table, _LOG_WIDTH, may_stack=False))
    _write_result(drawn.get(), kept=kept)


def _write_result(text: str, *, kept: bool = False) -> None:
    """Write to stdout.

    Raises:
        ConfigError: If it is closed, or full.
        Exit: If nobody reads it any more, as after `| head`.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.write(text)
            sys.stdout.flush()
        elif not kept:
            raise ConfigError("the output cannot be written: stdout is closed")
    except BrokenPipeError as problem:
        silence_stdout()
        if not kept:
            raise typer.Exit(1) from problem
    except OSError as problem:
        silence_stdout()
        raise ConfigError(f"the output cannot be written: {problem.strerror}") from problem


def _cut_name() -> TextColumn:
    """The description, cut where there is no room for it."""
    column = Column(no_wrap=True, overflow="ellipsis")
    return TextColumn("{task.description}", markup=False, table_column=column)


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str, int], None] | None]:
    """A live bar on a terminal, moved by what it gives; None elsewhere, where lines tell.

    Args:
        total: Steps in all.

    Yields:
        To be called with what is being done, and the steps done.
    """
    console = messages()
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(20), TaskProgressColumn(), TimeRemainingColumn(), _cut_name())
    with _drawing(console), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda text, done: progress.update(task, description=for_screen(text), completed=done)


@contextmanager
def doing(text: str) -> Iterator[Callable[[str], None]]:
    """On a terminal a line that says what is being done, until it is; what it gives changes it."""
    console = messages()
    if not console.is_terminal:
        yield lambda _text: None
        return
    status = console.status(Text(for_screen(text)), spinner="line")
    with _drawing(console), status:
        yield lambda text: status.update(Text(for_screen(text)))


class Board:
    """One live table of the runs at work, with what is left; lines as they end elsewhere.

    Args:
        runs: How many runs there are.
        epochs: How many epochs they take together.
    """

    def __init__(self, runs: int, epochs: int) -> None:
        self.runs, self.epochs, self.done, self._epochs_done = runs, epochs, 0, 0
        self._began = time.monotonic()
        self._drawn = ExitStack()
        self._live: Live | None = None

    def __enter__(self) -> Board:
        """Begin to draw, on a terminal."""
        console = messages()
        if console.is_terminal:
            self._drawn.enter_context(_drawing(console))
            live = Live(console=console, transient=True, refresh_per_second=4)
            self._live = self._drawn.enter_context(live)
        return self

    def __exit__(self, *_: object) -> None:
        """Take the table away."""
        self._drawn.close()

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
        title = f"{self.done} of {self.runs} runs done, {waiting} waiting, {left} left"
        table = RichTable.grid(padding=(0, 2, 0, 0))
        table.add_column(width=20)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name, epochs, total in jobs:
            bar = ProgressBar(total, epochs, width=20)
            table.add_row(bar, f"{epochs}/{total}", Text(for_screen(name)))
        self._live.update(Group(Text(title), table))
