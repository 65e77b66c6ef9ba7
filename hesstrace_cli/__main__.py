"""`python -m hesstrace_cli`, and the program `hesstrace`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def main() -> None:
    """Load the command line and run it; a signal while it loads is one line too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        from hesstrace_cli.cli import main as run
    except KeyboardInterrupt as stop:
        number = stop.args[0]
        try:
            os.write(2, b"error: stopped by signal %d\n" % number)
        finally:
            sys.exit(128 + number)
    run()


if __name__ == "__main__":
    main()
