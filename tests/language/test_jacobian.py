"""The Jacobian of a language model in what its embedding gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.regularizers import Part, Step
from hesstrace_cli.regularizers.jacobian import JacobianPenalty
from hesstrace_cli.tasks import Tokens
from tests.conftest import assert_one_line_error, invoke, make_run
from tests.language.cases import T, V, model_of, numbers


class Read(nn.Module):
    """The same model on embedded tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.model.embedding = nn.Identity()

    def forward(self, embedded):
        return self.model(embedded)


@pytest.mark.parametrize("name", ["lstm", "gpt"])
def test_a_sample_has_the_mean_of_the_dense_jacobian(name):
    model = copy.deepcopy(model_of(name)).train()
    X, y = numbers(2 * T).view(2, T), numbers(2 * T, seed=1).view(2, T)
    with sdpa_kernel(SDPBackend.MATH):
        J = torch.autograd.functional.jacobian(Read(model), model.embedding(X).detach())
    truth = sum(J[n, :, :, n].square().sum().item() for n in range(2)) / 2 / 2
    penalty = JacobianPenalty(0.3, TrainConfig())
    objective = penalty.attach(Objective(model, trainable(model), Tokens()))
    values = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        X, y = penalty.transform(X, y, generator)
        with differentiable_ops(order=2):
            outputs = model(X)
        part = Part(torch.arange(2), 2, 1.0, 2 * T, 1.0)
        loss = objective.task.loss(outputs, y)
        step = Step(objective, X, y, outputs, loss, part, 0, 0.0, generator, generator.get_state())
        term = penalty.term(step)
        assert term.weight == 0.3
        values.append(term.value.detach())
    values = torch.stack(values)
    assert abs(values.mean() - truth) < 4 * values.std() / 300**0.5
    assert values.std() < 2 * truth
    (grad,) = torch.autograd.grad(term.value, model.decoder.weight)
    assert grad.abs().sum() > 0
    assert J.shape[1:3] == (T, V)


PLAIN = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_classes, num_classes))

    def forward(self, X):
        return self.table[X]
"""


def test_indices_that_no_embedding_reads(tmp_path):
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text("a b a c " * 18)
    (tmp_path / "plain.py").write_text(PLAIN)
    flags = ["train", "--dataset", f"text:{tmp_path}", "--seq-len", "4", "--epochs", "1"]
    own = ["--model", "plain.py:Plain", "--reg", "jacobian", "--out", "r"]
    assert_one_line_error(invoke(*flags, *own), 2, "which no torch.nn.Embedding of the model reads")
    run = make_run(
        tmp_path / "s", dataset=f"text:{tmp_path}", seq_len=4, model="gpt", model_arg={"width": 8},
        reg="jacobian,trace", accumulate=2, train_examples=None, batch_size=4,
    )  # fmt: skip
    assert next(run.advance()).step == 1
