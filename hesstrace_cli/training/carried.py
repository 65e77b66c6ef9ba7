"""The state that a recurrent model carries from one batch of a text to the next, detached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from hesstrace_cli.autodiff.arguments import Arguments
from hesstrace_cli.distributed.parallel import Ranks
from hesstrace_cli.errors import ModelError
from hesstrace_cli.models.language import Carrying
from hesstrace_cli.training.step import Examples


class Carried:
    """Gives each batch the state that the one before ended with, row by row.

    The loss of a step, and what penalties take of it, is then that of windows that begin with this
    state, a constant.

    Args:
        model: Carries a state.
        ranks: The processes of the job: each holds the state of all rows.

    Attributes:
        state: After the last step, shape (rows, ...); None at the beginning of the text.
    """

    def __init__(self, model: Carrying, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self.state: Tensor | None = None

    def given(self, examples: Sequence[Examples]) -> list[Examples]:
        """The parts of a batch, each example with the state that it begins with."""
        if self.state is None:
            self.state = self._model.zero_state(examples[0][2].num_examples)
        begin = self.state
        return [
            (cast(Tensor, Arguments((X,), {"state": begin[part.rows.to(begin.device)]}, len(X))),
             y, part)
            for X, y, part in examples
        ]  # fmt: skip

    def take(self, examples: Sequence[Examples], states: Sequence[Tensor]) -> None:
        """Keep the states that the parts ended with, those of all processes."""
        assert self.state is not None
        after = torch.zeros_like(self.state[: examples[0][2].num_examples])
        for (_, _, part), state in zip(examples, states, strict=True):
            if part.share:
                after[part.rows.to(after.device)] = state.detach().to(after.dtype)
        self._ranks.sum_([after])
        self.state = after

    def check(self, content: Mapping[str, Any], num_rows: int) -> None:
        """Make sure that a checkpoint made in the middle of an epoch has the state.

        Args:
            content: Of the checkpoint.
            num_rows: Of a batch.

        Raises:
            ModelError: If it has none, or one of another shape.
        """
        expected = tuple(self._model.zero_state(num_rows).shape)
        state = content.get("carried")
        if state is None or tuple(state.shape) != expected:
            given = "none" if state is None else f"one of shape {tuple(state.shape)}"
            raise ModelError(f"its carried state is {given}, expected one of shape {expected}")
