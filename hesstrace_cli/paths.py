"""What stands at a path, with an answer for every text: also one that can be no file's name."""

from __future__ import annotations

import os
from pathlib import Path

from hesstrace_cli.errors import ConfigError


def is_file(path: str | Path) -> bool:
    """Whether it is a regular file, or a link to one."""
    return os.path.isfile(path)  # noqa: PTH113 - Path's own raises where a name is too long


def is_folder(path: str | Path) -> bool:
    """Whether it is a folder, or a link to one."""
    return os.path.isdir(path)  # noqa: PTH112


def is_there(path: str | Path) -> bool:
    """Whether anything has the name, a link that leads nowhere too."""
    return os.path.lexists(path)


def resolved(path: str | Path) -> Path:
    """The path from the root on, links followed as far as they lead.

    Raises:
        ConfigError: If it begins at the current folder, and that has been deleted.
    """
    try:
        return Path(os.path.realpath(path))
    except FileNotFoundError as problem:
        raise ConfigError(
            f"{str(path)!r} is in the current folder, which has been deleted; go to another one"
        ) from problem
