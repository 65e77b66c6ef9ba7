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

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(64, 6), nn.Linear(6, 10)

    def forward(self, X):
        return self.head(self.between(self.inner(X.flatten(1))))

    def between(self, h):
        return h.tanh()

class Empty(Plain):
    \"\"\"Parameters without an entry.\"\"\"
    def __init__(self):
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.ones(0, 5)), nn.Parameter(torch.ones(5, 0))

    def between(self, h):
        return h.tanh() + (self.rows.sum() + self.columns.sum())

class LookedUp(nn.Module):
    \"\"\"Of pixels in four shades.\"\"\"
    def __init__(self, sparse=False):
        super().__init__()
        self.shades, self.head = nn.Embedding(4, 3, sparse=sparse), nn.Linear(192, 10)

    def forward(self, X):
        shades = X.flatten(1).clamp(0, 1).mul(3.9).long()
        return self.head(self.shades(shades).flatten(1).tanh())

def sparse():
    return LookedUp(sparse=True)

class Expanded(Plain):
    \"\"\"All rows of a weight are the same memory.\"\"\"
    def __init__(self):
        super().__init__()
        self.inner.weight = nn.Parameter(torch.randn(1, 64).expand(6, 64))

class Bare(nn.Module):
    \"\"\"It has no __init__ of its own.\"\"\"
    def forward(self, X):
        return X.flatten(1)[:, :10]

class Overwritten(Plain):
    \"\"\"Its gradient needs what relu_ gave, which is overwritten.\"\"\"
    def between(self, h):
        return h.relu_().mul_(2)

class Bag(nn.Module):
    \"\"\"The backward of its sums of embeddings has none.\"\"\"
    def __init__(self):
        super().__init__()
        self.shades, self.head = nn.EmbeddingBag(4, 3, mode="sum"), nn.Linear(3, 10)

    def forward(self, X):
        shades = X.flatten(1).clamp(0, 1).mul(3.9).long()
        return self.head(self.shades(shades).tanh())

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


def weights_of(run):
    return torch.load(f"{run}/last.pt", weights_only=True)["state_dict"]


def checkpoint_of(name):
    """A run of the model that was, with the weights of this one."""
    train("Plain")
    content = torch.load("Plain/last.pt", weights_only=True)
    space = {}
    exec(FACTORIES, space)
    content["state_dict"] = space[name]().state_dict()
    torch.save(content, "x.pt")
    return ("x.pt", "--model", f"nets.py:{name}", "--num-examples", "20")


SHORT = (
    "--top", "1", "--steps", "3", "--num-probes", "1", "--max-products", "6",
    "--num-directions", "1",
)  # fmt: skip
LOOKS = {
    "auto": ("estimate-trace", "--per-layer", "--max-passes", "2"),
    "exact": ("estimate-trace", "--method", "exact", "--curvature", "ggn"),
    "hutch++": ("estimate-trace", "--method", "hutch++", "--max-passes", "1"),
    "spectrum": ("spectrum", *SHORT),
    "sensitivity": ("sensitivity", "--max-passes", "2", "--average-bits", "4"),
}  # fmt: skip
TRAINS = {"plain": "none", "jacobian": "jacobian", "gradient": "grad-norm", "trace": "trace"}


def test_parameters_without_an_entry_change_nothing():
    traces = [train(name)["trace"]["trace"] for name in ("Plain", "Empty")]
    assert traces[0] == pytest.approx(traces[1])
    plain, empty = weights_of("Plain"), weights_of("Empty")
    assert all(torch.equal(plain[key], empty[key]) for key in plain)
    penalties = ("--reg", "trace=0.01,jacobian", "--warmup", "0")
    for form in ("example", "batch"):
        train("Empty", *penalties, "--form", form, "--out", form)
    at = ("Empty/last.pt", "--model", "nets.py:Empty", "--num-examples", "20")
    for command, *flags in LOOKS.values():
        result = invoke(command, *at, *flags, "--json", "-")
        assert result.exit_code == 0, result.output
    assert [w["name"] for w in json.loads(result.stdout)["weights"]] == [
        "inner.weight", "head.weight",
    ]  # fmt: skip


@pytest.mark.parametrize("reg", ["none", "trace=0.01", "jacobian,grad-norm"])
def test_a_sparse_gradient_is_the_dense_one(reg):
    flags = ("--reg", reg, "--curvature", "hessian")
    for name in ("LookedUp", "sparse"):
        train(name, *flags)
    dense, sparse = weights_of("LookedUp"), weights_of("sparse")
    assert all(torch.equal(dense[key], sparse[key]) for key in dense)


@pytest.mark.parametrize("look", LOOKS)
def test_a_sparse_gradient_is_looked_at_as_the_dense_one(look):
    train("LookedUp")
    command, *flags = LOOKS[look]
    found = []
    for name in ("LookedUp", "sparse"):
        at = ("LookedUp/last.pt", "--model", f"nets.py:{name}", "--num-examples", "20")
        result = invoke(command, *at, *flags, "--json", "-")
        assert result.exit_code == 0, result.output
        record = json.loads(result.stdout)
        found.append({key: record[key] for key in record if key not in ("model", "seconds")})
    assert found[0] == found[1]
    result = invoke("verify", "--model", "nets.py:sparse")
    assert result.exit_code == 0, result.output


def test_entries_in_the_same_memory_are_refused():
    for command in (("train",), ("verify",), ("estimate-trace", *checkpoint_of("Expanded")[:1])):
        result = invoke(*command, "--model", "nets.py:Expanded")
        assert_one_line_error(result, 4, "inner.weight", "clone")


def test_a_module_without_an_init_of_its_own_is_built():
    assert_one_line_error(invoke("train", "--model", "nets.py:Bare"), 4, "no trainable parameter")


@pytest.mark.parametrize("look", LOOKS)
def test_a_model_without_a_gradient_is_not_looked_at(look):
    command, *flags = LOOKS[look]
    result = invoke(command, *checkpoint_of("Overwritten"), *flags)
    assert_one_line_error(result, 4, "no derivative", "inplace")


@pytest.mark.parametrize("reg", TRAINS.values(), ids=TRAINS)
def test_a_model_without_a_gradient_is_not_trained(reg):
    result = invoke("train", *TINY[:4], "--model", "nets.py:Overwritten", "--reg", reg)
    assert_one_line_error(result, 4, "inplace")


@pytest.mark.parametrize("look", [look for look in LOOKS if look != "exact"])
def test_a_model_without_a_second_derivative(look):
    command, *flags = LOOKS[look]
    result = invoke(command, *checkpoint_of("Bag"), *flags)
    assert_one_line_error(result, 4, "shades", "no derivative")
