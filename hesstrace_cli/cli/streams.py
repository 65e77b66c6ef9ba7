"""Standard streams that may be closed, full, or read by nobody."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, cast


class Forgiving:
    """A stream for messages: those that cannot be written are dropped, and the work goes on.

    Args:
        stream: Where they go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or do not."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do not."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's."""
        return getattr(self._stream, name)


def secure() -> None:
    """Make the process's streams safe to use, closed ones too.

    A closed descriptor is filled: the next file that is opened would get its number, and what a
    library writes to "stderr" would go into it. A closed stdout stays None, as Python has it.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?"
    nowhere = Path(os.devnull)
    stderr = sys.stderr if sys.stderr is not None else nowhere.open("w")
    sys.stderr = cast(TextIO, Forgiving(stderr))


def silence_stdout() -> None:
    """Send what its buffer still holds nowhere, after it could not be written."""
    with suppress(OSError, ValueError, AttributeError):
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, sys.stdout.fileno())
        os.close(handle)


def finish() -> None:
    """Write what code of the user's has left in the buffer, or drop it: it is no result."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        silence_stdout()
