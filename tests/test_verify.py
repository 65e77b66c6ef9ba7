"""`hesstrace verify`: every planted fault is found, no clean model accused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torchvision import models

from hesstrace_cli.analysis.verify import _rows
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.curvature.checks.differences import over
from hesstrace_cli.curvature.checks.verdicts import GOOD, compared, compared_gradients
from hesstrace_cli.curvature.objective import Objective
from tests.conftest import invoke

# Written apart from the engine: models of 8x8 images, (N, 1, 8, 8).
FILE = '''
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class Base(nn.Module):
    def __init__(self, inputs=64):
        super().__init__()
        self.inner, self.head = nn.Linear(inputs, 6), nn.Linear(6, 10)

    def forward(self, X):
        return self.head(self.middle(self.inner(X.flatten(1))))


class HiddenNorm(Base):
    """A batch norm that no module shows."""

    def middle(self, h):
        return torch.tanh(F.batch_norm(h, None, None, training=True))


class Weighted(Base):
    def __init__(self):
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(self.inner)

    def middle(self, h):
        return torch.tanh(h)


class Flash(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(8, 24), nn.Linear(64, 10)

    def forward(self, X):
        q, k, v = self.mix(X[:, 0]).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1))


class Bumped(torch.autograd.Function):
    """tanh, whose backward is right and whose second derivative is not."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.detach().tanh().square())


class WrongSecond(Base):
    def middle(self, h):
        return Bumped.apply(h)


class Missing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh().square())


class Activation(nn.Module):
    def forward(self, h):
        return Missing.apply(h)


class NoSecond(Base):
    def __init__(self):
        super().__init__()
        self.act = Activation()

    def middle(self, h):
        return self.act(h)


class Stale(torch.autograd.Function):
    """Overwrites in its backward what a second backward needs."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        slope = 1 - y * y
        result = g * slope
        with torch.no_grad():
            slope.add_(1)
        return result


class InPlace(Base):
    def middle(self, h):
        return Stale.apply(h)


class Dropping(Base):
    def middle(self, h):
        return F.dropout(h, 0.5, training=True)


class DroppingAndWrong(Base):
    """Wrong in training only, behind Dropout."""

    def middle(self, h):
        return F.dropout(Bumped.apply(h) if self.training else h.tanh(), 0.3, self.training)


class AlmostRight(Base):
    """A small branch of the derivative is missing."""

    def middle(self, h):
        return h.tanh() + 0.02 * Bumped.apply(h)


class Tanh(Stale):
    """All right, but without a rule for forward mode."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class ReverseOnly(Base):
    def middle(self, h):
        return Tanh.apply(h)


class Spoilt(Base):
    """The first backward fails already."""

    def middle(self, h):
        h = h.sigmoid()
        return h.mul_(2)


class Elsewhere(Base):
    def middle(self, h):
        return torch.tanh(h) * float(np.random.rand())


class NotANumber(Base):
    def middle(self, h):
        return h.tanh() + (h - h).abs().pow(1.5)


class Dropped(Base):
    def middle(self, h):
        return F.dropout(F.gelu(h), 0.3, self.training)


class Clean(Base):
    def middle(self, h):
        return F.silu(h)
