"""Weights out of any checkpoint file, and never code."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hesstrace_cli.errors import ModelError
from hesstrace_cli.models.small import small_cnn
from hesstrace_cli.storage.checkpoints import load_weights, read_checkpoint


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


def flipped(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.mark.parametrize("own", [True, False])
def test_a_flipped_bit_never_changes_a_weight_unseen(tmp_path, checkpoint, own):
    file = tmp_path / "c.pt"
    if not own:
        torch.save({"model": network().state_dict(), "epoch": 3}, file)
    data = (checkpoint if own else file).read_bytes()
    file.write_bytes(data)
    good, refused = read_checkpoint(file).state_dict, 0
    bits = random.Random(0).sample(range(8 * len(data)), 200)
    directory = data.index(b"PK\x01\x02")  # of one part all bits, and those of the end
    entry = range(8 * directory, 8 * data.index(b"PK\x01\x02", directory + 1))
    end = range(8 * data.rindex(b"PK\x05\x06"), 8 * len(data))
    for bit in [*bits, *entry, *end]:
        file.write_bytes(flipped(data, bit))
        try:
            read = read_checkpoint(file).state_dict
        except ModelError:
            refused += 1
            continue
        assert read.keys() == good.keys()
        assert all(torch.equal(read[k], good[k]) for k in good)
    assert refused > 100


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 100, 0.5, 0.999])
def test_what_is_cut_off(tmp_path, checkpoint, cut):
    data = checkpoint.read_bytes()
    end = int(cut * len(data)) if isinstance(cut, float) else cut
    (tmp_path / "c.pt").write_bytes(data[:end])
    with pytest.raises(ModelError):
        read_checkpoint(tmp_path / "c.pt")


ODD = {
    "sparse": lambda: torch.eye(4, 3).to_sparse(),
    "csr": lambda: torch.eye(4, 3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.ones(4, 3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "complex": lambda: torch.ones(4, 3, dtype=torch.complex64),
}


@pytest.mark.filterwarnings("ignore")  # of prototypes, as they are made
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("own", [True, False])
def test_odd_tensors_are_refused_by_name(tmp_path, checkpoint, name, own):
    content = torch.load(checkpoint, weights_only=True) if own else network().state_dict()
    weights = content["state_dict"] if own else content
    key = next(key for key in weights if key.endswith("weight"))
    weights[key] = ODD[name]()
    torch.save(content, tmp_path / "c.pt")
    model = small_cnn(num_classes=10, in_shape=(1, 8, 8), width=4) if own else network()
    with pytest.raises(ModelError, match=key):
        load_weights(model, read_checkpoint(tmp_path / "c.pt").state_dict, "c.pt")


def test_fractions_do_not_become_whole_numbers():
    weights = network().state_dict()
    weights["1.num_batches_tracked"] = torch.tensor(2.5)
    with pytest.raises(ModelError, match="another kind of number"):
        load_weights(network(), weights, "c.pt")


WRONG = (None, "x", True, -1, 1.5, float("nan"), [], [0], {}, {"a": "b"}, torch.zeros(2))
RIGHT = {
    "seconds": (1.5,), "best_score": (1.5,),
    "scaler": ({},), "versions": ({}, {"a": "b"}),
    "state_dict": ({},),
}  # fmt: skip


@pytest.mark.parametrize(
    "field",
    ["state_dict", "config", "optimizer", "step", "epoch", "seconds", "best_score", "sums",
     "scaler", "preprocess", "num_classes", "in_shape", "versions"],
)  # fmt: skip
def test_every_field_of_our_own_is_checked_as_it_is_read(tmp_path, checkpoint, field):
    right = [repr(value) for value in RIGHT.get(field, ())]
    for wrong in WRONG:
        if repr(wrong) in right or (field == "config" and wrong == {}):
            continue
        torch.save({**torch.load(checkpoint, weights_only=True), field: wrong}, tmp_path / "c.pt")
        with pytest.raises(ModelError) as caught:
            read_checkpoint(tmp_path / "c.pt")
        assert field in str(caught.value), wrong


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config", "lr"), "fast"), (("config", "epochs"), 0), (("config", "no_such"), 1),
        (("config", "model"), 5), (("config", "reg"), ["none", 3]),
        (("preprocess", "mean"), ["a"]), (("preprocess", "std"), [0.0]),
        (("preprocess", "scale"), 0), (("preprocess", "channels"), 1.5),
        (("sums", "loss"), 0.0), (("sums", "loss"), torch.zeros(2, dtype=torch.float64)),
        (("sums", "loss"), torch.zeros(())), (("sums", "examples"), 1.5),
        (("sums", "loss"), torch.tensor(float("nan"), dtype=torch.float64)),
        (("sums", "more"), 1), (("optimizer", "state"), {0: 3}),
        (("optimizer", "param_groups"), []), (("scaler", "scale"), "big"),
    ],
)  # fmt: skip
def test_what_is_wrong_within_a_field(tmp_path, checkpoint, path, value):
    content = torch.load(checkpoint, weights_only=True)
    content[path[0]][path[1]] = value
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ModelError, match=path[0]):
        read_checkpoint(tmp_path / "c.pt")


class Versioned(nn.Linear):
    """Asks for the version that wrote the weights, and holds something that is no tensor."""

    _version = 2
    extra = "new"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def get_extra_state(self):
        return {"extra": self.extra}

    def set_extra_state(self, state):
        self.extra = state["extra"]


@pytest.mark.parametrize("wrapped", ["", "module.", "module._orig_mod."])
def test_versions_and_extra_state_of_modules_are_kept(tmp_path, wrapped):
    model = nn.Sequential(OrderedDict(a=Versioned(3, 2)))
    model.a.extra = "old"
    whole = model
    for name in reversed(wrapped.split(".")[:-1]):
        whole = nn.Sequential(OrderedDict([(name, whole)]))
    torch.save({"model": whole.state_dict()}, tmp_path / "c.pt")
    other = nn.Sequential(OrderedDict(a=Versioned(3, 2)))
    load_weights(other, read_checkpoint(tmp_path / "c.pt").state_dict, "c.pt")
    assert torch.equal(other.a.weight, model.a.weight)
    assert other.a.extra == "old"


def test_a_checkpoint_that_holds_itself(tmp_path):
    content = {"epoch": 1}
    content["model"] = content
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ModelError, match="no weights"):
        read_checkpoint(tmp_path / "c.pt")
