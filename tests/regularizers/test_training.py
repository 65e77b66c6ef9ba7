"""What training with each regularizer does, on real digits: the sign is right."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.errors import Stopped
from hesstrace_cli.regularizers.grad_norm_fd import FiniteDifferenceGradientNorm
from hesstrace_cli.regularizers.jacobian import jacobian_sample
from hesstrace_cli.tasks import Classification
from hesstrace_cli.training.trainer import Trainer
from tests.conftest import make_run, train_to_end


def outputs(run):
    run.trainer.model.eval()
    X, y = next(run.trainer.data.train.batches(1000))
    X = X.requires_grad_()
    return X, y, run.trainer.model(X)


def entropy(run):
    _, y, logits = outputs(run)
    return Classification().entropy(logits, y).item()


def jacobian(run):
    X, _, logits = outputs(run)
    g = torch.Generator().manual_seed(0)
    return sum(jacobian_sample(logits, [X], g).item() for _ in range(20)) / 20


def gradient_norm(run):
    _, y, logits = outputs(run)
    loss = F.cross_entropy(logits, y)
    grads = torch.autograd.grad(loss, list(run.trainer.model.parameters()))
    return torch.nn.utils.get_total_norm(grads).item()


def trace(run):
    return run.finish()["trace"]["trace"]


def train_loss(run):
    _, y, logits = outputs(run)
    return F.cross_entropy(logits, y).item()


def loss_while_training(run):
    """Of the last epoch, with the dropout of its steps."""
    return json.loads(run.folder.metrics.read_text().splitlines()[-1])["train_loss"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train_to_end(tmp_path_factory.mktemp("plain") / "r", **SETTINGS)


SETTINGS = {"epochs": 8, "model_arg": {"width": 8, "norm": "none"}, "warmup": 0.0}


@pytest.mark.parametrize(
    ("reg", "measure", "rises"),
    [
        ("confidence=0.5", entropy, True),
        ("label-smoothing=0.3", entropy, True),
        ("mixup=1", entropy, True),
        ("jacobian=0.1", jacobian, False),
        ("grad-norm=0.1", gradient_norm, False),
        ("trace=0.01", trace, False),
        ("cutout=4", train_loss, True),
        ("sam=0.1", trace, False),
        ("nso=0.1", trace, False),
        ("asam=1", trace, False),
        ("grad-norm-fd=0.1", gradient_norm, False),
    ],
)
def test_it_moves_what_it_should(reg, measure, rises, plain, tmp_path):
    run = train_to_end(tmp_path / "r", reg=reg, **SETTINGS)
    assert (measure(run) > measure(plain)) == rises


def test_dropout_raises_the_loss_it_trains_on(tmp_path):
    """On a network that learns: at chance there is nothing to lose."""
    losses = [
        loss_while_training(train_to_end(tmp_path / reg, reg=reg, epochs=8))
        for reg in ("none", "dropout=0.5")
    ]
    assert losses[0] < losses[1] < 2


def test_all_at_once_and_resumed(tmp_path):
    reg = "trace=0.003,jacobian=0.01,confidence=0.1,grad-norm=0.01,label-smoothing=0.1,cutout=2,"
    reg += "mixup=0.2,dropout=0.1,sam=0.05,grad-norm-fd=0.01,ema=0.9"
    whole = train_to_end(tmp_path / "a", reg=reg)
    half = make_run(tmp_path / "b", reg=reg)
    with pytest.raises(Stopped):
        for _ in half.advance(lambda: 15 if half.trainer.step == 3 else None):
            pass
    rest = train_to_end(tmp_path / "b", reg=reg, resume=True)
    for key, value in whole.trainer.model.state_dict().items():
        assert torch.equal(value, rest.trainer.model.state_dict()[key])


def test_a_users_own(tmp_path, plain):
    file = tmp_path / "mine.py"
    file.write_text(
        "from hesstrace_cli.regularizers import Regularizer, Term\n"
        "class LogitNorm(Regularizer):\n"
        "    def term(self, step):\n"
        "        return Term(self.strength, step.logits.square().sum(1).mean())\n"
    )
    mine = train_to_end(tmp_path / "b", reg=f"{file}:LogitNorm=0.1,trace=0.001", **SETTINGS)
    norms = [outputs(run)[2].square().mean() for run in (mine, plain)]
    assert norms[0] < norms[1] / 2


def test_a_difference_is_of_one_function_where_the_model_drops(monkeypatch):
    """With other masks at w + epsilon g it would be theirs, over epsilon."""
    found = []
    term = FiniteDifferenceGradientNorm.term

    def spied(self, step):
        grad = gradient(step.loss, step.objective.params).values()
        found.append((term(self, step).value.item(), sum(g.square().sum().item() for g in grad)))

    monkeypatch.setattr(FiniteDifferenceGradientNorm, "term", spied)
    settings = {"train_examples": 100, "model": "mlp", "fd_step": 0.01}
    trainer = Trainer.of(TrainConfig(**settings, reg=["dropout=0.5,grad-norm-fd=0.1"]))
    for _ in itertools.islice(trainer.advance(), 3):
        pass
    assert len(found) == 3
    for value, squared in found:
        assert value == pytest.approx(squared, rel=0.05)
