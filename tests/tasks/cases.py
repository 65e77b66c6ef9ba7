"""Small data sets and models for every task, their losses in words and their dense Hessians."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.tasks import Classification, Multilabel, Regression, Segmentation, Task, Tokens

N, C, D, VOCABULARY = 10, 3, 2, 5
BATCHES = (10, 8, 4)  # of 10 examples: whole, 8 + 2, 4 + 4 + 2
WEIGHTS = (0.5, 2.0, 1.0)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def integers(high, *shape, seed=1):
    return torch.randint(high, shape, generator=_generator(seed))


def unevenly_ignored(targets, index):
    """Example 0 has no term that counts, nor have 8 and 9, the last batch; most have some."""
    targets = targets.clone()
    rows = targets.view(N, -1)
    rows[0], rows[8:] = index, index
    for example in range(1, 8):
        rows[example, : example % rows.shape[1]] = index
    return targets


class Sequences(nn.Module):
    """Token numbers (N, T) or vectors (N, T, d) to logits (N, T, C), a token at a time or mixed."""

    def __init__(self, act, norm=None, *, sequence_first=False, tied=False, bias=True):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 3)
        self.mix = nn.Linear(3, 4)
        self.norm = norm or nn.Identity()
        self.act, self.sequence_first, self.tied = act, sequence_first, tied
        self.head = None if tied else nn.Linear(4, C, bias=bias)
        if tied:
            self.mix = nn.Linear(3, 3)

    def forward(self, X):
        h = self.embedding(X)
        if self.sequence_first:
            h = h.transpose(0, 1)
        time = 0 if self.sequence_first else 1
        h = h + h.cumsum(time) / 2  # later tokens see earlier ones
        h = self.act(self.norm(self.mix(h)))
        f = h @ self.embedding.weight[:C].T if self.tied else self.head(h)
        return f.transpose(0, 1) if self.sequence_first else f


class Wrapped(nn.Module):
    """A model that gives a dict or an object with `logits`."""

    def __init__(self, model, wrap):
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, X):
        return self.wrap(logits=self.model(X), hidden=None)


def mlp(width, act, norm=None):
    hidden = [nn.Linear(3, 4), *([norm] if norm else []), act, nn.Linear(4, width)]
    return nn.Sequential(*hidden)


def pixels(act, norm=None, kernel=1):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), *([norm] if norm else []), act,
        nn.Conv2d(4, C, kernel, padding=kernel // 2),
    )  # fmt: skip


def batch_norm(norm):
    """With statistics that are not those of a fresh one."""
    norm.running_mean.copy_(normal(norm.num_features, seed=7))
    norm.running_var.copy_(normal(norm.num_features, seed=8).exp())
    return norm


VECTORS = normal(N, 3, seed=2)
CLASSES = integers(C, N)
SOFT = torch.softmax(normal(N, C, seed=3), 1)
TOKENS = integers(VOCABULARY, N, 4, seed=4)
NEXT = unevenly_ignored(integers(C, N, 4), -100)
IMAGES = normal(N, 1, 3, 2, seed=5)
MASKS = unevenly_ignored(integers(C, N, 3, 2), 255)
NUMBERS = normal(N, D, seed=6)
LABELS = integers(2, N, D)
HARD, WEIGHTED = Classification(), Classification(class_weights=WEIGHTS)
SMOOTH = Classification(label_smoothing=0.2, class_weights=WEIGHTS)
PIXELS = Segmentation(ignore_index=255)

CASES = {
    "classes, relu": lambda: (HARD, mlp(C, nn.ReLU()), VECTORS, CLASSES),
    "classes, tanh": lambda: (HARD, mlp(C, nn.Tanh()), VECTORS, CLASSES),
    "classes, batch norm": lambda: (
        HARD, mlp(C, nn.ReLU(), batch_norm(nn.BatchNorm1d(4))), VECTORS, CLASSES
    ),
    "classes weighted and smoothed, relu": lambda: (SMOOTH, mlp(C, nn.ReLU()), VECTORS, CLASSES),
    "classes weighted, batch norm, tanh": lambda: (
        WEIGHTED, mlp(C, nn.Tanh(), batch_norm(nn.BatchNorm1d(4))), VECTORS, CLASSES
    ),
    "probabilities weighted, layer norm": lambda: (
        WEIGHTED, mlp(C, nn.ReLU(), nn.LayerNorm(4)), VECTORS, SOFT
    ),
    "probabilities, in a dict, relu": lambda: (
        HARD, Wrapped(mlp(C, nn.ReLU()), dict), VECTORS, SOFT
    ),
    "tokens, relu": lambda: (Tokens(), Sequences(nn.ReLU()), TOKENS, NEXT),
    "tokens, tanh": lambda: (Tokens(), Sequences(nn.Tanh()), TOKENS, NEXT),
    "tokens, layer norm, sequence first": lambda: (
        Tokens(), Sequences(nn.ReLU(), nn.LayerNorm(4), sequence_first=True), TOKENS, NEXT
    ),
    "tokens weighted, relu, sequence first, in an object": lambda: (
        Tokens(class_weights=WEIGHTS),
        Wrapped(Sequences(nn.ReLU(), sequence_first=True), SimpleNamespace), TOKENS, NEXT,
    ),
    "tokens weighted, layer norm": lambda: (
        Tokens(class_weights=WEIGHTS), Sequences(nn.GELU(), nn.LayerNorm(4)), TOKENS, NEXT
    ),
    "tokens, tied": lambda: (Tokens(), Sequences(nn.ReLU(), tied=True), TOKENS, NEXT),
    "tokens, one of each, sequence first, relu": lambda: (
        Tokens(), Sequences(nn.ReLU(), sequence_first=True), TOKENS[:, :1],
        unevenly_ignored(NEXT[:, :1].clamp(min=0), -100).index_fill(0, torch.arange(1, 8), 1),
    ),
    "tokens, one of each, layer norm, no bias": lambda: (
        Tokens(), Sequences(nn.Tanh(), nn.LayerNorm(4), bias=False), TOKENS[:, 1:2],
        unevenly_ignored(integers(C, N, 2), -100)[:, 1:],
    ),
    "pixels, relu": lambda: (PIXELS, pixels(nn.ReLU()), IMAGES, MASKS),
    "pixels weighted, tanh": lambda: (
        Segmentation(ignore_index=255, class_weights=WEIGHTS), pixels(nn.Tanh()), IMAGES, MASKS
    ),
    "pixels, wide kernel, batch norm": lambda: (
        PIXELS, pixels(nn.ReLU(), batch_norm(nn.BatchNorm2d(4)), kernel=3), IMAGES, MASKS
    ),
    "pixels smoothed, group norm, tanh": lambda: (
        Segmentation(ignore_index=255, label_smoothing=0.1, class_weights=WEIGHTS),
        pixels(nn.Tanh(), nn.GroupNorm(2, 4)), IMAGES, MASKS,
    ),
    "numbers, relu": lambda: (Regression(), mlp(D, nn.ReLU()), VECTORS, NUMBERS),
    "numbers, tanh": lambda: (Regression(), mlp(D, nn.Tanh()), VECTORS, NUMBERS),
    "numbers, tanh, layer norm": lambda: (
        Regression(), mlp(D, nn.Tanh(), nn.LayerNorm(4)), VECTORS, NUMBERS
    ),
    "one number, relu": lambda: (Regression(), mlp(1, nn.ReLU()), VECTORS, NUMBERS[:, :1]),
    "images of numbers, relu": lambda: (
        Regression(), pixels(nn.ReLU()), IMAGES, normal(N, C, 3, 2, seed=9)
    ),
    "labels, relu": lambda: (Multilabel(), mlp(D, nn.ReLU()), VECTORS, LABELS),
    "labels, tanh": lambda: (Multilabel(), mlp(D, nn.Tanh()), VECTORS, LABELS),
    "labels between, tanh, layer norm": lambda: (
        Multilabel(), mlp(D, nn.Tanh(), nn.LayerNorm(4)), VECTORS, torch.sigmoid(NUMBERS)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model with data for a task."""

    task: Task
    model: nn.Module
    X: torch.Tensor
    y: torch.Tensor

    @property
    def split(self):
        return TensorSplit(self.X, self.y, Preprocess(), torch.float64, self.task)

    def data(self, batch_size, **ranks):
        objective = Objective(self.model, trainable(self.model), self.task)
        return DataLoss.counted(objective, lambda: self.split.batches(batch_size))


