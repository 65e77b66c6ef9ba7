"""`hesstrace spectrum`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hesstrace_cli.cli import screen
from hesstrace_cli.cli.options import with_options
from hesstrace_cli.config import SpectrumConfig, resolve
from hesstrace_cli.reporting import plots, tables


@with_options(SpectrumConfig)
def spectrum(
    checkpoint: Annotated[str, typer.Argument(show_default=False)],
    *,
    flags: dict[str, Any],
    config: str | None,
) -> None:
    """Eigenvalues and spectral density of the loss Hessian, and the stability of training there.

    Example: hesstrace spectrum runs/digits-small-cnn-none-seed0/last.pt --top 5
    """
    settings = resolve(SpectrumConfig, flags, config)

    from hesstrace_cli.checkpoints import check_writable, write_atomically
    from hesstrace_cli.spectrum import spectrum_of_checkpoint

    check_writable(settings.json)
    check_writable(settings.plot)
    plots.check_format(settings.plot)
    record, warnings = spectrum_of_checkpoint(checkpoint, settings)
    for warning in warnings:
        screen.say(f"warning: {warning}")
    text = json.dumps(record, indent=2, allow_nan=False)
    if settings.plot is not None:
        plots.save(plots.plot_density(record), settings.plot)
    if settings.json == "-":
        typer.echo(text)
        return
    if settings.json is not None:
        write_atomically(Path(settings.json), text + "\n")
    matrix = "Hessian" if record["curvature"] == "hessian" else "Gauss-Newton matrix"
    title = f"{matrix} of {checkpoint}"
    rows = tables.spectrum_rows(record)
    screen.show(tables.rich_table(title, tables.SPECTRUM_HEAD, rows))
    if record["stability"] is None:
        screen.say("no learning rate of SGD to judge: give --lr and --momentum")
    else:
        screen.say(record["stability"]["sentence"])
