"""The one family of errors a user can meet; each class carries its exit code."""


class HesstraceError(Exception):
    """A problem the user can mend: one line that says what, and what to do."""

    exit_code = 1


class ConfigError(HesstraceError):
    """A flag or a config key is wrong, or two of them contradict each other."""

    exit_code = 2


class LostProcess(HesstraceError):
    """Another process of a job that `torchrun` started is gone."""

    exit_code = 2


class DataError(HesstraceError):
    """The data set is missing, empty, or holds values that no loss can be taken of."""

    exit_code = 3


class ModelError(HesstraceError):
    """A checkpoint or a model is missing, damaged, or does not fit."""

    exit_code = 4


class DerivativeError(ModelError):
    """A module has no derivative of the order that the curvature needs."""


class NumericsError(HesstraceError):
    """A loss, a derivative or a trace came out as infinite or not a number."""

    exit_code = 5


class Stopped(HesstraceError):
    """The run was stopped by a signal, after its state was saved.

    Args:
        message: What was saved and how to go on.
        signal_number: The signal; the exit code is 128 plus it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
