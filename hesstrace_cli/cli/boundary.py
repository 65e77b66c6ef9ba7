"""Where errors become one line on stderr and an exit code; a bug keeps its traceback."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from hesstrace_cli.cli import signals
from hesstrace_cli.cli.streams import silence_stdout
from hesstrace_cli.errors import HesstraceError, ModelError, Stopped
from hesstrace_cli.failures import is_lost_worker, is_out_of_memory
from hesstrace_cli.hints import did_you_mean

# Typer brings its own copy of Click in recent versions, so the class is found, not imported.
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


_LONGEST = 2000  # characters of a line that can still be read


class ErrorBoundary(TyperGroup):
    """The command group: its `main` is what the shell and the in-process runner both call."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Read the command's name and what comes before it.

        Raises:
            Stopped: After a signal.
        """
        with _stopping():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what would end the program from within it becomes an error.

        Raises:
            Stopped: After a signal.
            ModelError: If code of the user's called `sys.exit`.
        """
        try:
            with _stopping():
                return super().invoke(ctx)
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # nobody reads a help page to its end
                raise typer.Exit(1) from end
            raise ModelError(f"{_place_of(end)} called sys.exit({end.code!r})") from end

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and exit with the contract's code."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except HesstraceError as problem:
            code = _report(str(problem), problem.exit_code)
        except _ClickException as problem:
            message = _meant(problem) or " ".join(problem.format_message().split())
            code = _report(message or "a command is missing; see --help", 2)
        except typer.Abort:
            code = _report("interrupted", 130)
        except Exception as problem:
            code = _report(*_explained(problem))
        parallel = sys.modules.get("hesstrace_cli.distributed.parallel")
        if parallel is not None and not code:
            parallel.leave()
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _stopping() -> Iterator[None]:
    """Where a signal becomes an error; Typer would make an exit without a word of it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        number = signals.number_of(stop)
        raise Stopped(f"stopped by signal {number}", number) from stop


def _place_of(problem: BaseException) -> str:
    """The file and line that raised it."""
    frames = traceback.extract_tb(problem.__traceback__)
    frame = [f for f in frames if not f.filename.startswith("<")][-1]  # exit() itself has no file
    return f"{frame.filename}, line {frame.lineno}"


def _explained(problem: Exception) -> tuple[str, int]:
    """What the machine lacks, and the exit code.

    Raises:
        Exception: The problem itself, where it is a bug.
    """
    number = signals.came()
    if number is not None:  # what was interrupted made another error of it
        return f"stopped by signal {number}", 128 + number
    if is_out_of_memory(problem):
        reason = " ".join(str(problem).split())[:160]
        about = f" ({reason})" if reason else ""
        return f"out of memory{about}; lower --batch-size, or --keep-prob of a trace penalty", 2
    if is_lost_worker(problem):
        reason = " ".join(str(problem).split())[:160]
        return (
            f"a process that reads the data is gone ({reason}): its code ended it, or the machine, "
            "for memory; --num-workers 0 reads without such processes", 3
        )  # fmt: skip
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EIO):
        silence_stdout()
        return f"the output cannot be written: {problem.strerror}", 2  # a full disk behind stdout
    raise problem


def _meant(problem: Any) -> str | None:
    """What to say of an option that the command does not have; None of another mistake."""
    given, context = getattr(problem, "option_name", None), getattr(problem, "ctx", None)
    if given is None or context is None:
        return None
    options = [name for p in context.command.params for name in (*p.opts, *p.secondary_opts)]
    return f"no option is called {given}{did_you_mean(given, options)} See --help"


def _report(message: str, code: int) -> int:
    from hesstrace_cli.cli.screen import complain

    if len(message) > _LONGEST:
        message = message[: _LONGEST - 4] + " ..."
    complain(f"error: {message}")
    return code
