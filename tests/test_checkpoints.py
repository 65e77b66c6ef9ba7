"""Weights out of any checkpoint file, and never code."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hesstrace_cli.checkpoints import load_weights, read_checkpoint
from hesstrace_cli.errors import ModelError


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def with_prefix(prefix):
    return {prefix + name: value for name, value in network().state_dict().items()}


def averaged():
    return torch.optim.swa_utils.AveragedModel(network()).state_dict()


def half():
    return network().half().state_dict()


CONTENTS = {
    "bare": lambda: network().state_dict(),
    "ordered": lambda: OrderedDict(network().state_dict()),
    **{
        key: lambda key=key: {key: network().state_dict(), "epoch": 3, "args": {"lr": 0.1}}
        for key in ("state_dict", "model", "model_state_dict", "net", "ema")
    },
    "twice": lambda: {"model": {"state_dict": network().state_dict()}},
    "data parallel": lambda: with_prefix("module."),
    "compiled": lambda: {"model": with_prefix("_orig_mod.")},
    "both": lambda: with_prefix("module._orig_mod."),
    "framework": lambda: {"state_dict": with_prefix("model.")},
    "averaged": lambda: {"ema": averaged()},
    "half precision": half,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_weights_are_found(name, tmp_path):
    torch.manual_seed(0)
    content = CONTENTS[name]()
    torch.save(content, tmp_path / "c.pth")
    torch.manual_seed(0)
    truth, model = network().state_dict(), network()
    load_weights(model, read_checkpoint(tmp_path / "c.pth").state_dict, "c.pth")
    tolerance = 1e-3 if name == "half precision" else 0
    for key, value in model.state_dict().items():
        assert value.dtype == truth[key].dtype
        torch.testing.assert_close(value, truth[key], rtol=tolerance, atol=tolerance)


def test_safetensors(tmp_path):
    weights = network().state_dict()
    save_file(weights, tmp_path / "c.safetensors")
    model = network()
    load_weights(model, read_checkpoint(tmp_path / "c.safetensors").state_dict, "c")
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:50])
    with pytest.raises(ModelError, match="cut off"):
        read_checkpoint(tmp_path / "cut.safetensors")


def test_one_of_several_is_chosen_and_named(tmp_path):
    torch.save({"ema": averaged(), "model": network().state_dict()}, tmp_path / "c.pt")
    note = read_checkpoint(tmp_path / "c.pt").note
    assert note is not None
    assert "'model'" in note
    assert "'ema'" in note


class Trap:
    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(tmp_path, capsys, zipped):
    torch.save(
        {"state_dict": network().state_dict(), "extra": Trap()}, tmp_path / "c.pt",
        _use_new_zipfile_serialization=zipped,
    )  # fmt: skip
    with pytest.raises(ModelError, match="run code"):
        read_checkpoint(tmp_path / "c.pt")
    assert capsys.readouterr().out == ""


def test_a_mismatch_is_named():
    weights = network().state_dict()
    weights["0.weight"] = torch.zeros(7, 7)
    weights["new"] = weights.pop("2.bias")
    with pytest.raises(ModelError) as caught:
        load_weights(network(), weights, "c.pt")
    for word in ("1 missing, first 2.bias", "1 unexpected, first new", "(7, 7)", "(4, 3)"):
        assert word in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, [1, 2], {"model": {"a": 1}}])
def test_what_has_no_weights(content, tmp_path):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ModelError):
        read_checkpoint(tmp_path / "c.pt")
