"""The one signature that every regularizer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from hesstrace_cli.autodiff.calls import native_outputs
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.distributed.parallel import Ranks
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.randomness import random_state_kept, set_random_state


@dataclass(frozen=True)
class Part:
    """Some examples of a batch: those of one process, or of one round of accumulation.

    Attributes:
        rows: Their positions in the whole batch.
        num_examples: Of the whole batch.
        share: The weight of their mean loss in that of the whole, their terms over its terms; 0
            where they only keep a process busy that has no examples of its own.
        num_terms: M, the terms of the whole batch.
        example_share: The weight of a mean over their examples in that over all of the batch's.
    """

    rows: Tensor
    num_examples: int
    share: float
    num_terms: int
    example_share: float

    @property
    def is_whole(self) -> bool:
        """Whether they are the batch."""
        return len(self.rows) == self.num_examples and self.share == 1


@dataclass(frozen=True)
class Setting:
    """What a regularizer sees before the first step.

    Attributes:
        objective: The loss to be trained on, its model in training mode.
        X: Some inputs, of the first batch and more.
        y: Their targets.
        num_tried: So many of these, the first, are enough for a trial, if they prove something.
        num_outputs: Of the model: the classes, or the numbers of a target.
        total_steps: Of the run.
        ranks: The processes of the job.
    """

    objective: Objective
    X: Tensor
    y: Tensor
    num_tried: int
    num_outputs: int
    total_steps: int
    ranks: Ranks


@dataclass(frozen=True)
class Step:
    """What a regularizer sees of one training step.

    Attributes:
        objective: The loss trained on as a function of the parameters, in training mode.
        X: The inputs, as the model saw them, of this part of the batch.
        targets: As the task has them, transformed like the inputs.
        outputs: Of the ordinary forward pass, with their graph.
        loss: Of those outputs, 0-dim, with its graph.
        part: Where these examples stand in the whole batch.
        index: Number of the step in the run, from 0.
        progress: The share of the run that is done, in [0, 1).
        generator: Source of this regularizer's randomness in this step, on the device.
        state: Of the randomness that all parts of the batch share; see `shared_generator`.
        gathered: What each `Coupled.gather` gave, by its name, summed over the parts; None where
            the batch has one part.
        end: The state that a recurrent model ended with, shape (N, ...); None where none is
            carried.
        random: The state of the device's default generator in front of the ordinary forward pass;
            None where it is not known.
    """

    objective: Objective
    X: Tensor
    targets: Tensor
    outputs: Tensor
    loss: Tensor
    part: Part
    index: int
    progress: float
    generator: Generator
    state: Tensor
    gathered: Mapping[str, list[Tensor]] | None = None
    end: Tensor | None = None
    random: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """The outputs, by the name that they have where they are of classes."""
        return self.outputs

    def shared_generator(self) -> Generator:
        """A generator that gives the same numbers for every part of the batch, at every call."""
        generator = Generator(self.generator.device)
        generator.set_state(self.state)
        return generator

    def loss_at(self, shift: dict[str, Tensor]) -> Tensor:
        """The loss at other parameters, w + shift; running statistics stay as they are.

        The same function of the parameters as that of the ordinary pass: with its Dropout's masks.
        For first derivatives only: the model runs its own operations.
        """
        objective, device = self.objective, self.outputs.device
        moved = {name: p + shift[name] for name, p in objective.params.items()}
        with random_state_kept():
            if self.random is not None:
                set_random_state(self.random, device)
            outputs = native_outputs(objective.model, self.X, moved)
        return objective.task.loss(outputs, self.targets)


@dataclass(frozen=True)
class Term:
    """A term of the loss.

    Attributes:
        weight: Its strength at this step.
        value: What is weighted, 0-dim, with a graph to the parameters.
        replaces: Whether it stands in the place of the plain loss, rather than beside it.
        is_mean: Whether it is a mean over this part's terms, to be weighted with its share; else
            its gradients over the parts sum to that of the whole as they are.
        is_whole: Whether its value is that of the whole batch, to be counted once.
        loss: This part's share of the plain loss, with a graph, where the term's own pass gave it
            on the way.
    """

    weight: float
    value: Tensor
    replaces: bool = False
    is_mean: bool = True
    is_whole: bool = False
    loss: Tensor | None = None

    def __post_init__(self) -> None:
        value: object = self.value
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"a regularizer's term is {given}, expected a 0-dim tensor in floating point"
            )


class Regularizer:
    """Changes a step's batch, its loss, or the model; every hook does nothing by default.

    A class declares in its body, as plain values, what `config.declared` reads: `name`, `default`,
    `unit`, `maximum`, `is_penalty`, `settings`, `alone_to`, `spacing`, `acts_late`.

    Attributes:
        strength: The number behind `NAME=`.
        config: The run's settings.
        name: As the user gave it.
        order: The highest derivative taken through the ordinary forward pass; 2 and more
            make it run inside `differentiable_ops(order=...)`.
        by_example: Whether it needs the ordinary forward pass inside
            `differentiable_ops(by_example=True)`, if of order 2.
        in_parts: Whether a batch may come in parts, over several processes or rounds.
        reads_weights: Why it needs the whole weights in a step, half a sentence for an error, so
            that they cannot be split over processes; None where it does not.
        logged_as: The name of its terms' mean value in the record of an epoch; None for none.
    """

    name: str = ""
    order: int = 1
    by_example: bool = False
    in_parts: bool = True
    reads_weights: str | None = "it may read or move the whole weights"
    logged_as: ClassVar[str | None] = None

    def __init__(self, strength: float, config: TrainConfig) -> None:
        self.strength = strength
        self.config = config

    def attach(self, objective: Objective) -> Objective:
        """Change the model or the loss, once, before the first step; parameters' names must stay.

        Returns:
            The loss to train on.
        """
        return objective

    def prepare(self, setting: Setting) -> None:
        """Look at what is to be trained, once, after all have been attached."""

    def transform(self, X: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """The batch to train on."""
        return X, targets

    def gives_loss(self, index: int, progress: float) -> bool:
        """Whether its term in this step has the plain loss, or stands in its place.

        If so, and no other has a term, the ordinary forward pass needs no graph.
        """
        return False

    def term(self, step: Step) -> Term | None:
        """The term that this step's loss gets; None for none."""
        return None

    def description(self) -> dict[str, Any] | None:
        """What the summary of the run says of it; None for nothing."""
        return None


class Coupled(Regularizer):
    """A regularizer whose term is no mean, and needs sums over all parts of the batch first.

    What it gathers holds only in the steps for which `gathers` says so.
    """

    def gathers(self, index: int, progress: float) -> bool:
        """Whether its term needs such sums in this step; the same in every process."""
        return True

    def gather(self, step: Step) -> list[Tensor]:
        """What must be summed over all parts of the batch before `term`."""
        raise NotImplementedError

    def gathered(self, step: Step) -> list[Tensor] | None:
        """These sums; None where the batch has one part, or none are needed."""
        return None if step.gathered is None else step.gathered.get(self.name)
