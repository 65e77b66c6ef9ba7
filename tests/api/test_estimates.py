"""Estimates of anyone's model on anyone's loader, and that they are those of the commands."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hesstrace_cli
from hesstrace_cli import estimate_trace, spectrum, verify
from hesstrace_cli.analysis.loading import load_checkpoint
from hesstrace_cli.api.models import apart
from hesstrace_cli.api.wording import as_arguments
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import ConfigError, DataError, ModelError
from tests.api.test_penalty import C, D, Small, Wrong, filled, normal
from tests.conftest import invoke
from tests.curvature import oracles

X, Y = normal(12, D, seed=1), torch.arange(12) % C
BATCHES = [(X[:5], Y[:5]), (X[5:10], Y[5:10]), (X[10:], Y[10:])]


def dense(model, curvature="hessian"):
    objective = Objective(model.eval(), trainable(model))
    matrix = oracles.dense_hessian(objective, X, Y) if curvature == "hessian" else (
        oracles.dense_ggn(objective, X)
    )  # fmt: skip
    return matrix.trace().item()


# -- the commands' own numbers


def test_the_command_prints_the_librarys_numbers(checkpoint):
    ran = invoke("estimate-trace", checkpoint, "--num-probes", 2, "--batch-size", 40, "--seed", 5,
                 "--method", "hutchinson", "--per-layer", "--json", "-")  # fmt: skip
    said = json.loads(ran.stdout)
    loaded = load_checkpoint(str(checkpoint), EstimateConfig(batch_size=40))
    batches = list(loaded.split.batches(40))
    found = estimate_trace(loaded.model, batches, method="hutchinson", num_probes=2, seed=5)
    assert found.value == said["trace"]
    assert found.stderr == said["stderr"]
    assert list(found.interval) == said["ci95"]
    assert found.passes == said["passes"]
    for layer in said["per_layer"]:
        assert found.per_layer[layer["name"]] == (layer["trace"], layer["stderr"])
    assert found.to_dict().items() <= {**said, "per_layer": found.to_dict()["per_layer"]}.items()
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_spectrum_is_the_commands(checkpoint):
    ran = invoke("spectrum", checkpoint, "--batch-size", 40, "--top", 2, "--steps", 6,
                 "--num-probes", 2, "--num-directions", 2, "--json", "-")  # fmt: skip
    said = json.loads(ran.stdout)
    loaded = load_checkpoint(str(checkpoint), EstimateConfig(batch_size=40))
    own = {name: loaded.run[name] for name in ("lr", "momentum", "weight_decay")}
    found = spectrum(
        loaded.model, list(loaded.split.batches(40)), top=2, steps=6, num_probes=2,
        num_directions=2, **own,
    )  # fmt: skip
    for key in ("eigenvalues", "density", "trace", "flatness", "loss", "num_terms"):
        assert found[key] == said[key], key
    assert found["stability"]["threshold"] == said["stability"]["threshold"]


# -- on loaders


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("data", [BATCHES, DataLoader(TensorDataset(X, Y), 5)], ids=["list", "DL"])
def test_it_is_the_dense_trace(data, curvature):
    model = filled(Small())
    found = estimate_trace(model, data, curvature=curvature, rtol=0.02)
    assert abs(found.value - dense(model, curvature)) <= 4 * found.stderr + 1e-9
    assert repr(found).startswith(f"TraceEstimate(value={found.value:.6g}, stderr=")
    assert "\n" not in repr(found)


def test_all_is_left_as_found():
    model = filled(nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Dropout(0.2),
                                 nn.Linear(4, C)))  # fmt: skip
    model[1].eval()
    F.cross_entropy(model(X), Y).backward()
    torch.manual_seed(1)
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    estimate_trace(model, BATCHES, num_probes=1)
    spectrum(model, BATCHES, top=1, steps=4, num_probes=1, num_directions=1)
    verify(model, X, Y)
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[0][name], tensor)
    for old, p in zip(before[1], model.parameters(), strict=True):
        assert torch.equal(old, p.grad)


def test_a_graph_recorded_before_stays_whole():
    """The weights are moved in double precision meanwhile, those of a copy."""
    model = filled(Small())
    loss = F.cross_entropy(model(X), Y)
    truth = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert apart(model) is not model
    estimate_trace(model, BATCHES)
    verify(model, X, Y)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), truth, strict=True):
        assert torch.equal(a, b)
    del loss
    assert apart(model) is model


def test_on_pass_is_told():
    told = []
    found = estimate_trace(
        filled(Small()), BATCHES, method="hutchinson", max_passes=3,
        on_pass=lambda passes, mean: told.append((passes, mean.value, mean.stderr)),
    )  # fmt: skip
    assert [each[0] for each in told] == [1, 2, 3]
    assert told[-1][1] == found.value


def test_compiled_models_are_taken_as_what_they_wrap():
    model = filled(Small())
    wrapped = torch.compile(model, backend="eager")
    assert estimate_trace(wrapped, BATCHES, seed=1).value == (
        estimate_trace(model, BATCHES, seed=1).value
    )


# -- dictionaries, as Hugging Face's models take them


class Causal(nn.Module):
    """Gives its own loss, of the next tokens, as such models do."""

    def __init__(self, shift=True, scale=1.0):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.shift, self.scale = shift, scale

    def forward(self, input_ids, attention_mask, labels=None):
        h = self.embedding(input_ids) * attention_mask[..., None]
        logits, loss = self.head(torch.tanh(h)), None
        if labels is not None:
            own, targets = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
            loss = self.scale * F.cross_entropy(own.flatten(0, 1), targets.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


IDS = torch.arange(30).reshape(6, 5) * 5 % 7
LABELS = IDS.clone()
LABELS[0, 3:] = -100
MASK = (IDS != 2).double()


def of_dicts(model, **more):
    batches = [
        {"input_ids": IDS[rows], "attention_mask": MASK[rows], "labels": LABELS[rows]}
        for rows in (slice(4), slice(4, None))
    ]
    return estimate_trace(model, batches, curvature="ggn", **more)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, X):
        return self.model(X, MASK if len(X) == 6 else MASK[:4] if len(X) == 4 else MASK[4:]).logits


@pytest.mark.parametrize("shift", [False, True])
def test_dict_batches_have_the_models_own_loss(shift):
    model = filled(Causal(shift))
    params = trainable(model)

    def loss(flat):
        parts = oracles.unflatten(flat, params)
        arguments = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
        return torch.func.functional_call(model, parts, (), arguments).loss

    truth = torch.func.hessian(loss)(oracles.flatten(params)).trace().item()
    batches = [{"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}]
    found = estimate_trace(model, batches, rtol=0.02)
    assert abs(found.value - truth) <= 4 * found.stderr + 1e-9
    assert estimate_trace(model, batches, method="exact", curvature="ggn").stderr == 0


def test_a_model_whose_own_loss_is_another_is_refused():
    with pytest.raises(ModelError, match="says that its loss on the first batch is"):
        of_dicts(filled(Causal(scale=2.0)))


def test_several_inputs_as_a_tuple():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, C)

        def forward(self, first, second):
            return self.layer(first * second)

    model = filled(Two())
    twice = normal(12, D, seed=9)
    found = estimate_trace(model, [((X, twice), Y)])
    assert found.value == pytest.approx(estimate_trace(model.layer, [(X * twice, Y)]).value)
    assert verify(model, (X, twice), Y)["right"]


@pytest.mark.parametrize(
    "around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_what_the_loop_around_has_on_changes_nothing(around):
    model = filled(Small()).float()
    single = X.float()
    data = [(single, Y)]
    expected = estimate_trace(model, data, num_probes=1).value
    with around():
        assert estimate_trace(model, data, num_probes=1).value == expected
        assert verify(model, single, Y)["right"]


# -- what is refused


class Augmented(TensorDataset):
    def __getitem__(self, index):
        X, y = super().__getitem__(index)
        return X + torch.rand(1), y


class Shorter:
    """Gives fewer batches each time."""

    def __init__(self):
        self.left = 4

    def __iter__(self):
        self.left -= 1
        return iter(BATCHES[: self.left])


WRONG_DATA = {
    "shuffled": (lambda: DataLoader(TensorDataset(X, Y), 5, shuffle=True), DataError, "shuffle"),
    "augmented": (lambda: DataLoader(Augmented(X, Y), 5), DataError, "augmentation"),
    "shorter": (Shorter, DataError, "another one in its second pass"),
    "an iterator": (lambda: iter(BATCHES), DataError, "read only once"),
    "none": (lambda: None, DataError, "a NoneType"),
    "empty": (list, DataError, "no batch"),
    "inputs alone": (lambda: [X], DataError, "a Tensor"),
    "three things": (lambda: [(X, Y, Y)], DataError, "a tuple of 3"),
    "no labels": (lambda: [{"input_ids": X}], DataError, "input_ids"),
    "other lengths": (lambda: [(X, Y[:3])], DataError, "12 inputs and 3 targets"),
    "strings": (lambda: [(X, ["a"] * 12)], DataError, "a list of 12"),
    "float labels": (lambda: [(X, Y.double())], DataError, "no task has targets of shape (12,)"),
    "one-hot": (lambda: [(X, F.one_hot(Y).double())], ConfigError, "multilabel"),
    "other inputs": (lambda: [(X[:, :1], Y)], ModelError, "does not take"),
    "too many classes": (lambda: [(X, Y + 9)], ModelError, "go up to 10"),
    "negative": (lambda: [(X, Y - 9)], DataError, "-9"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data_is_one_line(name):
    make, kind, word = WRONG_DATA[name]
    with pytest.raises(kind) as caught:
        estimate_trace(filled(Small()), make())
    assert word in str(caught.value)
    assert "--" not in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG_ARGUMENTS = {
    "method": {"method": "hutch"}, "curvature": {"curvature": "fisher"}, "rtol": {"rtol": -1},
    "num_probes": {"num_probes": 0}, "max_passes": {"max_passes": 0}, "task": {"task": "images"},
    "keep_prob": {"keep_prob": 0.0}, "dropout_scheme": {"dropout_scheme": "row"},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(name):
    with pytest.raises(ConfigError, match=f"^{name} is") as caught:
        estimate_trace(filled(Small()), BATCHES, **WRONG_ARGUMENTS[name])
    assert "--" not in str(caught.value)


def test_half_precision_is_refused():
    with pytest.raises(ModelError, match=r"torch.bfloat16.*\.float\(\)"):
        estimate_trace(filled(Small()).bfloat16(), [(X.bfloat16(), Y)])


def test_where_a_method_does_not_exist_the_error_names_the_argument():
    with pytest.raises(ConfigError, match="num_probes is 1, method=") as caught:
        estimate_trace(filled(Small()), BATCHES, method="hutch++", num_probes=1)
    assert "--" not in str(caught.value)


def test_flags_become_arguments():
    said = as_arguments("--keep-prob is 2; --method exact is right, --json FILE, or --reg trace=1")
    assert said == 'keep_prob is 2; method="exact" is right, json FILE, or reg trace=1'


def test_verify_finds_a_wrong_backward_and_leaves_a_right_model_alone():
    assert verify(filled(Small()), X, Y)["right"]
    found = verify(filled(Wrong()), X, Y)
    assert not found["right"]
    assert {"wrong"} <= {row["verdict"] for row in found["rows"]}


# -- the package


def test_help_imports_no_torch_and_first_use_warns_of_nothing():
    code = (
        "import sys, hesstrace_cli; dir(hesstrace_cli); hesstrace_cli.__all__; "
        "assert 'torch' not in sys.modules; hesstrace_cli.estimate_trace; "
        "assert 'torch' in sys.modules; import torch; model = torch.nn.Linear(2, 2); "
        "penalty = hesstrace_cli.TracePenalty(model, 1, curvature='hessian'); "
        "penalty.loss(torch.ones(4, 2), torch.tensor([0, 1, 0, 1])).backward()"
    )
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], check=True)


def test_the_package_says_that_it_is_typed():
    from importlib.resources import files

    assert (files(hesstrace_cli) / "py.typed").is_file()