'''


def run(tmp_path, model, *flags):
    if ":" not in model and model[0].isupper():
        (tmp_path / "planted.py").write_text(FILE)
        model = f"{tmp_path}/planted.py:{model}"
    arguments = ["verify", "--model", model, "--json", "-", *flags]
    result = invoke(*arguments)
    assert result.exit_code in (0, 5), result.output
    rows = json.loads(result.stdout)["rows"]
    return result.exit_code, {row["check"]: (row["verdict"], row["detail"]) for row in rows}


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("Clean", []), ("mlp", []), ("small-cnn", ["--model-arg", "width=4"]),
        ("small-cnn", ["--model-arg", "norm=none", "--model-arg", "width=4"]),
        ("small-cnn", ["--model-arg", "norm=group", "--model-arg", "activation=gelu"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", ["0", "1"])
def test_no_clean_model_is_accused(model, flags, seed, tmp_path):
    code, rows = run(tmp_path, model, *flags, "--seed", seed)
    assert code == 0
    assert {verdict for verdict, _ in rows.values()} <= {
        "right",
        "replaced",
        "yes",
        "no",
        "measured",
    }
    for name in ("SEHT-H of tr(G)", "SEHT-D of tr(G)"):
        verdict, detail = rows[f"train: a step with {name}, float32, batches of 8"]
        assert verdict == "measured"
        time, memory = map(float, re.findall(r"([\d.]+) times", detail))
        assert time > 0
        assert memory > 1  # the penalty's graph comes on top
    assert sum(v == "right" for name, (v, _) in rows.items() if "norm rule" not in name) == 20
    piecewise = model == "mlp" or (model == "small-cnn" and "activation=gelu" not in flags)
    assert rows["eval: tr(H) = tr(G)"][0] == ("yes" if piecewise else "no")


@pytest.mark.parametrize(
    ("model", "operation"),
    [
        ("HiddenNorm", "batch_norm in the model"),
        ("Weighted", "_weight_norm"),
        ("Flash", "scaled_dot_product_attention"),
    ],
)
def test_what_the_engine_makes_right_is_replaced(model, operation, tmp_path):
    code, rows = run(tmp_path, model)
    assert code == 0
    replaced = [check for check, (verdict, _) in rows.items() if verdict == "replaced"]
    assert any(operation in check for check in replaced)
    assert sum(v == "right" for name, (v, _) in rows.items() if "norm rule" not in name) == 20


def test_what_needs_another_mode_or_fixed_masks_is_not_accused(tmp_path):
    code, rows = run(tmp_path, "ReverseOnly")
    assert code == 0
    verdict, detail = rows["train: penalty on tr(H), forward mode"]
    assert (verdict, "reverse mode is taken" in detail) == ("no", True)
    code, rows = run(tmp_path, "Dropped")
    assert code == 0
    assert rows["train: results repeat"][0] == "no"
    assert rows["train: penalty on tr(H), taylor mode, gradient"][0] == "right"


def test_units_on_their_kinks_are_no_obstacle(tmp_path):
    """Zero biases and zero inputs put every first unit at its kink, where nothing can be told."""
    zeros = np.zeros((60, 1, 8, 8), dtype=np.float32)
    labels = np.arange(60) % 10
    np.savez(tmp_path / "z.npz", x_train=zeros, y_train=labels, x_test=zeros, y_test=labels)
    flags = ("--dataset", tmp_path / "z.npz", "--model-arg", "norm=none", "--model-arg", "width=4")
    code, rows = run(tmp_path, "small-cnn", *flags)
    assert code == 0
    assert "unsettled" not in {verdict for verdict, _ in rows.values()}


@pytest.mark.parametrize(
    ("model", "check", "verdict"),
    [
        ("DroppingAndWrong", "train: penalty on tr(H), reverse mode, value", "wrong"),
        ("AlmostRight", "eval: penalty on tr(H), reverse mode, value", "wrong"),
        ("Spoilt", "train: the model's own gradient", "refused"),
        ("Elsewhere", "train: results repeat", "refused"),
        ("NotANumber", "eval: penalty on tr(H), reverse mode, value", "wrong"),
    ],
)
def test_faults_that_hide(model, check, verdict, tmp_path):
    code, rows = run(tmp_path, model)
    assert code == 5
    assert rows[check][0] == verdict, rows


def test_data_that_does_not_repeat(tmp_path):
    (tmp_path / "data.py").write_text(
        "import torch\n"
        "from torch.utils.data import Dataset\n"
        "class Noisy(Dataset):\n"
        "    def __len__(self): return 40\n"
        "    def __getitem__(self, i): return torch.randn(1, 8, 8), i % 10\n"
        "def make(): return Noisy(), Noisy()\n"
    )
    code, rows = run(tmp_path, "mlp", "--dataset", f"{tmp_path}/data.py:make")
    assert code == 5
    assert rows["data: results repeat"][0] == "refused"
    assert run(tmp_path, "mlp")[1]["data: results repeat"][0] == "yes"


@pytest.mark.parametrize(
    ("value", "truths", "verdict"),
    [
        (1.0, [1.00001, 3.0, 9.0], "right"),
        (1.001, [1.0, 1.0, 1.0], "wrong"),
        (1.0, [2.0, 4.0, 8.0], "unsettled"),
        (1.0, [2.0, 4.0, 4.0], "wrong"),
        (float("nan"), [2.0, 4.0, 8.0], "wrong"),
    ],
)
def test_verdicts(value, truths, verdict):
    assert compared("x", value, truths).verdict == verdict


def test_where_there_is_no_difference_it_says_why():
    def fails(step):
        raise RuntimeError(f"no value at {step}")

    gradient = {"w": torch.ones(2)}
    for row in (
        compared("x", 1.0, over((0.1, 0.2), fails)),
        compared_gradients("x", gradient, over((0.1, 0.2), fails), gradient, 1e-3),
    ):
        assert row.verdict == "unsettled"
        assert row.detail == "the model fails at all weights beside its own: no value at 0.1"


@pytest.mark.parametrize(
    ("model", "verdict"),
    [("WrongSecond", "wrong"), ("InPlace", "refused"), ("NoSecond", "refused")],
)
def test_planted_faults_are_found(model, verdict, tmp_path):
    code, rows = run(tmp_path, model)
    assert code == 5
    found = {check: detail for check, (v, detail) in rows.items() if v == verdict}
    assert any("penalty on tr(H)" in check for check in found), rows
    assert any("tr(G)" in check for check in found), rows
    if model == "NoSecond":
        assert any("Activation" in detail for detail in found.values())


def test_a_model_that_does_not_repeat(tmp_path):
    code, rows = run(tmp_path, "Dropping")
    assert code == 5
    assert rows["eval: results repeat"][0] == "refused"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "resnet18",
        "regnet_y_400mf", "efficientnet_b0", "convnext_tiny", "densenet121", "swin_t",
    ],
)  # fmt: skip
def test_no_model_of_torchvisions_is_accused(name, mode):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.get_model(name, num_classes=4).train(mode == "train")
        size = 64 if name == "squeezenet1_1" else 32
        X, y = torch.randn(16, 3, size, size), torch.arange(16) % 4
    rows = list(_rows(Objective(model, trainable(model)), X, y, mode, 0, first=4))
    assert [row for row in rows if row.verdict not in GOOD] == []
