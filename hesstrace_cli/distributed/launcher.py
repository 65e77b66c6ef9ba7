"""What `torchrun` says in the environment: this process's place among those of its job."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hesstrace_cli.config import whole_number
from hesstrace_cli.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """The place of a process in its job.

    Attributes:
        rank: Its number, from 0; the first writes and speaks.
        size: How many there are.
        local_rank: Its number on its machine, which is that of its GPU.
        local_size: How many there are on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place() -> Place:
    """The place of this process; without `WORLD_SIZE` it is alone.

    Without `LOCAL_RANK` and `LOCAL_WORLD_SIZE` all processes are taken to be on one machine.

    Raises:
        ConfigError: If the environment contradicts itself.
    """
    names = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}
    given = {
        n: _whole_number(n, os.environ[n], least) for n, least in names.items() if n in os.environ
    }
    if "WORLD_SIZE" not in given:
        return Place()
    size = given["WORLD_SIZE"]
    if size > 1 and "RANK" not in given:
        raise ConfigError(f"WORLD_SIZE is {size}, but there is no RANK; {_REMEDY}")
    rank, local_size = given.get("RANK", 0), given.get("LOCAL_WORLD_SIZE", size)
    local_rank = given.get("LOCAL_RANK", rank % local_size)
    for name, number, bound, limit in (
        ("RANK", rank, "WORLD_SIZE", size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size),
        ("LOCAL_WORLD_SIZE", local_size - 1, "WORLD_SIZE", size),
    ):
        if number >= limit:
            raise ConfigError(
                f"{name} is {given.get(name, number)}, too much for a {bound} of {limit}; {_REMEDY}"
            )
    return Place(rank, size, local_rank, local_size)


_REMEDY = "start several processes with torchrun, or unset what it sets"


def _whole_number(name: str, text: str, least: int) -> int:
    number = whole_number(text)
    if number is None or number < least:
        raise ConfigError(
            f"{name} is {text[:20]!r}, expected a whole number from {least}; {_REMEDY}"
        )
    return number
