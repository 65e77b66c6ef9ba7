"""The one signature that every regularizer has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from hesstrace_cli.curvature.objective import Objective


@dataclass(frozen=True)
class Step:
    """What a regularizer sees of one training step.

    Attributes:
        objective: The loss trained on as a function of the parameters, in training mode.
        X: The inputs, as the model saw them.
        targets: Class numbers (N,) or probabilities (N, C).
        logits: Of the ordinary forward pass, shape (N, C), with their graph.
        index: Number of the step in the run, from 0.
        progress: The share of the run that is done, in [0, 1).
        generator: Source of this regularizer's randomness in this step, on the device.
    """

    objective: Objective
    X: Tensor
    targets: Tensor
    logits: Tensor
    index: int
    progress: float
    generator: Generator


@dataclass(frozen=True)
class Term:
    """A term of the loss.

    Attributes:
        weight: Its strength at this step.
        value: What is weighted, 0-dim, with a graph to the parameters.
    """

    weight: float
    value: Tensor


class Regularizer:
    """Changes a step's batch, or adds a term to its loss; both hooks do nothing by default.

    Attributes:
        name: As on the command line.
        strength: The number behind `NAME=`; its unit is in `config.REGULARIZERS`.
        order: The highest derivative taken through the ordinary forward pass; 2 and more
            make it run inside `differentiable_ops(order=...)`.
    """

    name: str
    order: int = 1

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def transform(self, X: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """The batch to train on."""
        return X, targets

    def term(self, step: Step) -> Term | None:
        """The term that this step's loss gets; None for none."""
        return None
