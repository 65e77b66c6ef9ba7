"""The one signature that every regularizer has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor, nn

from hesstrace_cli.config import TrainConfig
from hesstrace_cli.curvature.objective import Objective, call_as_it_is
from hesstrace_cli.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """Some examples of a batch: those of one process, or of one round of accumulation.

    Attributes:
        rows: Their positions in the whole batch.
        num_examples: Of the whole batch.
        share: The weight of their mean in that of the whole; 0 where they only keep a process
            busy that has no examples of its own.
    """

    rows: Tensor
    num_examples: int
    share: float

    @property
    def is_whole(self) -> bool:
        """Whether they are the batch."""
        return len(self.rows) == self.num_examples and self.share == 1


@dataclass(frozen=True)
class Step:
    """What a regularizer sees of one training step.

    Attributes:
        objective: The loss trained on as a function of the parameters, in training mode.
        X: The inputs, as the model saw them, of this part of the batch.
        targets: Class numbers (N,) or probabilities (N, C).
        logits: Of the ordinary forward pass, shape (N, C), with their graph.
        loss: Of those logits, 0-dim, with its graph.
        part: Where these examples stand in the whole batch.
        index: Number of the step in the run, from 0.
        progress: The share of the run that is done, in [0, 1).
        generator: Source of this regularizer's randomness in this step, on the device.
        state: Of the randomness that all parts of the batch share; see `shared_generator`.
        gathered: What `Regularizer.gather` gave, summed over the parts; None where the batch has
            one part.
    """

    objective: Objective
    X: Tensor
    targets: Tensor
    logits: Tensor
    loss: Tensor
    part: Part
    index: int
    progress: float
    generator: Generator
    state: Tensor
    gathered: list[Tensor] | None = None

    def shared_generator(self) -> Generator:
        """A generator that gives the same numbers for every part of the batch, at every call."""
        generator = Generator(self.generator.device)
        generator.set_state(self.state)
        return generator

    def loss_at(self, shift: dict[str, Tensor]) -> Tensor:
        """The loss at other parameters, w + shift; running statistics stay as they are.

        For first derivatives only: the model runs its own operations.
        """
        objective = self.objective
        moved = {name: p + shift[name] for name, p in objective.params.items()}
        return objective.task.loss(call_as_it_is(objective.model, self.X, moved), self.targets)


@dataclass(frozen=True)
class Term:
    """A term of the loss.

    Attributes:
        weight: Its strength at this step.
        value: What is weighted, 0-dim, with a graph to the parameters.
        replaces: Whether it stands in the place of the plain loss, rather than beside it.
        is_mean: Whether it is a mean over this part's examples, to be weighted with its share;
            else its gradients over the parts sum to that of the whole as they are.
        is_whole: Whether its value is that of the whole batch, to be counted once.
        plain: The plain loss, weighted with its share, with a graph, where the term's own pass
            gave it on the way.
    """

    weight: float
    value: Tensor
    replaces: bool = False
    is_mean: bool = True
    is_whole: bool = False
    plain: Tensor | None = None

    def __post_init__(self) -> None:
        value: object = self.value
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"a regularizer's term is {given}, expected a 0-dim tensor in floating point"
            )


class Regularizer:
    """Changes a step's batch, its loss, or the model; every hook does nothing by default.

    Attributes:
        strength: The number behind `NAME=`; its unit is in `config.REGULARIZERS`.
        config: The run's settings, `curvature` resolved.
        name: As the user gave it.
        order: The highest derivative taken through the ordinary forward pass; 2 and more
            make it run inside `differentiable_ops(order=...)`.
        needs_input_gradient: Whether the ordinary forward pass must keep a graph to the inputs.
        label_smoothing: Of the cross-entropy trained on.
        splits: Whether a batch may come in parts, over several processes or rounds.
    """

    name: str = ""
    order: int = 1
    needs_input_gradient: bool = False
    label_smoothing: float = 0.0
    splits: bool = True

    def __init__(self, strength: float, config: TrainConfig) -> None:
        self.strength = strength
        self.config = config

    def attach(self, model: nn.Module) -> None:
        """Change the model, once, before the first step; its parameters' names must stay."""

    def transform(self, X: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """The batch to train on."""
        return X, targets

    def gather(self, step: Step) -> list[Tensor]:
        """What must be summed over all parts of the batch before `term`; nothing for means."""
        return []

    def gives_loss(self, index: int, progress: float) -> bool:
        """Whether its term in this step has the plain loss, so that no other needs a graph."""
        return False

    def term(self, step: Step) -> Term | None:
        """The term that this step's loss gets; None for none."""
        return None
