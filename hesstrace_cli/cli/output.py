"""Where a command's record goes: JSON to a file or stdout, a plot to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hesstrace_cli.cli import screen
from hesstrace_cli.reporting import plots


def check_places(json_file: str | None, plot: str | None = None) -> None:
    """Refuse places that cannot be written, before the work is done.

    Raises:
        ConfigError: If there is one, or the plot has no format that can be drawn.
    """
    from hesstrace_cli.checkpoints import check_writable

    check_writable(json_file)
    check_writable(plot)
    plots.check_format(plot)


def write_json(content: dict[str, Any], place: str | None) -> bool:
    """Write it, and say whether it took stdout, so that no table may follow."""
    from hesstrace_cli.checkpoints import write_atomically

    text = json.dumps(content, indent=2, allow_nan=False)
    if place == "-":
        screen.echo(text)
    elif place is not None:
        write_atomically(Path(place), text + "\n")
    return place == "-"
