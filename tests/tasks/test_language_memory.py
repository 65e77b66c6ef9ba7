"""Traces of language models hold no more over all words than a plain step does."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hesstrace_cli import TracePenalty, differentiable
from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.tasks import Tokens

V, N, T, WIDTH = 500, 32, 12, 8


class OverWords(TorchDispatchMode):
    """The bytes of living tensors that have a number for each word of some example's tokens.

    Attributes:
        most: At any time.
    """

    def __init__(self):
        super().__init__()
        self.now, self.most, self._seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._count(each.untyped_storage())
        return result

    def _count(self, storage):
        size, key = storage.nbytes(), storage._cdata
        if size < 4 * T * V or key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self._seen.discard(key)
        self.now -= size


class Model(nn.Module):
    def __init__(self, *, tied):
        super().__init__()
        self.table, self.cells = nn.Embedding(V, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, V)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, X):
        return self.head(self.cells(self.table(X))[0])


X, Y = (torch.randint(V, (N, T), generator=torch.Generator().manual_seed(s)) for s in (0, 1))


def most_over_words(work):
    with OverWords() as count:
        work()
    return count.most


def plain_step(model):
    outputs = model(X)
    Tokens().loss(outputs, Y).backward()


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("tied", [False, True])
def test_of_an_estimate(tied, curvature, monkeypatch):
    monkeypatch.setattr("hesstrace_cli.curvature.per_example.head.PART", 2 * T * V)
    monkeypatch.setattr("hesstrace_cli.curvature.per_example.independence.PART", 2 * T * V)
    model = Model(tied=tied)
    split = TensorSplit(X, Y, Preprocess(), torch.float32, Tokens())
    config = EstimateConfig(batch_size=N, curvature=curvature, num_probes=2)
    found = []
    plain = most_over_words(lambda: plain_step(model))
    ours = most_over_words(lambda: found.append(estimate(model, split, config)))
    assert found[0].method == ("signs" if curvature == "ggn" else "signs+hutchinson")
    assert ours <= plain, (ours, plain)
    assert plain <= 4.5 * 4 * X.numel() * V  # logits, log p, and the gradients of both


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_penalised_step(tied, monkeypatch):
    """It keeps the signs, a byte each, and has one gradient more at its peak."""
    monkeypatch.setattr("hesstrace_cli.curvature.per_example.head.PART", 2 * T * V)
    model = Model(tied=tied)
    penalty = TracePenalty(
        model, 0.01, task=Tokens(), form="example", estimator="hutchinson", num_probes=1
    )

    def step():
        with differentiable():
            outputs = model(X)
        (Tokens().loss(outputs, Y) + penalty(outputs, Y)).backward()
        penalty.step()

    step()  # looks at the derivatives
    plain = most_over_words(lambda: plain_step(model))
    assert most_over_words(step) <= plain + (4 + 1) * X.numel() * V
