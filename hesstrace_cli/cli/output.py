"""Where a command's record goes: JSON to a file or stdout, a plot to a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from hesstrace_cli.cli import screen
from hesstrace_cli.errors import HesstraceError, LostProcess
from hesstrace_cli.reporting import plots


def check_places(json_file: str | None, plot: str | None = None) -> None:
    """Refuse places that cannot be written, before the work is done.

    Raises:
        ConfigError: If there is one, or the plot has no format that can be drawn.
    """
    from hesstrace_cli.files import check_writable

    check_writable(json_file)
    check_writable(plot)
    plots.check_format(plot)


Tell = Callable[[str], None]
"""Told what is done now: "estimating"."""


def records_of(
    paths: Sequence[str],
    record_of: Callable[[str, Tell], tuple[dict[str, Any], list[str]]],
    so_far: Callable[[], str | None] = lambda: None,
) -> tuple[list[dict[str, Any]], int]:
    """The record of every checkpoint; of several, one that fails does not hide the others.

    Args:
        paths: The checkpoints.
        record_of: Gives the record and warnings.
        so_far: What is known of the checkpoint at work, to be said where Ctrl-C stops it.

    Returns:
        The records, and the exit code of the first failure, or 0; 130 where Ctrl-C came.
    """
    records: list[dict[str, Any]] = []
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
        except KeyboardInterrupt:
            known = so_far()
            screen.complain(f"error: interrupted at {place}; {known or 'nothing is known of it'}")
            return records, 130
        for warning in warnings:
            screen.say(f"warning: {path}: {warning}")
        records.append(record)
    return records, code


def _of(place: str, now: Tell) -> Tell:
    def tell(what: str) -> None:
        now(f"{what} {place}")

    return tell


def write_json(content: dict[str, Any], place: str | None) -> bool:
    """Write it, and say whether it took stdout, so that no table may follow."""
    from hesstrace_cli.files import write_atomically

    text = json.dumps(content, indent=2, allow_nan=False)
    if place == "-":
        screen.echo(text)
    elif place is not None:
        write_atomically(Path(place), text + "\n")
    return place == "-"
