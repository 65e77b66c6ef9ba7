"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hesstrace_cli.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """Held from its making until `release`, or the end of the process, however it ends.

    Args:
        folder: It must exist; nothing is written into it.

    Raises:
        ConfigError: If another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._handle: int | None = None
        if fcntl is None:
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            os.close(handle)
            raise ConfigError(f"{str(folder)!r} is in use by another process") from problem
        except OSError:  # a file system without locks
            os.close(handle)
            return
        self._handle = handle

    def release(self) -> None:
        """Let others in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.release()
