"""SIGINT and SIGTERM: one line and the contract's exit code, wherever they come."""

from __future__ import annotations

import signal
import time
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_came: list[int] = []  # a library may swallow what a handler raises, or make another error of it


class Interrupted(KeyboardInterrupt):
    """A signal came where nothing is to be saved.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def number_of(stop: KeyboardInterrupt) -> int:
    """The signal that it stands for."""
    return stop.number if isinstance(stop, Interrupted) else int(signal.SIGINT)


def came() -> int | None:
    """The first signal that came since `listen`, if any did."""
    return _came[0] if _came else None


def listen() -> None:
    """Raise `Interrupted` for either from now on, but where the parent had it ignored."""
    _came.clear()
    for number in _NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _came.append(number)
    raise Interrupted(number)


class StopRequest:
    """Remembers SIGINT or SIGTERM, so that the run can save before it stops.

    A second one kills, unless it comes within a second: then it is the first one on another way,
    as launchers pass on what their whole group has got already.
    """

    def __init__(self) -> None:
        self.number = came()
        self._since = 0.0

    def __call__(self) -> int | None:
        """The signal that came, or None."""
        return self.number

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > 1:
            _interrupt(number, frame)

    def __enter__(self) -> StopRequest:
        """Take over the two signals."""
        self._before = {n: signal.signal(n, self._remember) for n in _NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
