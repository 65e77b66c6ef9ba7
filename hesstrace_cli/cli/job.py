"""One run of `compare --jobs`: `python -m hesstrace_cli.cli.job ARGUMENTS`, tied to its parent.

The parent holds the other end of this process's standard input, and writes nothing. When it is
gone, however it ended, the run is told to save and stop.
"""

from __future__ import annotations

import os
import signal
import threading

from hesstrace_cli.cli import main


def _stop_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    main()
