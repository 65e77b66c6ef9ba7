"""What a model was called with last, for a trial of its derivatives before the first step."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from hesstrace_cli.autodiff.arguments import Arguments


class InputsWatch:
    """Keeps a model's last arguments until it is stopped.

    Copies of the model, and files of it, get a hook that does nothing.

    Args:
        model: Gets a hook.
    """

    def __init__(self, model: nn.Module) -> None:
        self._last: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook."""
        self._last = args, kwargs

    def inputs(self, num_examples: int) -> Tensor | None:
        """Of the last call; None before the first.

        Args:
            num_examples: N, of that call.

        Raises:
            DataError: If the call had no tensor of N rows.
        """
        if self._last is None:
            return None
        args, kwargs = self._last
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return args[0]
        return cast(Tensor, Arguments(args, kwargs, num_examples))

    def stop(self) -> None:
        """Forget them, and take the hook off."""
        self._last = None
        self._handle.remove()

    def __deepcopy__(self, _memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _nothing_here, ()


def _nothing(*_arguments: Any) -> None:
    """A hook of a copy."""


def _nothing_here() -> Any:
    return _nothing
