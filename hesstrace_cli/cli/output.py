"""Where a command's record goes: JSON to a file or stdout, a plot to a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesstrace_cli.cli import screen
from hesstrace_cli.cli.signals import number_of
from hesstrace_cli.errors import ConfigError, HesstraceError, LostProcess
from hesstrace_cli.paths import resolved
from hesstrace_cli.reporting import plots
from hesstrace_cli.storage.files import check_apart, check_writable, files_of, write_atomically

if TYPE_CHECKING:
    from hesstrace_cli.data import DataSet


def check_places(
    json_file: str | None, plot: str | None, inputs: Iterable[str | None], **others: str | None
) -> None:
    """Refuse before the work places that cannot be written, or hold what must not be lost.

    Args:
        json_file: Where the record goes; "-" is stdout.
        plot: Where the plot goes.
        inputs: The files that the command reads, and what it names as its model and data.
        others: Where else it writes, by the flag's name.

    Raises:
        ConfigError: If there is one, or the plot has no format that can be drawn.
    """
    from hesstrace_cli.storage.runs import RunFolder

    read = [file for name in inputs if name is not None for file in files_of(name)]
    places = {"json": json_file, "plot": plot, **others}
    for flag, place in places.items():
        if place == "-" and flag != "json":
            raise ConfigError(f"--{flag} is '-', expected a file; --json alone writes to stdout")
        check_writable(place)
        check_apart(place, read)
        target = None if place is None or place == "-" else resolved(place)
        if target is not None and RunFolder(target.parent).owns(target):
            raise ConfigError(f"{place!r} belongs to the run in its folder; write to another file")
    taken: dict[Path, str] = {}
    for flag, place in places.items():
        if place is not None and place != "-":
            first = taken.setdefault(resolved(place), flag)
            if first != flag:
                raise ConfigError(f"--{first} and --{flag} both are {place!r}")
    plots.check_format(plot)


Tell = Callable[[str], None]
"""Told what is done now: "estimating"."""


def records_of(
    paths: Sequence[str],
    record_of: Callable[[str, Tell], tuple[Mapping[str, Any], list[str]]],
    so_far: Callable[[], str | None] = lambda: None,
) -> tuple[list[Mapping[str, Any]], int]:
    """The record of every checkpoint; of several, one that fails does not hide the others.

    Args:
        paths: The checkpoints.
        record_of: Gives the record and warnings.
        so_far: What is known of the checkpoint at work, to be said where Ctrl-C stops it.

    Returns:
        The records, and the exit code of the first failure, or 0; the signal's where one came.
    """
    records: list[Mapping[str, Any]] = []
    code = 0
    for number, path in enumerate(paths, start=1):
        place = f"{path} ({number} of {len(paths)})" if len(paths) > 1 else path
        try:
            # A model's own prints are no results.
            with screen.doing(f"loading {place}") as now, redirect_stdout(sys.stderr):
                record, warnings = record_of(path, _of(place, now))
        except LostProcess:
            raise
        except HesstraceError as problem:
            if len(paths) == 1:
                raise
            screen.complain(f"error: {path}: {problem}")
            code = code or problem.exit_code
            continue
        except KeyboardInterrupt as stop:
            known = so_far()
            screen.complain(f"error: interrupted at {place}; {known or 'nothing is known of it'}")
            return records, 128 + number_of(stop)
        for warning in warnings:
            screen.say(f"warning: {path}: {warning}")
        records.append(record)
    return records, code


def once_loaded() -> Callable[[DataSet, Tell], None]:
    """Called when a checkpoint's data is read: says what task was taken, and what is done now."""
    said: set[str] = set()

    def begun(data: DataSet, tell: Tell) -> None:
        say_once(data.task_note, said)
        tell("estimating")

    return begun


def say_once(note: str | None, said: set[str]) -> None:
    """Say it where there is something to say that has not been said."""
    if note is not None and note not in said:
        said.add(note)
        screen.say(note)


def _of(place: str, now: Tell) -> Tell:
    def tell(what: str) -> None:
        now(f"{what} {place}")

    return tell


def write_json(content: Mapping[str, Any], place: str | None) -> bool:
    """Write it, and say whether it took stdout, so that no table may follow."""
    text = json.dumps(content, indent=2, allow_nan=False)
    if place == "-":
        screen.echo(text)
    elif place is not None:
        write_atomically(Path(place), text + "\n")
    return place == "-"
