"""Where a command's record goes: JSON to a file or stdout, a plot to a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from hesstrace_cli.cli import screen
from hesstrace_cli.errors import HesstraceError
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


def records_of(
    paths: Sequence[str], record_of: Callable[[str], tuple[dict[str, Any], list[str]]]
) -> tuple[list[dict[str, Any]], int]:
    """The record of every checkpoint; of several, one that fails does not hide the others.

    Args:
        paths: The checkpoints.
        record_of: Gives the record and warnings.

    Returns:
        The records, and the exit code of the first failure, or 0.
    """
    records, code = [], 0
    for path in paths:
        try:
            with redirect_stdout(sys.stderr):  # a model's own prints are no results
                record, warnings = record_of(path)
        except HesstraceError as problem:
            if len(paths) == 1:
                raise
            screen.complain(f"error: {path}: {problem}")
            code = code or problem.exit_code
            continue
        for warning in warnings:
            screen.say(f"warning: {path}: {warning}")
        records.append(record)
    return records, code


def write_json(content: dict[str, Any], place: str | None) -> bool:
    """Write it, and say whether it took stdout, so that no table may follow."""
    from hesstrace_cli.files import write_atomically

    text = json.dumps(content, indent=2, allow_nan=False)
    if place == "-":
        screen.echo(text)
    elif place is not None:
        write_atomically(Path(place), text + "\n")
    return place == "-"
