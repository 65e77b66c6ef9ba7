"""How a model does on a split, and what bounds on its generalization combine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from hesstrace_cli import records
from hesstrace_cli.autodiff.arguments import arguments_of
from hesstrace_cli.autodiff.calls import eval_mode, native_outputs, outputs_of
from hesstrace_cli.curvature.data_loss import check_counts
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.statistics import Mean, means
from hesstrace_cli.data import DataSet, Examples, Split
from hesstrace_cli.data.windows import EVALUATED_STREAMS, TextSplit, streams
from hesstrace_cli.models.language import Carrying
from hesstrace_cli.randomness import stream_generator

MOST_COLUMNS = 32


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a split.

    Attributes:
        loss: The task's mean loss over the terms.
        metrics: The task's, by name.
    """

    loss: float
    metrics: dict[str, float]

    @property
    def accuracy(self) -> float | None:
        """None where the task has no such thing."""
        return self.metrics.get("accuracy")

    def finite_metrics(self) -> dict[str, float | None]:
        """The metrics for a record: null where one is infinite or none."""
        return {name: finite(value) for name, value in self.metrics.items()}


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Examples, batch_size: int, *, alone: bool = False
) -> Evaluation:
    """The mean loss and the metrics on a split, in eval mode.

    A recurrent model reads a text in `EVALUATED_STREAMS` streams, its state carried along each, so
    that the result does not depend on the batch size. The host waits for the device once, at the
    end.

    Args:
        model: The network.
        split: The examples.
        batch_size: Of them at a time.
        alone: Whether each window of a text is read on its own, as a trace takes them.

    Raises:
        DataError: If no term of the split counts.
    """
    check_counts(split.num_terms, len(split))
    task, total, meter = split.task, torch.zeros((), dtype=torch.float64), split.task.meter()
    with eval_mode(model):
        for outputs, y in _outputs(model, split, batch_size, alone):
            if not meter.takes_loss:
                total = total.to(outputs.device)
                total += task.loss(outputs, y).double() * task.num_terms(y)
            meter.add(outputs, y)
    metrics = meter.result()
    return Evaluation(total.item() / split.num_terms if meter.loss is None else meter.loss, metrics)


_BLOCKS = 50


@torch.no_grad()
def block_losses(model: nn.Module, split: Examples) -> tuple[list[float], list[int]]:
    """The mean losses of about fifty blocks of a split, in eval mode, and the terms of each.

    Args:
        model: The network.
        split: The examples.
    """
    task, losses, terms = split.task, [], []
    with eval_mode(model):
        for outputs, y in _outputs(model, split, math.ceil(len(split) / _BLOCKS), alone=False):
            losses.append(task.loss(outputs, y).double())
            terms.append(task.num_terms(y))
    kept = [(loss.item(), count) for loss, count in zip(losses, terms, strict=True) if count]
    return [loss for loss, _ in kept], [count for _, count in kept]


def _outputs(
    model: nn.Module, split: Examples, batch_size: int, alone: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and targets, batch by batch."""
    text = isinstance(split, TextSplit) and split.is_consecutive and not alone
    if not text or not isinstance(model, Carrying):
        for X, y in split.batches(batch_size):
            args, kwargs = arguments_of(X)
            yield outputs_of(model(*args, **kwargs)), y
        return
    assert isinstance(split, TextSplit)
    batches = streams(len(split), EVALUATED_STREAMS)
    state = model.zero_state(len(batches[0]))
    for X, y in split.parts(batches):
        given = model(X, state=state[: len(X)])
        state = given["state"]
        yield outputs_of(given), y


def finite(number: float | None) -> float | None:
    """The number; None where it is infinite or none, as no JSON can hold it."""
    return number if number is not None and math.isfinite(number) else None


def input_jacobian(
    model: nn.Module, split: Split, batch_size: int, *, seed: int = 0
) -> Mean | None:
    """The mean over examples of ||df(x)/dx||_F^2, f the outputs, in eval mode.

    Exact for each example by K backward passes where its outputs are at most K = 32 numbers; else
    from 32 random sign vectors s, as E ||s^T J||^2 = ||J||_F^2.

    Args:
        model: The network.
        split: The examples.
        batch_size: Examples at a time.
        seed: Of the sign vectors.

    Returns:
        With the standard error as an estimate for all examples that the split may stand for; None
        of inputs that are indices, which have no derivative.
    """
    generator = stream_generator(seed, next(model.parameters()).device, "input-jacobian")
    norms = []
    with eval_mode(model):
        for X, _ in split.batches(batch_size):
            if not X.is_floating_point():
                return None
            norms.append(_squared_norms(model, X, generator))
    return means(torch.cat(norms).double().cpu()[:, None])[0]


def _squared_norms(model: nn.Module, X: Tensor, generator: Generator) -> Tensor:
    X = X.detach().requires_grad_()
    with torch.enable_grad():
        outputs = native_outputs(model, X)
    shape = outputs.shape[1:]
    numbers = math.prod(shape)
    if numbers <= MOST_COLUMNS:
        rows = torch.eye(numbers, dtype=outputs.dtype, device=X.device)
        cotangents = [row.reshape(1, *shape).expand_as(outputs) for row in rows]
    else:
        cotangents = [rademacher(outputs.detach(), generator=generator) / MOST_COLUMNS**0.5
                      for _ in range(MOST_COLUMNS)]  # fmt: skip
    total = torch.zeros(len(X), dtype=torch.float64, device=X.device)
    for cotangent in cotangents:
        (product,) = torch.autograd.grad(
            outputs, X, cotangent, retain_graph=True, materialize_grads=True
        )
        total += product.double().square().flatten(1).sum(1)
    return total


def generalization_report(
    model: nn.Module, data: DataSet, split: Split, batch_size: int, trace: float
) -> records.Report:
    """Losses and metrics on both splits, their gaps, the input Jacobian and the trace.

    Args:
        model: The network.
        data: Its training and test examples.
        split: The training examples that trace and Jacobian are of.
        batch_size: Examples at a time.
        trace: tr(H) or tr(G) on the split.
    """
    train, test = (evaluate(model, each, batch_size) for each in (data.train, data.test))
    jacobian = input_jacobian(model, split, batch_size)
    gap = None
    if train.accuracy is not None and test.accuracy is not None:
        gap = train.accuracy - test.accuracy
    return {
        "train_loss": finite(train.loss),
        "test_loss": finite(test.loss),
        "generalization_gap": finite(test.loss - train.loss),
        "train_accuracy": train.accuracy,
        "test_accuracy": test.accuracy,
        "accuracy_gap": gap,
        "train_metrics": train.finite_metrics(),
        "metrics": test.finite_metrics(),
        "input_jacobian": None if jacobian is None else finite(jacobian.value),
        "input_jacobian_stderr": None if jacobian is None else finite(jacobian.stderr),
        "trace": trace,
    }
