"""The command line: a thin shell; nothing here imports torch before a command runs."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from hesstrace_cli import __version__
from hesstrace_cli.cli import screen, signals, streams
from hesstrace_cli.cli.boundary import ErrorBoundary
from hesstrace_cli.cli.compare import compare
from hesstrace_cli.cli.estimate_trace import estimate_trace
from hesstrace_cli.cli.sensitivity import sensitivity
from hesstrace_cli.cli.spectrum import spectrum
from hesstrace_cli.cli.train import train
from hesstrace_cli.cli.tune import train_until, tune
from hesstrace_cli.cli.verify import verify

app = typer.Typer(
    cls=ErrorBoundary,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        screen.echo(f"hesstrace {__version__}")
        raise typer.Exit


@app.callback()
def hesstrace(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train with a penalty on the trace of the loss Hessian, estimate it, compare regularizers."""


app.command()(train)
app.command("estimate-trace")(estimate_trace)
app.command()(compare)
app.command()(spectrum)
app.command()(verify)
app.command()(sensitivity)
app.command()(tune)
app.command(hidden=True)(train_until)


def main() -> None:
    """The entry point `hesstrace`."""
    signals.listen()
    streams.secure()
    warnings.showwarning = screen.warn
    sys.excepthook = screen.show_bug
    # PyTorch's own forward mode calls it.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    # Training takes deterministic algorithms where there are some.
    for words in (".* does not have a deterministic implementation", "Deterministic behavior was"):
        warnings.filterwarnings("ignore", words, UserWarning)
    try:
        typer.main.get_command(app)()  # app() would put Typer's own excepthook in the place of ours
    finally:
        streams.finish()
