"""`hesstrace verify`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

import typer

from hesstrace_cli.cli import screen
from hesstrace_cli.cli.options import with_options
from hesstrace_cli.cli.output import check_places, write_json
from hesstrace_cli.config import VerifyConfig, resolve
from hesstrace_cli.reporting import tables


@with_options(VerifyConfig)
def verify(*, flags: dict[str, Any], config: str | None) -> None:
    """Check the derivatives of a model against finite differences of itself, in float64.

    Exits with 0 where every one is right, those made right by another form included, else with 5.

    Example: hesstrace verify --model mymodel.py:build
    """
    screen.refuse_processes("verify")
    settings = resolve(VerifyConfig, flags, config)

    check_places(settings.json, None, [config, settings.model, settings.dataset])
    # A model's own prints are no results.
    with (
        screen.doing(f"checking the derivatives of {settings.model}"),
        redirect_stdout(sys.stderr),
    ):
        from hesstrace_cli.analysis.verify import verify as run
        from hesstrace_cli.training.cost import penalty_costs

        record = run(settings)
        if record["right"]:
            record["rows"] += [row.as_record() for row in penalty_costs(settings)]
    if record["task_note"] is not None:
        screen.say(record["task_note"])
    if not write_json(record, settings.json):
        rows = record["rows"]
        screen.show(tables.verdict_table(settings.model, record))
        bad = [row for row in rows if row["verdict"] in ("wrong", "refused", "unsettled")]
        screen.say(
            "every derivative is right" if record["right"]
            else f"not proved right: {len(bad)} of {len(rows)} rows, the first: {bad[0]['check']}"
        )  # fmt: skip
    if not record["right"]:
        raise typer.Exit(5)
