"""One training step: the gradients of the loss and of the penalties, over the parts of a batch.

A batch is split over the processes of a job and over rounds of accumulation. Means over examples
add up with their shares; what is no mean, as the sample of tr(G), is gathered first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

from hesstrace_cli.autodiff.arguments import arguments_of
from hesstrace_cli.autodiff.calls import outputs_of, trainable
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.curvature.blame import naming_fault
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.data.augment import crop_flip
from hesstrace_cli.distributed.parallel import Ranks
from hesstrace_cli.distributed.sharding import let_go
from hesstrace_cli.distributed.sync_norm import SyncedNorms
from hesstrace_cli.errors import NumericsError
from hesstrace_cli.randomness import random_state, set_random_state
from hesstrace_cli.regularizers import Coupled, Part, Regularizer, Step
from hesstrace_cli.storage.state import EpochSums
from hesstrace_cli.tasks import Task

_MOST_SKIPPED = 16  # float16 steps in a row, each at half the scale of the one before
Examples = tuple[Tensor, Tensor, Part]
"""Inputs and targets of a part of a batch, and which part it is."""
Gathered = dict[str, list[Tensor]]
"""By the name of a coupled regularizer what it has summed over the parts of a batch."""


def split_batch(
    num_examples: int, ranks: Ranks, *, rounds: int, least: int, as_many: bool = False
) -> list[Part]:
    """This process's parts of a batch, one or more.

    Args:
        num_examples: Of the whole batch.
        ranks: Every process gets examples, the first ones one more where they do not come out
            even; in a batch too small for that, the last ones repeat some with weight 0.
        rounds: Parts of each process at most, one after the other.
        least: Examples of a part: 2 where a part of one has no batch statistics.
        as_many: Whether every process has as many parts as any other, to meet in each.
    """
    sharing = max(1, min(ranks.size, num_examples // least))
    rows = torch.arange(num_examples)[ranks.rank % sharing :: sharing]
    fewest = num_examples // sharing if as_many else len(rows)
    count = max(1, min(rounds, fewest // least))
    if ranks.rank >= sharing:
        return [Part(rows, num_examples, 0.0, num_examples, 0.0)] * (count if as_many else 1)
    parts = rows.tensor_split(count)
    shares = [len(part) / num_examples for part in parts]
    return [
        Part(part, num_examples, share, num_examples, share)
        for part, share in zip(parts, shares, strict=True)
    ]


def weighed(examples: Sequence[Examples], task: Task, ranks: Ranks) -> Sequence[Examples]:
    """The parts with their shares of the batch's terms, where examples have unequal numbers."""
    if task.counts_all:
        return examples
    counts = [task.num_terms(y) if part.share else 0 for _, y, part in examples]
    total = ranks.total(sum(counts))
    return [
        (X, y, dataclasses.replace(part, share=count / max(1, total), num_terms=total))
        for (X, y, part), count in zip(examples, counts, strict=True)
    ]


