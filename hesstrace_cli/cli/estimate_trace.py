"""`hesstrace estimate-trace`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hesstrace_cli.cli import screen
from hesstrace_cli.cli.options import with_options
from hesstrace_cli.cli.output import Tell, check_places, once_loaded, records_of, write_json
from hesstrace_cli.config import EstimateConfig, is_text, resolve
from hesstrace_cli.reporting import plots, tables

if TYPE_CHECKING:
    from hesstrace_cli.curvature.statistics import Mean

_DEFINITION = (
    "tr({matrix}) of the mean {loss} over {n} ({split}), all {p} trainable "
    "parameters, eval mode, no augmentation; inputs: {preprocessing}"
)


@with_options(EstimateConfig)
def estimate_trace(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", show_default=False)],
    *,
    flags: dict[str, Any],
    config: str | None,
) -> None:
    """Estimate the trace of the loss Hessian at saved checkpoints, with an error bar.

    Example: hesstrace estimate-trace runs/*/last.pt --rtol 0.02
    """
    settings = resolve(EstimateConfig, flags, config)

    with screen.doing("loading"):
        check_places(settings.json, settings.plot, [*checkpoints, config])
    passes, begun = _Passes(), once_loaded()

    def record_of(path: str, tell: Tell) -> tuple[Mapping[str, Any], list[str]]:
        from hesstrace_cli.analysis.estimation import estimate_checkpoint

        passes.begin(path, tell)
        return estimate_checkpoint(path, settings, passes, lambda data: begun(data, tell))

    records, code = records_of(checkpoints, record_of, passes.so_far)
    if records and not screen.is_second():
        _report(records, settings, several=len(checkpoints) > 1)
    if code:
        raise typer.Exit(code)


def _report(records: list[Mapping[str, Any]], settings: EstimateConfig, *, several: bool) -> None:
    content = {"schema": "hesstrace/traces/1", "traces": records} if several else records[0]
    if not write_json(content, settings.json):
        _show(records, settings)
    if settings.plot is not None:
        plots.save(plots.plot_traces(records), settings.plot)


class _Passes:
    """Tells the estimate of the checkpoint at work as its passes end, and remembers the last."""

    def __init__(self) -> None:
        self._known = ""

    def begin(self, path: str, tell: Tell) -> None:
        """Another checkpoint."""
        self._path, self._tell, self._known = path, tell, ""

    def __call__(self, passes: int, total: Mean) -> None:
        """A pass has ended."""
        error = "" if total.stderr is None else f" ± {total.stderr:.2g}"
        trace = f"trace {total.value:.4g}{error}"
        self._known = f"{trace} after {passes} {'pass' if passes == 1 else 'passes'}"
        self._tell(f"estimating, {self._known}:")
        if total.stderr != 0 and passes & (passes - 1) == 0:  # 1, 2, 4, ...: a log that stays short
            screen.say(f"{self._path}: pass {passes}, {trace}")

    def so_far(self) -> str | None:
        """What is known, after one pass at least."""
        return self._known or None


def _show(records: list[Mapping[str, Any]], settings: EstimateConfig) -> None:
    first = records[0]
    screen.show(tables.trace_table(records))
    if settings.per_layer:
        for record in records:
            screen.show(tables.layer_table(record))
    if settings.report:
        for record in records:
            screen.show(tables.report_table(record))
        screen.say(tables.READING)
    methods = [f"method {record['method']}: {record['reason']}" for record in records]
    if len(set(methods)) == 1:
        screen.say(methods[0])
    for record, method in zip(records, methods, strict=True):
        where = f"{record['checkpoint']}: " if len(records) > 1 else ""
        if len(set(methods)) > 1:
            screen.say(f"{where}{method}")
        note = tables.subset_note(record)
        if note is not None:
            screen.say(where + note)
        if record["collapsed"]:
            screen.say(
                f"warning: {where}the network has collapsed, or was not trained: "
                f"{record['collapsed']}. A small trace says nothing of it"
            )
    given = {key: value for key, value in first["preprocess"].items() if value is not None}
    inputs = ", ".join(f"{key} {value}" for key, value in given.items())
    if is_text(first["dataset"]):
        inputs = "windows of the text, each by itself"
    screen.say(
        _DEFINITION.format(
            matrix="H" if first["curvature"] == "hessian" else "G",
            loss=first["loss_name"],
            n=_examples(first),
            split=first["split"],
            p=first["num_parameters"],
            preprocessing=inputs,
        )
    )


def _examples(record: Mapping[str, Any]) -> str:
    """How many examples, and how many terms count of them where it is not one of each."""
    examples, terms = record["num_examples"], record["num_terms"]
    text = f"{examples} examples"
    return text if terms == examples else f"the {terms} terms that count of {text}"
