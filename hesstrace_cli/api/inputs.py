"""What a model was called with last, for a trial of its derivatives before the first step."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hesstrace_cli.autodiff.arguments import Arguments

_SIZES = 4  # calls kept, of different numbers of examples


class InputsWatch:
    """Keeps the arguments of a model's last calls until it is stopped.

    Copies of the model, and files of it, get a hook that does nothing, unless what asks for the
    arguments is copied with it and calls `go_on`.

    Args:
        model: Gets a hook.
    """

    def __init__(self, model: nn.Module) -> None:
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._listens = True
        self._handle: RemovableHandle | None = model.register_forward_pre_hook(
            self, with_kwargs=True
        )

    def __call__(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook."""
        if not self._listens:
            return
        rows = next(
            (len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), 0
        )
        self._calls.pop(rows, None)
        self._calls[rows] = args, kwargs
        if len(self._calls) > _SIZES:
            del self._calls[next(iter(self._calls))]

    def inputs(self, num_examples: int) -> Tensor | None:
        """Of the last call with so many examples, or else of the last; None before the first.

        Args:
            num_examples: N.

        Raises:
            DataError: If the call had no tensor with a row for each example.
        """
        if not self._calls:
            return None
        rows = num_examples if num_examples in self._calls else [*self._calls][-1]
        args, kwargs = self._calls[rows]
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return args[0]
        return cast(Tensor, Arguments(args, kwargs, rows))

    def stop(self) -> None:
        """Forget them, and take the hook off."""
        self._listens = False
        self._calls.clear()
        if self._handle is not None:
            self._handle.remove()

    def go_on(self) -> None:
        """Listen to the model that this was copied with."""
        self._listens = True

    def __getstate__(self) -> dict[str, Any]:
        return {"_calls": {}, "_listens": False, "_handle": None}
