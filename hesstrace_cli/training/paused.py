"""A run trained to an epoch and left there, for its loss and to be gone on with to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

from hesstrace_cli.analysis.evaluation import block_losses
from hesstrace_cli.data import Split
from hesstrace_cli.errors import NumericsError, Stopped
from hesstrace_cli.storage.files import write_atomically
from hesstrace_cli.training.run import Run
from hesstrace_cli.training.trainer import Progress

_PAUSE = -1  # no signal has this number


def advance_until(
    run: Run, epoch: int | None, should_stop: Callable[[], int | None] = lambda: None
) -> Iterator[Progress]:
    """Train a run, new or begun, until so many epochs are done; at its last one finish it.

    Args:
        run: Its schedules are those of the whole run, wherever it is left.
        epoch: Where to leave it, its losses on the validation split written beside it; None for
            its end and the summary.
        should_stop: As that of `Run.advance`.

    Yields:
        As `Run.advance`.

    Raises:
        NumericsError: If a loss or gradient is not finite.
        Stopped: After saving, if `should_stop` said so.
    """
    if epoch is None:
        yield from run.advance(should_stop)
        run.finish()
        return
    if run.trainer.epoch < epoch:
        yield from _advance_to(run, epoch, should_stop)
    if run.trainer.data.val is not None:
        _write_validation(run, run.trainer.data.val)
    run.close()


def _write_validation(run: Run, split: Split) -> None:
    losses, terms = block_losses(run.trainer.judged, split)
    if not all(map(math.isfinite, losses)):
        raise NumericsError(
            f"the loss on the validation split is not finite after epoch {run.trainer.epoch}"
        )
    content = json.dumps({"losses": losses, "terms": terms})
    write_atomically(run.folder.validation, content + "\n")


def _advance_to(run: Run, epoch: int, should_stop: Callable[[], int | None]) -> Iterator[Progress]:
    def pause() -> int | None:
        return should_stop() or (_PAUSE if run.trainer.epoch >= epoch else None)

    try:
        yield from run.advance(pause)
    except Stopped as stop:
        if stop.exit_code != 128 + _PAUSE:
            raise
