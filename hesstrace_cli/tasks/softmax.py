"""Softmax cross-entropy with its curvature, shared by the tasks with logits of classes.

    l(f, y) = - sum_c t_c w_c log p_c,   p = softmax(f),   A = omega (diag(p) - p p^T)

with t the target as probabilities, smoothed by epsilon, w the class weights and
omega = sum_c t_c w_c, so that B = omega^(1/2) (diag(sqrt p) - p sqrt(p)^T) has B B^T = A.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hesstrace_cli.errors import ConfigError, DataError
from hesstrace_cli.tasks.base import Task, check_finite_targets, wrong_outputs, wrong_targets

_SUM_TOLERANCE = 1e-3


def softmax_root(logits: Tensor, e: Tensor, dim: int = -1) -> Tensor:
    """B e for the factor B = diag(sqrt p) - p sqrt(p)^T, which has B B^T = diag(p) - p p^T.

    sqrt(p) is taken as exp(log_softmax / 2), whose gradient is finite where p underflows.

    Args:
        logits: Any shape, classes along `dim`.
        e: Anything that broadcasts with it.
        dim: Of the classes.
    """
    root = torch.exp(F.log_softmax(logits, dim=dim) / 2)
    return root * e - root.square() * (root * e).sum(dim, keepdim=True)


def softmax_hessian(logits: Tensor, vector: Tensor, dim: int = -1) -> Tensor:
    """A v for A = diag(p) - p p^T, classes along `dim`; both of one shape."""
    p = F.softmax(logits, dim=dim)
    return p * vector - p * (p * vector).sum(dim, keepdim=True)


def softmax_columns(logits: Tensor) -> Tensor:
    """C - 1 vectors B e_c for each row, sum_c B e_c e_c^T B^T = A; (C-1, R, C) from (R, C).

    B sqrt(p) = 0, so that the columns of a reflection that takes the last axis to sqrt(p) are
    enough without that last one.
    """
    normal = torch.exp(F.log_softmax(logits, -1) / 2)
    normal[:, -1] += 1
    normal = normal / normal.norm(dim=-1, keepdim=True)
    eye = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)[:-1, None]
    e = eye - 2 * normal[:, :-1].T[..., None] * normal
    return softmax_root(logits, e)


@dataclass(frozen=True)
class SoftmaxTask(Task):
    """Cross-entropy of classes along one dimension of the outputs, a mean over the M terms.

    With class weights it is (1/M) sum_m w_{y_m} l_m, so that batches add up by their terms;
    PyTorch's own mean divides by the sum of the weights instead, which is the same for weights
    whose mean over the terms is 1, as `balanced` ones have over the training data.

    Attributes:
        class_weights: w, one a class; None weighs all alike.
        label_smoothing: epsilon.
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    @property
    def class_dim(self) -> int:
        """The dimension of the outputs that the classes lie along."""
        return 1

    @property
    def ignored(self) -> int | None:
        """The target of terms that do not count, if there may be such."""
        return None

    # -- what comes in

    def target_dim(self) -> tuple[int, ...]:
        """The numbers of dimensions that targets may have, as class numbers."""
        return (1,)

    def check_targets(self, targets: Tensor, where: str) -> None:
        """Class numbers from 0, or the ignored one; the range is checked with the outputs."""
        if targets.is_floating_point() or targets.dtype == torch.bool or targets.is_complex():
            raise wrong_targets(self, targets, where)
        if targets.dim() not in self.target_dim():
            raise wrong_targets(self, targets, where)
        counted = targets if self.ignored is None else targets[targets != self.ignored]
        if self.ignored is not None and counted.numel() == 0:
            raise DataError(f"{where}: every target is the ignored index {self.ignored}")
        if counted.numel() and int(counted.min()) < 0:
            raise DataError(
                f"{where}: a target is {int(counted.min())}, expected class numbers from 0"
                + ("" if self.ignored is None else f" or the ignored index {self.ignored}")
            )

    def check_outputs(self, outputs: Tensor, targets: Tensor, model: str) -> None:
        """A logit for each class of every term."""
        shape = list(outputs.shape)
        if not outputs.is_floating_point() or outputs.dim() != targets.dim() + 1:
            raise wrong_outputs(self, outputs, targets, model)
        num_classes = shape.pop(self.class_dim)
        if shape != list(targets.shape):
            raise wrong_outputs(self, outputs, targets, model)
        self.check_weights(num_classes)

    def check_weights(self, num_classes: int) -> None:
        """Refuse class weights that are not one a class.

        Raises:
            ConfigError: Saying how many there are of each.
        """
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ConfigError(
                f"--class-weights has {len(self.class_weights)} weights, the model gives "
                f"{num_classes} classes"
            )

    def num_outputs(self, targets: Tensor) -> int:
        """The classes: one more than the largest number, or as many as there are probabilities."""
        if targets.is_floating_point():
            return targets.shape[self.class_dim]
        counted = targets if self.ignored is None else targets[targets != self.ignored]
        return 1 + int(counted.max())

    def width(self, outputs: Tensor) -> int:
        """C."""
        return outputs.shape[self.class_dim]

    def num_terms(self, targets: Tensor) -> int:
        """The targets that are not ignored."""
        if self.ignored is None:
            return len(targets) if targets.is_floating_point() else targets.numel()
        return int((targets != self.ignored).sum())

    # -- the loss

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of the terms that count."""
        if self.class_weights is None and self.ignored is None:
            return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)
        if self.class_dim == outputs.dim() - 1:  # rows of logits: three times faster on a CPU
            outputs, targets = outputs.flatten(0, -2), targets.flatten(0, outputs.dim() - 2)
        else:
            outputs = outputs.movedim(self.class_dim, 1)
        summed = F.cross_entropy(
            outputs,
            targets,
            weight=self._weights(outputs),
            ignore_index=-100 if self.ignored is None else self.ignored,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return summed / self.divisor(targets)

    def described_loss(self) -> str:
        """Says that terms weigh by their class, and that targets are smoothed, where they are."""
        weighted = "" if self.class_weights is None else "class-weighted "
        smoothed = f" with labels smoothed by {self.label_smoothing:g}"
        return weighted + self.loss_name + (smoothed if self.label_smoothing else "")

    def _weights(self, outputs: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        return torch.tensor(self.class_weights, dtype=outputs.dtype, device=outputs.device)

    def _omega(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Each term's factor of A, in the outputs' shape with one class; None where all are 1."""
        w, epsilon = self._weights(outputs), self.label_smoothing
        omega = None
        if w is not None:
            if targets.is_floating_point():
                own = targets.movedim(self.class_dim, -1) @ w
            else:
                # The ignored index may be no class, on either side of them.
                own = (
                    w[torch.where(targets == self.ignored, 0, targets)]
                    if (self.ignored is not None)
                    else w[targets]
                )
            omega = own if not epsilon else (1 - epsilon) * own + epsilon * w.mean()
        if self.ignored is not None:
            counts = targets != self.ignored
            omega = counts.to(outputs.dtype) if omega is None else omega * counts
        return None if omega is None else omega.unsqueeze(self.class_dim)

    # -- its curvature

    def root(self, outputs: Tensor, targets: Tensor, e: Tensor) -> Tensor:
        """B e = omega^(1/2) (diag(sqrt p) - p sqrt(p)^T) e."""
        root = softmax_root(outputs, e, self.class_dim)
        omega = self._omega(outputs, targets)
        return root if omega is None else omega.sqrt() * root

    def label_root(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        """omega^(1/2) (p - e_c), the label c drawn from p: the largest of f + Gumbel noise."""
        gumbel = -torch.log(-torch.log(noise))
        drawn = (outputs.detach() + gumbel).argmax(self.class_dim, keepdim=True)
        root = F.softmax(outputs, self.class_dim)
        root = root - torch.zeros_like(root).scatter_(self.class_dim, drawn, 1.0)
        omega = self._omega(outputs, targets)
        return root if omega is None else omega.sqrt() * root

    def curve(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        """A v = omega (diag(p) - p p^T) v."""
        product = softmax_hessian(outputs, vector, self.class_dim)
        omega = self._omega(outputs, targets)
        return product if omega is None else omega * product

    def num_columns(self, outputs: Tensor) -> int:
        """C - 1 for each term of an example."""
        terms = math.prod(outputs.shape[1:]) // max(1, outputs.shape[self.class_dim])
        return terms * (outputs.shape[self.class_dim] - 1)

    def columns(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """C - 1 for each term of an example, zero at its other terms."""
        moved = outputs.movedim(self.class_dim, -1)
        N, num_classes = len(outputs), moved.shape[-1]
        rows = softmax_columns(moved.reshape(-1, num_classes))  # (C-1, N T, C)
        omega = self._omega(outputs, targets)
        if omega is not None:
            rows = rows * omega.movedim(self.class_dim, -1).reshape(-1, 1).sqrt()
        terms = math.prod(moved.shape[1:-1])
        rows = rows.reshape(num_classes - 1, N, terms, num_classes)
        # One term at a time: two terms in one backward pass would meet in the squared norm.
        alone = torch.eye(terms, dtype=rows.dtype, device=rows.device)[:, None, None, :, None]
        apart = (alone * rows).reshape(terms * (num_classes - 1), *moved.shape)
        return apart.movedim(-1, self.class_dim + 1)

    def curvature_traces(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The trace omega (1 - sum_c p_c^2)."""
        p = F.softmax(outputs, self.class_dim)
        traces = 1 - p.square().sum(self.class_dim, keepdim=True)
        omega = self._omega(outputs, targets)
        return (traces if omega is None else omega * traces).squeeze(self.class_dim)

    def term_numbers(self, outputs: Tensor) -> Tensor:
        """One for every row of logits."""
        one_class = outputs.select(self.class_dim, 0)
        numbers = torch.arange(one_class.numel(), device=outputs.device).reshape(one_class.shape)
        return numbers.unsqueeze(self.class_dim).expand_as(outputs)

    # -- what regularizers ask

    def smoothed(self, share: float) -> Task:
        """With another epsilon."""
        return dataclasses.replace(self, label_smoothing=share)

    def entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean entropy of p over the terms that count."""
        entropies = torch.special.entr(F.softmax(outputs, dim=self.class_dim)).sum(self.class_dim)
        if self.ignored is None:
            return entropies.mean()
        counts = targets != self.ignored
        return (entropies * counts).sum() / self.divisor(targets)


def check_probabilities(targets: Tensor, where: str) -> None:
    """Refuse rows that are no distributions.

    Raises:
        DataError: If an entry is negative or not finite, or a row does not sum to 1.
    """
    check_finite_targets(targets, where)
    low = float(targets.min())
    off = float((targets.sum(-1) - 1).abs().max())
    if low < 0 or off > _SUM_TOLERANCE:
        raise DataError(
            f"{where}: targets (N, C) are no probabilities (the smallest is {low:g}, a row's sum "
            f"is off 1 by {off:.3g}); for numbers to be met use --task regression"
        )
