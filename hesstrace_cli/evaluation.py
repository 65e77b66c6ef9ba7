"""How a model does on a split, and what bounds on its generalization combine."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hesstrace_cli.curvature.objective import call_as_it_is
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.statistics import Mean, means
from hesstrace_cli.data import DataSet, Split

MOST_COLUMNS = 32


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy on a split, in eval mode.

    The model's mode is restored.
    """
    was_training = model.training
    model.eval()
    sums = []
    for X, y in split.batches(batch_size):
        logits = model(X)
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums.append(torch.stack([loss.double(), (logits.argmax(1) == y).sum().double()]))
    model.train(was_training)
    # Summed where they are: a GPU is waited for once.
    loss_sum, correct = functools.reduce(torch.add, sums).tolist()
    return loss_sum / len(split), correct / len(split)


def finite(number: float | None) -> float | None:
    """The number; None where it is infinite or none, as no JSON can hold it."""
    return number if number is not None and math.isfinite(number) else None


_FAR = 10.0  # times log C


def collapse(loss: float, accuracy: float, labels: Tensor) -> str | None:
    """Whether a network tells no more than nothing of these examples, and by what; None if not.

    Whoever names every class with its share of the examples, whatever the input, has a loss of the
    shares' entropy, the least that is possible so, and at most the largest share as accuracy.

    Args:
        loss: The mean cross-entropy on the examples.
        accuracy: On them.
        labels: Theirs.
    """
    counts = labels.cpu().unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    largest, entropy = shares.max().item(), -(shares * shares.log()).sum().item()
    guess = math.log(max(2, len(counts)))
    if loss > _FAR * guess:
        return f"a loss of {loss:.3g}, where a guess among the classes has {guess:.3g}"
    noise = 2 * math.sqrt(largest * (1 - largest) / len(labels))
    if entropy > 0 and loss >= 0.99 * entropy and accuracy <= largest + noise:
        return (
            f"accuracy {accuracy:.3g} and loss {loss:.3g} are no better than those of the classes' "
            f"shares alone, {largest:.3g} and {entropy:.3g}"
        )
    return None


_BINS = 15


@torch.no_grad()
def calibration_error(model: nn.Module, split: Split, batch_size: int) -> float:
    """The expected calibration error: mean |accuracy - confidence| over 15 bins of confidence.

    Source:
        Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML 2017.
    """
    was_training = model.training
    model.eval()
    pairs = []
    for X, y in split.batches(batch_size):
        confidence, predicted = F.softmax(model(X).double(), 1).max(1)
        pairs.append(torch.stack([confidence, (predicted == y).double() - confidence]))
    model.train(was_training)
    # On the CPU, where the order of summation is always the same.
    confidence, surplus = torch.cat(pairs, 1).cpu()
    bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
    gap = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, surplus)
    return gap.abs().sum().item() / len(split)


def input_jacobian(model: nn.Module, split: Split, batch_size: int, *, seed: int = 0) -> Mean:
    """The mean over examples of ||df(x)/dx||_F^2, f the logits, in eval mode.

    Exact for each example by C backward passes where C is at most 32; else from 32 random sign
    vectors s, as E ||s^T J||^2 = ||J||_F^2. The model's mode is restored.

    Args:
        model: Gives logits of shape (N, C).
        split: The examples.
        batch_size: Examples at a time.
        seed: Of the sign vectors.

    Returns:
        With the standard error as an estimate for all examples that the split may stand for.
    """
    was_training = model.training
    model.eval()
    norms = []
    for X, _ in split.batches(batch_size):
        generator = Generator(X.device).manual_seed(seed)
        norms.append(_squared_norms(model, X, generator))
    model.train(was_training)
    return means(torch.cat(norms).double().cpu()[:, None])[0]


def _squared_norms(model: nn.Module, X: Tensor, generator: Generator) -> Tensor:
    X = X.detach().requires_grad_()
    with torch.enable_grad():
        logits = call_as_it_is(model, X)
    columns = logits.shape[1]
    if columns <= MOST_COLUMNS:
        cotangents = list(torch.eye(columns, dtype=logits.dtype, device=X.device))
        cotangents = [row.expand_as(logits) for row in cotangents]
    else:
        cotangents = [rademacher(logits.detach(), generator=generator) / MOST_COLUMNS**0.5
                      for _ in range(MOST_COLUMNS)]  # fmt: skip
    total = torch.zeros(len(X), dtype=torch.float64, device=X.device)
    for cotangent in cotangents:
        (product,) = torch.autograd.grad(
            logits, X, cotangent, retain_graph=True, materialize_grads=True
        )
        total += product.double().square().flatten(1).sum(1)
    return total


def generalization_report(
    model: nn.Module, data: DataSet, split: Split, batch_size: int, trace: float
) -> dict[str, Any]:
    """Losses on both splits, their gap, the input Jacobian and the trace.

    Args:
        model: The network.
        data: Its training and test examples.
        split: The training examples that trace and Jacobian are of.
        batch_size: Examples at a time.
        trace: tr(H) or tr(G) on the split.
    """
    train_loss, train_accuracy = evaluate(model, data.train, batch_size)
    test_loss, test_accuracy = evaluate(model, data.test, batch_size)
    jacobian = input_jacobian(model, split, batch_size)
    return {
        "train_loss": train_loss,
        "test_loss": test_loss,
        "generalization_gap": test_loss - train_loss,
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
        "accuracy_gap": train_accuracy - test_accuracy,
        "input_jacobian": finite(jacobian.value),
        "input_jacobian_stderr": finite(jacobian.stderr),
        "trace": trace,
    }
