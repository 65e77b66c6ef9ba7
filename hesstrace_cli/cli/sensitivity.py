"""`hesstrace sensitivity`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hesstrace_cli.cli import screen
from hesstrace_cli.cli.options import with_options
from hesstrace_cli.cli.output import Tell, check_places, once_loaded, records_of, write_json
from hesstrace_cli.config import SensitivityConfig, resolve
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.reporting import bits, plots
from hesstrace_cli.storage.files import write_atomically

_DEFINITION = (
    "rise: of the mean {loss} over {n} examples ({split}), mean trace x ||Q(w) - w||^2 / 2, ± its "
    "standard deviation by the trace's error, the slope and the second order; a scale for each "
    "{per}"
)


@with_options(SensitivityConfig)
def sensitivity(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", show_default=False)],
    *,
    flags: dict[str, Any],
    config: str | None,
) -> None:
    """What rounding each weight to few bits costs, and the best bits under a budget.

    Example: hesstrace sensitivity runs/digits/best.pt --average-bits 4 --check
    """
    screen.refuse_processes("sensitivity")
    settings = resolve(SensitivityConfig, flags, config)

    if settings.export is not None and len(checkpoints) > 1:
        raise ConfigError("--export writes one allocation; give one checkpoint")
    with screen.doing("loading"):
        read = [*checkpoints, config]
        check_places(settings.json, settings.plot, read, csv=settings.csv, export=settings.export)
    begun = once_loaded()

    def record_of(path: str, tell: Tell) -> tuple[Mapping[str, Any], list[str]]:
        from hesstrace_cli.analysis.sensitivity import sensitivity_of_checkpoint

        return sensitivity_of_checkpoint(path, settings, lambda data: begun(data, tell), tell)

    records, code = records_of(checkpoints, record_of)
    if records:
        _report(records, settings, several=len(checkpoints) > 1)
    if code:
        raise typer.Exit(code)


def _report(
    records: list[Mapping[str, Any]], settings: SensitivityConfig, *, several: bool
) -> None:
    content = {"schema": "hesstrace/sensitivities/1", "sensitivities": records}
    if not write_json(content if several else records[0], settings.json):
        for record in records:
            _show(record)
    if settings.csv is not None:
        write_atomically(Path(settings.csv), bits.csv_text(records))
    if settings.export is not None:
        write_atomically(Path(settings.export), bits.exported(records[0], settings.export))
    if settings.plot is not None:
        plots.save(bits.plot_rises(records), settings.plot)


def _show(record: Mapping[str, Any]) -> None:
    screen.show(bits.weights_table(record))
    for sentence in bits.remarks(record):
        screen.say(sentence)
    if record["measured"] is not None:
        screen.show(bits.alone_table(record))
        screen.show(bits.measured_table(record))
        if record["measured"]["allocations"]:
            screen.show(bits.rules_table(record))
    screen.say(
        _DEFINITION.format(
            loss=record["loss_name"], n=record["num_examples"], split=record["split"],
            per=record["per"],
        )
    )  # fmt: skip
