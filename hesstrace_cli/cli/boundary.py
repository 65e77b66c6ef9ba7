"""Where errors become one line on stderr and an exit code; a bug keeps its traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from hesstrace_cli.errors import HesstraceError

# Typer brings its own copy of Click in recent versions, so the class is found, not imported.
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class ErrorBoundary(TyperGroup):
    """The command group: its `main` is what the shell and the in-process runner both call."""

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
            message = " ".join(problem.format_message().split())
            code = _report(message or "a command is missing; see --help", 2)
        except (typer.Abort, KeyboardInterrupt):
            code = _report("interrupted", 130)
        except OSError as problem:  # a full disk behind stdout
            if problem.errno not in (errno.ENOSPC, errno.EIO):
                raise
            code = _report(f"the output cannot be written: {problem.strerror}", 2)
        except Exception as problem:
            if not _is_out_of_memory(problem):
                raise
            code = _report(
                f"out of memory ({' '.join(str(problem).split())[:160]}); lower --batch-size, or "
                "--keep-prob of a trace penalty",
                2,
            )
        parallel = sys.modules.get("hesstrace_cli.parallel")
        if parallel is not None and not code:
            parallel.leave()
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _is_out_of_memory(problem: Exception) -> bool:
    torch = sys.modules.get("torch")
    return (
        isinstance(problem, MemoryError)
        or (torch is not None and isinstance(problem, torch.OutOfMemoryError))
        or "DefaultCPUAllocator" in str(problem)  # a plain RuntimeError, on the CPU
    )


def _report(message: str, code: int) -> int:
    from hesstrace_cli.cli.screen import complain

    complain(f"error: {message}")
    return code
