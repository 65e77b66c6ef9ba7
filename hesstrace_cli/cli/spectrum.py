"""`hesstrace spectrum`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from hesstrace_cli.cli import screen
from hesstrace_cli.cli.options import with_options
from hesstrace_cli.cli.output import Tell, check_places, once_loaded, records_of, write_json
from hesstrace_cli.config import SpectrumConfig, resolve
from hesstrace_cli.reporting import plots, spectra, tables


@with_options(SpectrumConfig)
def spectrum(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", show_default=False)],
    *,
    flags: dict[str, Any],
    config: str | None,
) -> None:
    """Eigenvalues and density of the loss Hessian, stability of training there, and flatness.

    Several checkpoints are drawn on one scale.

    Example: hesstrace spectrum runs/*/last.pt --top 5 --slice 1 --plot spectrum.png
    """
    screen.refuse_processes("spectrum")
    settings = resolve(SpectrumConfig, flags, config)

    with screen.doing("loading"):
        check_places(settings.json, settings.plot, [*checkpoints, config])
    begun = once_loaded()

    def record_of(path: str, tell: Tell) -> tuple[Mapping[str, Any], list[str]]:
        from hesstrace_cli.analysis.spectrum import spectrum_of_checkpoint

        return spectrum_of_checkpoint(path, settings, lambda data: begun(data, tell))

    records, code = records_of(checkpoints, record_of)
    if records:
        several = {"schema": "hesstrace/spectra/1", "spectra": records}
        if not write_json(several if len(checkpoints) > 1 else records[0], settings.json):
            for record in records:
                _show(record)
        if settings.plot is not None:
            plots.save(spectra.plot_spectra(records), settings.plot)
    if code:
        raise typer.Exit(code)


def _show(record: Mapping[str, Any]) -> None:
    screen.show(tables.spectrum_table(record))
    if record["stability"] is None:
        screen.say("no learning rate of SGD to judge: give --lr and --momentum")
    else:
        screen.say(record["stability"]["sentence"])