@dataclass
class Stepper:
    """Takes the steps of a run.

    Attributes:
        config: The run's.
        objective: The loss trained on, in training mode.
        regularizers: With their strengths.
        optimizer: Moves the weights.
        ranks: The processes of the job.
        generators: Gives the generator of a stream: its name and numbers, the step's first.
        scaler: Keeps the gradients of float16 from underflowing.
        norms: Batch norm over all processes, if asked for.
    """

    config: TrainConfig
    objective: Objective
    regularizers: Sequence[Regularizer]
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    generators: Callable[..., Generator]
    scaler: GradScaler
    norms: SyncedNorms | None = None

    def __post_init__(self) -> None:
        model = self.objective.model
        self._in_a_row = 0
        self._model = torch.compile(model, dynamic=False) if self.config.compile else model

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are split over the processes."""
        return self.config.shard and self.ranks.size > 1

    @property
    def order(self) -> int:
        """The highest derivative taken through the ordinary forward pass."""
        return max([1, *(regularizer.order for regularizer in self.regularizers)])

    def step(
        self, examples: Sequence[Examples], index: int, progress: float, lr: float, sums: EpochSums
    ) -> list[Tensor]:
        """Move the weights.

        Args:
            examples: This process's parts of the batch, augmented.
            index: Number of the step in the run.
            progress: The share of the run that is done.
            lr: The learning rate.
            sums: Gets the step's figures.

        Returns:
            The states that a recurrent model ended with, part by part; none where none is carried.

        Raises:
            NumericsError: If the loss or its gradient is not finite; the weights have not moved.
        """
        examples = weighed(examples, self.objective.task, self.ranks)
        prepared = [self._transformed(*each, index, n) for n, each in enumerate(examples)]
        kept, gathered = self._gathered(prepared, index, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        total, ends = torch.zeros((), device=sums.loss.device), []
        for number, each in enumerate(prepared):
            step = kept[number] if kept else self._forward(each, index, progress)
            step = dataclasses.replace(step, gathered=gathered)
            loss = self._add_terms(step, sums, first=number == 0)
            self._backward(loss, step)
            total += loss.detach()
            if step.end is not None:
                ends.append(step.end)
            if step.part.share:
                self._count(step, each, sums)
        if self.is_sharded:
            let_go(self.objective.model)
            self.ranks.sum_([total])  # gradients are summed as they are split
        else:
            self._sum_gradients(total)
        self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        self._check_finite(total, norm, index)
        if self.config.clip_grad is not None:
            params = self.objective.model.parameters()
            torch.nn.utils.clip_grads_with_norm_(params, self.config.clip_grad, norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            sums.skipped += 1
            self._in_a_row += 1
        else:
            self._in_a_row = 0
        return ends

    def _backward(self, loss: Tensor, step: Step) -> None:
        with naming_fault(self.objective, step.X):
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        for p in self.objective.params.values():
            if p.grad is not None and p.grad.is_sparse:  # which no optimizer here takes
                p.grad = p.grad.to_dense()

    def _count(self, step: Step, batch: _Prepared, sums: EpochSums) -> None:
        task, outputs = self.objective.task, step.outputs.detach()
        num_terms = round(step.part.share * step.part.num_terms)
        sums.loss += step.loss.detach() * num_terms
        right = task.num_right(outputs, batch.clean)
        if right is not None:
            sums.correct += right
        sums.examples += num_terms

    def _transformed(self, X: Tensor, y: Tensor, part: Part, index: int, number: int) -> _Prepared:
        own = (index, self.ranks.rank, number)  # another each part
        generator, targets = self.generators("parts", *own), y
        if self.config.augment == "crop-flip":
            X = crop_flip(X, generator=self.generators("augmentation", *own))
        if self.config.channels_last and X.dim() == 4:
            X = X.contiguous(memory_format=torch.channels_last)
        for regularizer in self.regularizers:
            X, targets = regularizer.transform(X, targets, generator)
        shared = self.generators("regularizers", index)
        return _Prepared(X, y, targets, part, generator, shared.get_state())

    def _forward(self, batch: _Prepared, index: int, progress: float) -> Step:
        if self.norms is not None:
            self.norms.weight = float(batch.part.share > 0)
        args, kwargs = arguments_of(batch.X)
        state = random_state(batch.X.device)
        with torch.set_grad_enabled(not self._is_given(index, progress)):
            if self.order > 1:
                by_example = any(regularizer.by_example for regularizer in self.regularizers)
                with differentiable_ops(order=self.order, by_example=by_example):
                    given = self.objective.model(*args, **kwargs)
            else:
                given = self._model(*args, **kwargs)
            outputs = outputs_of(given)
            if not batch.part.share:  # nothing may flow into others' examples through synced norms
                outputs = outputs.detach() + 0 * outputs
            loss = self.objective.task.loss(outputs, batch.targets)
        objective = self.objective
        if self.is_sharded:  # the parameters in the graph are the gathered ones
            objective = dataclasses.replace(objective, params=trainable(objective.model))
        return Step(
            objective, batch.X, batch.targets, outputs, loss, batch.part, index, progress,
            batch.generator, batch.state, end=given["state"] if "state" in kwargs else None,
            random=state,
        )  # fmt: skip

    def _is_given(self, index: int, progress: float) -> bool:
        """Whether one regularizer gives the plain loss and no other has a term."""
        givers = [r for r in self.regularizers if r.gives_loss(index, progress)]
        with_term = [r for r in self.regularizers if type(r).term is not Regularizer.term]
        return len(givers) == 1 and with_term == givers

    def _gathered(
        self, prepared: Sequence[_Prepared], index: int, progress: float
    ) -> tuple[list[Step], Gathered | None]:
        """The steps of the forward passes that need not be done again, and what was gathered.

        Every process comes here with the same step, however many examples it has of the batch:
        whether they meet may hang on nothing that differs between them.
        """
        coupled = [
            r for r in self.regularizers if isinstance(r, Coupled) and r.gathers(index, progress)
        ]
        if self.ranks.size == len(prepared) == 1 or not coupled:
            return [], None
        if len(prepared) == 1:
            step = self._forward(prepared[0], index, progress)
            gathered = _of_coupled(coupled, step)
            self.ranks.sum_([tensor for own in gathered.values() for tensor in own])
            return [step], gathered
        # A first round over the parts, which leaves no trace in the model and its randomness.
        buffers = [(b, b.clone()) for b in self.objective.model.buffers()]
        state, total = random_state(prepared[0].X.device), Gathered()
        for each in prepared:
            of_part = _of_coupled(coupled, self._forward(each, index, progress))
            for name, own in of_part.items():
                so_far = total.setdefault(name, [torch.zeros_like(tensor) for tensor in own])
                total[name] = [a + b for a, b in zip(so_far, own, strict=True)]
        self.ranks.sum_([tensor for own in total.values() for tensor in own])
        set_random_state(state, prepared[0].X.device)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return [], total

    def _add_terms(self, step: Step, sums: EpochSums, *, first: bool) -> Tensor:
        """This part's share of the loss with its terms."""
        share = step.part.share
        loss, total = share * step.loss, torch.zeros_like(step.loss)
        for regularizer in self.regularizers:
            term = regularizer.term(step)
            if term is None:
                continue
            if term.replaces:
                loss = share * term.value
                continue
            if term.loss is not None and not loss.requires_grad:
                loss = term.loss
            own = share if term.is_mean else 1.0
            total = total + term.weight * own * term.value
            if regularizer.logged_as is not None:
                said = own if not term.is_whole else float(first and self.ranks.is_first)
                sums.penalty += term.value.detach() * said
                sums.penalty_steps += first
        return loss + total

    def _sum_gradients(self, total: Tensor) -> None:
        """Over the processes; a parameter without a gradient in any of them keeps none."""
        if self.ranks.size == 1:
            return
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        used = torch.tensor([float(p.grad is not None) for p in params], device=total.device)
        self.ranks.sum_([used, total])
        params = [p for p, count in zip(params, used.tolist(), strict=True) if count]
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.ranks.sum_([p.grad for p in params if p.grad is not None])

    def _gradient_norm(self) -> Tensor:
        grads = [p.grad for p in self.objective.model.parameters() if p.grad is not None]
        size = torch.nn.utils.get_total_norm(grads)
        return size.full_tensor() if isinstance(size, DTensor) else size

    def _check_finite(self, total: Tensor, size: Tensor, index: int) -> None:
        if self.scaler.is_enabled() and self._in_a_row < _MOST_SKIPPED:
            size = torch.zeros_like(size)  # an overflow there: the scaler leaves the step out
        if not torch.isfinite(total + size):
            raise NumericsError(
                f"the loss is {total.item():g} and its gradient's norm {size.item():g} in step "
                f"{index + 1}; stopped before the weights moved. A lower --lr or strength, or a "
                "longer --warmup, may help"
            )


@dataclass(frozen=True)
class _Prepared:
    """A part after the regularizers' transforms."""

    X: Tensor
    clean: Tensor  # targets
    targets: Tensor
    part: Part
    generator: Generator
    state: Tensor


def _of_coupled(coupled: Sequence[Coupled], step: Step) -> Gathered:
    return {r.name: [tensor.detach() for tensor in r.gather(step)] for r in coupled}
