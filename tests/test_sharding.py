"""`train --shard`: two processes with a part of the weights each give those of one with all."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from hesstrace_cli.errors import ConfigError
from hesstrace_cli.storage.checkpoints import read_checkpoint
from hesstrace_cli.training import run, trainer
from tests.conftest import make_run
from tests.jobs import joined, run_job

BY_EXAMPLE = {"reg": ["trace=0.01"], "form": "example"}
CASES = {
    "penalty": BY_EXAMPLE,
    "group norm, entries, two probes": {
        **BY_EXAMPLE, "model_arg": {"width": 4, "norm": "group"}, "dropout_scheme": "entry",
        "num_probes": 2,
    },
    "in two rounds, others beside it": {
        **BY_EXAMPLE, "reg": ["trace=0.01,label-smoothing=0.1,confidence=0.1"], "accumulate": 2
    },
    "AdamW, without a penalty": {"reg": ["none"], "optimizer": "adamw"},
}  # fmt: skip
REFUSED = {
    "tr(H)": ({"reg": ["trace=0.01"], "curvature": "hessian", "form": "auto"}, "--curvature ggn"),
    "batch": ({"reg": ["trace=0.01"], "form": "batch"}, "--form example"),
    "some examples": ({**BY_EXAMPLE, "penalty_examples": 0.5}, "--penalty-examples"),
    "sam": ({"reg": ["sam"]}, "--reg sam"),
    "swa": ({"reg": ["swa"]}, "--reg swa cannot be used so: it keeps an average"),
    "fp16": ({**BY_EXAMPLE, "precision": "fp16"}, "--precision fp16"),
    "a tensor by batch": (
        {**BY_EXAMPLE, "model": "gated.py:Gated", "model_arg": {}}, "has no norm by example"
    ),
}  # fmt: skip
GATED = """
import torch
class Gated(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(64))
        self.head = torch.nn.Linear(64, num_classes)
    def forward(self, X):
        return self.head(torch.sigmoid(self.gate) * X.flatten(1))
"""


def settings_of(name, **more):
    model = {"model_arg": {"width": 4, "norm": "none"}}
    return {"train_examples": 70, "batch_size": 21, "epochs": 2, **model, **CASES[name], **more}


@contextmanager
def in_double():
    """Runs that begin inside have weights and data in float64."""
    build, load = trainer.build_model, run.load_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_model", lambda *a, **k: build(*a, **k).double())
        patch.setattr(run, "load_data", partial(load, dtype=torch.float64))
        yield


def finished(out, **settings):
    """The summary of a run to its end."""
    with in_double():
        own = make_run(out, **settings)
        for _ in own.advance():
            pass
        return own.finish()


def stopped(out, **settings):
    """The same, ended in the middle of its second epoch."""
    with in_double():
        own = make_run(out, **settings)
        steps = (progress for progress in own.advance() if progress.epoch == 2)
        next(steps)
        own._save(own.folder.last)
        own._unlock()


def work(rank, ports):
    ranks = joined(rank, 2, ports)
    for name in CASES:
        finished(f"two-{name}", **settings_of(name, shard=True, monitor_trace=1))
    sizes = {}
    own = make_run("sizes", **settings_of("penalty", shard=True))
    next(iter(own.advance()))
    state = own.trainer.optimizer.state.values()
    sizes["own"] = sum(each["momentum_buffer"].to_local().numel() for each in state)
    sizes["all"] = sum(p.numel() for p in own.trainer.model.parameters())
    own._unlock()
    refused = {}
    for name, (settings, _) in REFUSED.items():
        with pytest.raises(ConfigError) as caught:
            make_run(f"refused-{name}", **{**settings_of("penalty"), **settings, "shard": True})
        refused[name] = str(caught.value)
    stopped("moved", **settings_of("penalty", shard=True))
    ranks.from_first(None)
    return sizes, refused


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    (folder / "gated.py").write_text(GATED)
    return folder, run_job(2, work, folder)


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_of_one_process(job, name, tmp_path):
    folder, _ = job
    one = finished(tmp_path / "one", **settings_of(name, monitor_trace=1))
    two = json.loads((folder / f"two-{name}" / "summary.json").read_text())
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-9)
    assert two["trace"]["trace"] == pytest.approx(one["trace"]["trace"], rel=1e-7)
    own = read_checkpoint(tmp_path / "one" / "last.pt")
    other = read_checkpoint(folder / f"two-{name}" / "last.pt")
    assert own.content.keys() == other.content.keys()
    for key, tensor in own.state_dict.items():
        torch.testing.assert_close(other.state_dict[key], tensor, rtol=1e-9, atol=1e-12)


def test_each_process_holds_half_of_the_optimizers_state(job):
    for sizes, _ in job[1]:
        assert sizes["own"] < 0.6 * sizes["all"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_whole_weights_is_refused(job, name):
    for _, refused in job[1]:
        assert REFUSED[name][1] in refused[name]


def test_a_run_goes_on_with_another_number_of_processes(job, tmp_path):
    """In one, without `--shard`."""
    folder, _ = job
    moved = finished(folder / "moved", **settings_of("penalty", resume=True))
    one = finished(tmp_path / "one", **settings_of("penalty"))
    assert moved["test_loss"] == pytest.approx(one["test_loss"], rel=1e-9)
