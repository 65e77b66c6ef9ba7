"""Files written whole or not at all, and never over what was read."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from hesstrace_cli.errors import ConfigError
from hesstrace_cli.failures import is_of_the_machine
from hesstrace_cli.paths import is_file, is_there, resolved

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

Content = bytes | str | Callable[[BinaryIO], object]
"""Bytes, a text, or what writes itself into an open file."""

_TEMPORARY = re.compile(r"\.hesstrace-[0-9a-f]{16}\.tmp")


def write_atomically(path: Path, content: Content) -> None:
    """Write to a temporary file in the same folder and rename, so that `path` is never half there.

    A link is followed, and a file that was there keeps its permissions.

    Args:
        path: The file.
        content: What to write.

    Raises:
        ConfigError: If the file cannot be written; what `path` held is still there.
    """
    try:
        path = path.resolve() if path.is_symlink() else path
        if path.exists() and not path.is_file():  # a pipe or a device: nothing to keep whole
            with path.open("wb") as file:
                _write(file, content)
            return
        with _replacing(path) as file:
            _write(file, content)
    except (OSError, RuntimeError, ValueError) as problem:  # RuntimeError: torch.save's
        if is_of_the_machine(problem):  # a tensor that could not be copied from the device
            raise
        reason = getattr(problem, "strerror", None) or problem
        raise ConfigError(f"{str(path)!r} cannot be written: {reason}") from problem


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end, and is gone after any failure.

    Nobody can know its name before, so that nothing stands there to be written through; it is
    locked while it is written, so that it is not taken for what a killed process left.
    """
    temporary = path.with_name(f".hesstrace-{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            _try_lock(handle)
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(handle)
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _try_lock(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _write(file: BinaryIO, content: Content) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def leftovers(folder: Path) -> list[Path]:
    """What killed processes left of their `write_atomically` in this folder."""
    return [file for file in folder.iterdir() if _TEMPORARY.fullmatch(file.name)]


def clear_leftovers(folder: Path) -> None:
    """Remove them, but what a living process is writing; for folders of our own alone."""
    for file in leftovers(folder):
        if file.is_symlink() or not file.is_file():
            continue
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                if _try_lock(handle):
                    file.unlink()
            finally:
                os.close(handle)


def check_writable(path: str | None) -> None:
    """Find out before the work whether its result can be written.

    Raises:
        ConfigError: If the file's folder is not there, or cannot be written to.
    """
    if path is None or path == "-":
        return
    parent = Path(path).parent
    try:
        Path(path).stat()
    except FileNotFoundError:
        pass
    except OSError as problem:  # a name that no file can have
        raise ConfigError(f"{path!r} cannot be written: {problem.strerror}") from problem
    if path and Path(path).is_dir():
        raise ConfigError(
            f"{path!r} cannot be written: it is a folder, expected the name of a file"
        )
    if not path or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{path!r} cannot be written; {str(parent)!r} must be a folder")


def check_apart(output: str | None, inputs: Iterable[str]) -> None:
    """Refuse to write over what is read, by whatever name, link or hard link.

    Args:
        output: The file to be written; None and "-" are none.
        inputs: Files, and folders with files, that the command reads; names of none are passed by.

    Raises:
        ConfigError: If `output` is one of them, or a file in one.
    """
    if output is None or output == "-" or not is_file(output):
        return
    written = resolved(output)
    for name in filter(is_there, inputs):
        read = resolved(name)
        inside = read.is_dir() and written.is_relative_to(read)
        if inside or (read.is_file() and read.samefile(written)):
            raise ConfigError(f"{output!r} is read by this command ({name}); write to another file")


def files_of(name: str) -> list[str]:
    """The files, and folders of files, that a name of a model, data set or checkpoint may mean."""
    if name.startswith("imagefolder:"):
        folder = Path(name.removeprefix("imagefolder:"))
        return [str(folder / part) for part in ("train", "val", "test")]
    for prefix in ("text:", "hf:"):
        if name.startswith(prefix):
            return [name.removeprefix(prefix)]
    where, _, factory = name.rpartition(":")
    return [where if factory.isidentifier() and where.endswith(".py") else name]
