"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path

from hesstrace_cli.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A forked process, as a data loader's worker is, would hold the lock when its parent is dead.

    Closing its own handle leaves the parent's lock as it is.
    """
    for lock in list(_held):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


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
        _held.add(self)

    def release(self) -> None:
        """Let others in, at once: a process forked just now may not have closed its handle yet."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_UN)
            self.close()

    def close(self) -> None:
        """Close this process's handle; who else has one still holds the lock."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.release()
