"""Errors of the library name arguments, those of the command line flags."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager

from hesstrace_cli.config import EstimateConfig, SpectrumConfig, TrainConfig, key_of
from hesstrace_cli.errors import HesstraceError

_CHOICES = {
    key_of(item.name): item.metadata["choices"]
    for config in (EstimateConfig, SpectrumConfig, TrainConfig)
    for item in dataclasses.fields(config)
    if item.metadata["choices"]
}
_FLAG = re.compile(r"--([a-z][a-z-]*[a-z])(?: ([\w+-]+))?")


def as_arguments(message: str) -> str:
    """`--keep-prob is 2` as `keep_prob is 2`, `--form example` as `form="example"`.

    Args:
        message: Of an error.
    """

    def renamed(flag: re.Match[str]) -> str:
        name, following = flag[1].replace("-", "_"), flag[2]
        if following is None:
            return name
        is_value = following in _CHOICES.get(flag[1], ())
        return f'{name}="{following}"' if is_value else f"{name} {following}"

    return _FLAG.sub(renamed, message)


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Errors of what is inside name arguments.

    Raises:
        HesstraceError: Of the class that it is of.
    """
    try:
        yield
    except HesstraceError as problem:
        said = as_arguments(str(problem))
        if said == str(problem):
            raise
        raise type(problem)(said) from problem
