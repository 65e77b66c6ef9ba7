"""`python -m hesstrace_cli`, and the program `hesstrace`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def main() -> None:
    """Load the command line and run it; a signal before its errors are told is one line too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        from hesstrace_cli.cli import main as run

        run()
    except KeyboardInterrupt as stop:
        came: int = stop.args[0] if stop.args else signal.SIGINT
        try:
            os.write(2, b"error: stopped by signal %d\n" % came)
        finally:
            sys.exit(128 + came)


if __name__ == "__main__":
    main()
