"""Models in another precision."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.autodiff.casting import cast_model
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.data import load_data
from hesstrace_cli.errors import ModelError
from tests.conftest import assert_one_line_error, invoke

CPU = torch.device("cpu")


class Rotated(nn.Module):
    """A LLaMA's rotation of pairs of numbers, and tensors of other types."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(64, 8), nn.Linear(8, 10)
        angles = torch.arange(4) * 0.7
        self.register_buffer("freqs_cis", torch.polar(torch.ones(4), angles))
        self.register_buffer("order", torch.arange(8))
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool))

    def forward(self, X):
        pairs = torch.view_as_complex(self.inner(X.flatten(1)).reshape(-1, 4, 2))
        turned = torch.view_as_real(pairs * self.freqs_cis).flatten(1)
        return self.head(torch.where(self.mask, turned, turned)[:, self.order])


FACTORY = """
import torch
from torch import nn
from tests.test_casting import Rotated

def rotated():
    return Rotated()

class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 10, dtype=torch.complex64))

    def forward(self, X):
        return (X.flatten(1).to(self.weight.dtype) @ self.weight).abs()
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_tensor_is_cast_by_its_kind(dtype):
    model = cast_model(Rotated(), CPU, dtype)
    assert model.inner.weight.dtype == dtype
    assert model.freqs_cis.dtype == dtype.to_complex()
    torch.testing.assert_close(model.freqs_cis.angle().to(dtype), torch.arange(4).to(dtype) * 0.7)
    assert (model.order.dtype, model.mask.dtype) == (torch.int64, torch.bool)


def test_a_recurrent_layer_and_tied_weights_stay_what_they_are():
    model = nn.ModuleList([nn.LSTM(3, 4), nn.Linear(3, 3), nn.Linear(3, 3)])
    model[2].weight = model[1].weight
    cast_model(model, CPU, torch.float64)
    assert model[2].weight is model[1].weight
    assert model[0](torch.zeros(1, 1, 3, dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_checkpoint_with_complex_buffers_keeps_them(tmp_path, dtype):
    (tmp_path / "net.py").write_text(FACTORY)
    torch.manual_seed(0)
    model = Rotated()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    X, y = next(load_data(TrainConfig(), CPU).test.batches(1000))
    result = invoke(
        "estimate-trace", "net.pt", "--model", "net.py:rotated", "--dataset", "digits",
        "--split", "test", "--dtype", dtype, "--json", "out.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["method"] == "exact"
    loss = nn.functional.cross_entropy(model(X), y).item()
    assert record["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("command", ["train", "verify"])
def test_complex_parameters_are_refused(tmp_path, command):
    (tmp_path / "net.py").write_text(FACTORY)
    result = invoke(command, "--model", "net.py:Complex")
    assert_one_line_error(result, 4, "'weight' is complex", "view_as_complex")


def test_parameters_without_values_are_refused():
    with pytest.raises(ModelError, match="run the model once"):
        trainable(nn.LazyLinear(3))
