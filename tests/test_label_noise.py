"""Label noise: its share, its fixedness, and who sees it."""

from __future__ import annotations

import json

import pytest
import torch

from hesstrace_cli.config import TrainConfig
from hesstrace_cli.data import load_data
from hesstrace_cli.data.label_noise import noisy
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.tasks import Classification, Regression, Tokens
from tests.conftest import TINY, assert_one_line_error, invoke, train_to_end

CPU = torch.device("cpu")
DATA = """
import torch
class Data(torch.utils.data.Dataset):
    def __init__(self, size):
        self.X, self.size = torch.randn(size, 5, generator=torch.Generator().manual_seed(1)), size
    def __len__(self):
        return self.size
    def __getitem__(self, i):
        return self.X[i], i % 3
def data():
    return Data(40), Data(9)
"""


def data_of(**settings):
    return load_data(TrainConfig(train_examples=400, **settings), CPU)


def targets_of(split, batch_size=32):
    return torch.cat([y for _, y in split.batches(batch_size)])


def test_a_share_of_the_labels_becomes_others():
    clean = torch.arange(3000) % 10
    found = noisy(clean, 0.3, Classification())
    moved = found[found != clean]
    assert len(moved) == 900
    # Of 900 that could go to nine classes alike: a chi-square of 8 degrees, one in ten thousand.
    shift = torch.bincount((found - clean)[found != clean] % 10, minlength=10)[1:]
    assert ((shift - 100).double().square() / 100).sum() < 31.8
    less = noisy(clean, 0.1, Classification())
    assert torch.equal(less[less != clean], found[less != clean])


def test_it_is_the_datas_not_the_seeds_and_what_is_held_out_stays_clean():
    plain, data = data_of(), data_of(label_noise=0.2)
    assert (data.train.targets != plain.train.targets).sum() == round(0.2 * len(plain.train))
    assert torch.equal(data.train.targets, data_of(label_noise=0.2, seed=7).train.targets)
    assert torch.equal(targets_of(data.train), data.train.targets)
    for name in ("val", "test"):
        assert torch.equal(targets_of(getattr(data, name)), targets_of(getattr(plain, name)))
    some = torch.tensor([5, 2, 70])
    (X, y), (same, clean) = next(data.train.parts([some])), next(plain.train.parts([some]))
    assert torch.equal(X, same)
    assert torch.equal(y, data.train.targets[some])
    assert not torch.equal(targets_of(data.train), targets_of(plain.train))
    assert torch.equal(targets_of(data.train.subset(some)), y)
    assert torch.equal(clean, plain.train.targets[some])
    skipped = torch.cat([y for _, y in data.train.batches(30, 1, 3)])
    rows = torch.arange(len(data.train)).split(30)[1::3]
    assert torch.equal(skipped, data.train.targets[torch.cat(rows)])


def test_of_examples_that_are_read_one_by_one(tmp_path):
    (tmp_path / "d.py").write_text(DATA)
    settings = {"dataset": f"{tmp_path / 'd.py'}:data", "model": "mlp", "train_examples": None}
    data = load_data(TrainConfig(**settings, label_noise=0.5), CPU)
    assert (data.train.targets != load_data(TrainConfig(**settings), CPU).train.targets).sum() == 18
    assert torch.equal(targets_of(data.train, 7), data.train.targets)
    train_to_end(tmp_path / "r", **settings, label_noise=0.5, model_arg={}).finish()


def test_the_checkpoint_and_the_summary_tell_it(tmp_path):
    flags = (*TINY, "--label-noise", "0.4", "--out", tmp_path / "r")
    assert invoke("train", *flags).exit_code == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["label_noise"] == 0.4

    def loss(*more):
        result = invoke("estimate-trace", tmp_path / "r" / "last.pt", "--json", "-", *more)
        return json.loads(result.stdout)["loss"]

    assert loss() == pytest.approx(summary["train_loss"], rel=1e-5)
    assert loss("--label-noise", "0") != pytest.approx(summary["train_loss"], rel=1e-4)
    again = invoke("train", *flags[:-4], "--label-noise", "0.1", "--resume", *flags[-2:])
    assert_one_line_error(again, 2, "label-noise was 0.4, is 0.1")


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (Regression(), torch.randn(9, 1)),
        (Tokens(), torch.zeros(9, 2, dtype=torch.int64)),
        (Classification(), torch.rand(9, 3)),
        (Classification(), torch.zeros(9, dtype=torch.int64)),
    ],
)
def test_what_has_no_class_numbers_is_refused(task, targets):
    with pytest.raises(ConfigError, match="--label-noise replaces class numbers"):
        noisy(targets, 0.1, task)
