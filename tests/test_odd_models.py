"""Models that are built, wrapped or shaped in unusual ways, from training to their trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hesstrace_cli.models import build_model
from tests.conftest import TINY, assert_one_line_error, invoke

FACTORIES = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.LazyLinear(10))

def wrapped():
    return nn.DataParallel(plain())

def above(X):
    X = X.flatten(1)
    return X - X.amin(1, keepdim=True)

class Root(nn.Module):
    \"\"\"The slope of sqrt is infinite where a pixel is the darkest.\"\"\"
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, X):
        return self.head(torch.sqrt(above(X)))

class Steep(Root):
    \"\"\"The slope of x^1.5 is 0 at 0, its curvature infinite.\"\"\"
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(64))

    def forward(self, X):
        return self.head((above(X) * self.gain) ** 1.5)

def picky():
    return nn.Sequential(nn.LazyLinear(6), nn.Linear(7, 10))
"""


@pytest.fixture(autouse=True)
def factories(tmp_path):
    (tmp_path / "nets.py").write_text(FACTORIES)


def train(name, *arguments):
    data = ["--dataset", "digits", "--epochs", "1", "--train-examples", "100", "--out", name]
    result = invoke("train", "--model", f"nets.py:{name}", *data, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(Path(name, "summary.json").read_text())


def estimate(name, *arguments):
    result = invoke("estimate-trace", f"{name}/last.pt", "--model", f"nets.py:{name}",
                    "--num-examples", "40", "--json", "out.json", *arguments)  # fmt: skip
    assert result.exit_code == 0, result.output
    return json.loads(Path("out.json").read_text())


@pytest.mark.parametrize("name", ["lazy", "wrapped"])
def test_from_training_to_the_trace(name):
    summary = train(name, "--reg", "trace", "--lambda", "0.01")
    assert summary["trace"]["trace"] > 0
    weights = torch.load(f"{name}/last.pt", weights_only=True)["state_dict"]
    assert not any(key.startswith("module.") for key in weights)
    assert estimate(name)["method"] == "exact"


def test_lazy_weights_depend_on_the_seed_alone():
    def weights(seed):
        model = build_model("nets.py:lazy", num_classes=10, in_shape=(1, 8, 8), model_args={},
                            seed=seed)  # fmt: skip
        assert model.training
        return model[1].weight

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = weights(0), weights(0), weights(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_lazy_modules_that_do_not_fit():
    result = invoke("train", *TINY[:4], "--model", "nets.py:picky")
    assert_one_line_error(result, 4, "lazy modules", "(1, 8, 8)")


def test_a_slope_that_is_infinite_at_the_data_leaves_the_summary():
    summary = train("Root")
    assert summary["input_jacobian"] is None
    assert summary["trace"]["trace"] > 0
    report = estimate("Root", "--report")["report"]
    assert report["input_jacobian"] is report["input_jacobian_stderr"] is None


def test_a_curvature_that_is_infinite_leaves_the_summary():
    summary = train("Steep", "--top-eigenvalue")
    assert summary["train_loss"] > 0
    assert summary["top_eigenvalue"] is summary["trace"]["trace"] is None
    assert "nan" in summary["trace"]["reason"]
    result = invoke("estimate-trace", "Steep/last.pt", "--model", "nets.py:Steep",
                    "--num-examples", "40")  # fmt: skip
    assert_one_line_error(result, 5, "nan")


def test_a_wrapped_model_is_the_bare_one():
    model = build_model("nets.py:wrapped", num_classes=10, in_shape=(1, 8, 8), model_args={},
                        seed=0)  # fmt: skip
    assert isinstance(model, nn.Sequential)
