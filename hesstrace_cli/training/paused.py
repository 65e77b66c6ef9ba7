"""A run trained to an epoch and left there, to be gone on with to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hesstrace_cli.errors import Stopped
from hesstrace_cli.training.run import Run
from hesstrace_cli.training.trainer import Progress

_PAUSE = -1  # no signal has this number


def advance_until(
    run: Run, epoch: int | None, should_stop: Callable[[], int | None] = lambda: None
) -> Iterator[Progress]:
    """Train a run, new or begun, until so many epochs are done; at its last one finish it.

    Args:
        run: Its schedules are those of the whole run, wherever it is left.
        epoch: Where to leave it; None for its end.
        should_stop: As that of `Run.advance`.

    Yields:
        As `Run.advance`.

    Raises:
        NumericsError: If a loss or gradient is not finite.
        Stopped: After saving, if `should_stop` said so.
    """
    if epoch is None or epoch >= run.config.epochs:
        yield from run.advance(should_stop)
        run.finish()
        return
    if run.trainer.epoch >= epoch:
        run.close()
        return

    def pause() -> int | None:
        return should_stop() or (_PAUSE if run.trainer.epoch >= epoch else None)

    try:
        yield from run.advance(pause)
    except Stopped as stop:
        if stop.exit_code != 128 + _PAUSE:
            raise