@functools.cache
def case_of(name):
    """A case by its name, its model in eval mode and with weights that its seed gives."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task, model, X, y = CASES[name]()
        model = model.double().eval()
        for p in model.parameters():  # biases and scales that are 0 or 1 hide mistakes
            p.data.add_(0.3 * torch.randn_like(p))
    return Case(task, model, X, y)


def mean_in_words(task, outputs, targets):
    """The mean loss over the terms that count, one after another."""
    losses = []
    if isinstance(task, (Regression, Multilabel)):
        for f, y in zip(outputs.flatten(1), targets.double().flatten(1), strict=True):
            total = 0.0
            for number, wanted in zip(f, y, strict=True):
                if isinstance(task, Regression):
                    total = total + (number - wanted) ** 2
                else:
                    p = 1 / (1 + torch.exp(-number))
                    total = total - wanted * torch.log(p) - (1 - wanted) * torch.log(1 - p)
            losses.append(total / len(y))
        return sum(losses) / len(losses)
    where = {"classification": 1, "tokens": 2, "segmentation": 1}[task.name]
    rows = outputs.movedim(where, -1).reshape(-1, outputs.shape[where])
    soft = targets.is_floating_point()
    for f, y in zip(rows, targets if soft else targets.flatten(), strict=True):
        if not soft and int(y) == getattr(task, "ignore_index", None):
            continue
        log_p = f - torch.log(torch.exp(f).sum())
        t = y if soft else F.one_hot(y, len(f)).double()
        t = (1 - task.label_smoothing) * t + task.label_smoothing / len(f)
        w = torch.tensor(task.class_weights or [1.0] * len(f), dtype=torch.float64)
        losses.append(-(t * w * log_p).sum())
    return sum(losses) / len(losses)


def outputs_at(case, flat):
    """The outputs of the unmodified model for all examples at once."""
    params = dict(case.model.named_parameters())
    parts = flat.split([p.numel() for p in params.values()])
    values = {n: v.view_as(p) for (n, p), v in zip(params.items(), parts, strict=True)}
    outputs = functional_call(case.model, values, (case.X,))
    if isinstance(outputs, torch.Tensor):
        return outputs
    return outputs["logits"] if isinstance(outputs, dict) else outputs.logits


def flat_params(case):
    return torch.cat([p.detach().flatten() for p in case.model.parameters()])


@functools.cache
def dense(name):
    """H and G of the mean over the whole data set, from nothing but the loss in words."""
    case = case_of(name)
    w = flat_params(case)
    H = torch.autograd.functional.hessian(
        lambda flat: mean_in_words(case.task, outputs_at(case, flat), case.y), w
    )
    at = outputs_at(case, w).detach()
    J = torch.autograd.functional.jacobian(lambda flat: outputs_at(case, flat), w)
    A = torch.autograd.functional.hessian(lambda f: mean_in_words(case.task, f, case.y), at)
    size = at.numel()
    J, A = J.reshape(size, -1), A.reshape(size, size)
    return {"hessian": H, "ggn": J.T @ A @ J}


def block_traces(name, curvature):
    """The traces of the diagonal blocks by parameter name."""
    case, begin, found = case_of(name), 0, {}
    for each, p in case.model.named_parameters():
        end = begin + p.numel()
        found[each] = dense(name)[curvature].diagonal()[begin:end].sum().item()
        begin = end
    return found


def trace(name, curvature):
    return math.fsum(block_traces(name, curvature).values())
