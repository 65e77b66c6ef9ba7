"""`hesstrace train`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesstrace_cli import records
from hesstrace_cli.cli import screen
from hesstrace_cli.cli.options import with_options
from hesstrace_cli.cli.signals import StopRequest, number_of
from hesstrace_cli.config import (
    REGULARIZERS,
    TrainConfig,
    is_text,
    resolve,
)
from hesstrace_cli.errors import Stopped
from hesstrace_cli.paths import is_file
from hesstrace_cli.reporting import tables
from hesstrace_cli.storage.records import selected

if TYPE_CHECKING:
    from hesstrace_cli.training.run import Run

_MANY_SKIPPED = 1  # the first steps look for the scale


@with_options(TrainConfig)
def train(*, flags: dict[str, Any], config: str | None) -> None:
    """Train a network, with a penalty on the trace of the loss Hessian or without.

    Example: hesstrace train --reg trace --lambda 0.01
    """
    settings = resolve(TrainConfig, flags, _stored(flags) if config is None else config)
    row = settings.row()
    warn_of_unused(settings.effective(), row.strengths)

    with screen.doing(f"loading {settings.dataset} and {settings.model}"):
        from hesstrace_cli.training.run import Run

        run = Run(settings)
    if run.trainer.data.task_note is not None:
        screen.say(run.trainer.data.task_note)
    if run.finished:
        screen.say(f"{run.folder.path} is finished; nothing to do")
        summary = run.ranks.from_first(run.folder.summary())
    else:
        say_cost_without_cudnn(run)
        summary = train_with_progress(run, row.name)
    assert summary is not None
    screen.show(tables.summary_table(str(run.folder.path), summary), kept=True)


def warn_of_unused(settings: TrainConfig, names: Collection[str]) -> None:
    """Name the settings that were changed, by flag or YAML, and have no effect.

    Args:
        settings: The command's.
        names: The regularizers used, in any row.
    """
    default = TrainConfig()

    def changed(*names: str) -> list[str]:
        return [n for n in names if getattr(settings, n) != getattr(default, n)]

    taken = {s for name in names if name in REGULARIZERS for s in REGULARIZERS[name].settings}
    reasons = []
    for name, declared in REGULARIZERS.items():
        reasons.append((changed(*(s for s in declared.settings if s not in taken)),
                        f"--reg has no {name}"))  # fmt: skip
        taken |= set(declared.settings)  # once, where several have them
    if {"trace", "trace-held"} & set(names) and settings.estimator == "hutchinson":
        reasons.append((changed("dropout_scheme", "keep_prob"), "--estimator is hutchinson"))
    if settings.optimizer == "adamw":
        reasons.append((changed("momentum"), "--optimizer is adamw"))
    if all(map(is_text, settings.dataset.split(","))) and settings.val_fraction:
        reasons.append((changed("val_fraction"), "a text has a file for the validation"))
    for own, reason in reasons:
        if own:
            flags = ", ".join("--" + name.replace("_", "-") for name in own)
            screen.say(f"warning: {flags} is without effect, as {reason}")


def say_cost_without_cudnn(run: Run) -> None:
    """Say what a recurrent model's penalty costs on a GPU, where it costs something."""
    from hesstrace_cli.training.cost import cost_without_cudnn

    said = None if run.trainer.is_sharded else cost_without_cudnn(run.trainer)
    if said is not None:
        screen.say(said)


def _stored(flags: dict[str, Any]) -> str | None:
    """The run's own config, where no setting but its length is given with --resume."""
    if not (flags.get("resume") or flags.get("resume_or_start")):
        return None

    from hesstrace_cli.storage.resume import PLACE
    from hesstrace_cli.storage.runs import RunFolder, default_folder

    if set(flags) - {*PLACE, "epochs"}:
        return None
    out = flags.get("out")
    folder = RunFolder(default_folder(TrainConfig()) if out is None else Path(out))
    return str(folder.settings) if is_file(folder.settings) else None


def train_with_progress(run: Run, label: str) -> records.Run:
    """Train to the end and show where it is: a line an epoch, on a terminal above a bar."""
    epochs, metric = run.config.epochs, run.trainer.data.task.selection.metric
    with StopRequest() as stop, screen.progress_bar(run.trainer.total_steps) as move:
        for progress in run.advance(stop):
            if move is not None:
                move(f"epoch {progress.epoch}/{epochs} {label}", run.trainer.step)
            if progress.record is not None:
                line = _epoch_line(progress.record, epochs, metric)
                screen.say(f"{label}: {line}" if move is None else line)
                report_negative(progress.record)
                report_skipped(progress.record)
    try:
        with screen.doing("evaluating, and estimating the trace"):
            return run.finish()
    except KeyboardInterrupt as stop:
        number = number_of(stop)
        raise Stopped(
            f"stopped by signal {number} after the last step; the weights are saved, the summary "
            f"is not: --resume --out {run.folder.path}",
            number,
        ) from stop


def _epoch_line(record: records.Epoch, epochs: int, metric: str) -> str:
    line = f"epoch {record['epoch']}/{epochs} loss {record['train_loss']:.4f}"
    value = selected(record, "val", metric)
    if value is not None:
        line += f" val {metric.replace('_', ' ')} {value:.4f}"
    if record["penalty_trace"] is not None:
        line += f" penalised trace {record['penalty_trace']:.4g}"
    return line


def report_skipped(record: records.Epoch) -> None:
    """Say so where float16's gradients overflowed in so many steps that it shows."""
    skipped = record.get("skipped_steps", 0)
    if skipped > _MANY_SKIPPED or (skipped and record["epoch"] > 1):
        screen.say(
            f"warning: {skipped} steps of epoch {record['epoch']} were left out, as their float16 "
            "gradients overflowed; --precision bf16 has a larger range"
        )


def report_negative(record: records.Epoch) -> None:
    """Say so where the penalty has driven the trace below 0."""
    trace = record["penalty_trace"]
    if trace is not None and trace < 0:
        screen.say(
            f"warning: the penalised trace is negative in epoch {record['epoch']} ({trace:.4g}): "
            "the penalty pushes it further down. --curvature ggn cannot go below 0"
        )
