"""Averages of the weights against their formulas, PyTorch's own, and an uninterrupted run."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from hesstrace_cli.analysis.evaluation import evaluate
from hesstrace_cli.errors import ConfigError, ModelError, Stopped
from tests.conftest import make_run, train_to_end
from tests.test_sharding import in_double

SETTINGS = {"epochs": 4, "schedule": "constant"}


def content_of(run, name="last"):
    return torch.load(run.folder.path / f"{name}.pt", weights_only=True)


def network_of(run, name="last"):
    """The network that a checkpoint's `state_dict` is of."""
    model = copy.deepcopy(run.trainer.model)
    model.load_state_dict(content_of(run, name)["state_dict"])
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights after each step of a run without an average, and its length."""
    with in_double():
        run = make_run(tmp_path_factory.mktemp("plain") / "r", **SETTINGS)
        weights = [copy.deepcopy(run.trainer.model) for _ in run.advance()]
    return weights, run.trainer.steps_per_epoch


@pytest.fixture(scope="module", params=["swa=0.5", "ema=0.8"])
def averaged(request, tmp_path_factory):
    with in_double():
        run = train_to_end(tmp_path_factory.mktemp("avg") / "r", reg=request.param, **SETTINGS)
        run.finish()
    return run


def test_the_formula(averaged, plain):
    weights, steps = plain
    network = network_of(averaged)
    moving = get_ema_avg_fn(0.8) if "ema" in averaged.config.reg[0] else None
    second = AveragedModel(weights[0], avg_fn=moving)
    chosen = weights if moving else [weights[3 * steps - 1], weights[4 * steps - 1]]
    for model in chosen:
        second.update_parameters(model)
    for name, p in network.named_parameters():
        all_of = torch.stack([dict(model.named_parameters())[name].detach() for model in chosen])
        share = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64)
        if moving:
            share = 0.2 * 0.8 ** torch.arange(len(chosen) - 1, -1, -1, dtype=torch.float64)
            share[0] /= 0.2
        mean = torch.tensordot(share, all_of, 1)
        torch.testing.assert_close(p.detach(), mean, rtol=1e-12, atol=1e-14)
        of_torch = dict(second.module.named_parameters())[name]
        torch.testing.assert_close(p, of_torch, rtol=1e-12, atol=1e-14)


def test_training_goes_on_as_without(averaged, plain):
    (*_, last), _ = plain
    for name, value in last.state_dict().items():
        assert torch.equal(content_of(averaged)["in_training"][name], value)


def test_the_statistics_are_the_averages_own(averaged):
    """The mean over the batches of the averaged network's batch statistics."""
    network, trainer = network_of(averaged), averaged.trainer
    norm = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    means, variances = [], []

    def look(_module, inputs):
        means.append(inputs[0].mean((0, 2, 3)))
        variances.append(inputs[0].var((0, 2, 3)))

    norm.register_forward_pre_hook(look)
    for X, _ in trainer.data.train.batches(trainer.config.batch_size):
        copy.deepcopy(network).train()(X)
    assert len(means) == trainer.steps_per_epoch
    saved = content_of(averaged)["state_dict"]
    (name,) = [n for n, m in network.named_modules() if m is norm]
    torch.testing.assert_close(saved[f"{name}.running_mean"], torch.stack(means).mean(0).detach())
    torch.testing.assert_close(
        saved[f"{name}.running_var"], torch.stack(variances).mean(0).detach()
    )


def test_what_is_judged_is_the_average(averaged):
    trainer, folder = averaged.trainer, averaged.folder
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    summary, batch = folder.summary(), trainer.config.batch_size
    last = evaluate(network_of(averaged), trainer.data.val, batch)
    assert lines[-1]["val_loss"] == pytest.approx(last.loss, rel=1e-12)
    test = evaluate(network_of(averaged), trainer.data.test, 256)
    assert summary["test_loss"] == pytest.approx(test.loss, rel=1e-12)
    assert summary["num_averaged"] == content_of(averaged)["num_averaged"]
    best = content_of(averaged, "best")
    found = evaluate(network_of(averaged, "best"), trainer.data.val, batch)
    assert lines[best["epoch"] - 1]["val_loss"] == pytest.approx(found.loss, rel=1e-12)


def test_before_the_average_begins_the_last_weights_are_judged(averaged, plain):
    weights, steps = plain
    trainer = averaged.trainer
    lines = [json.loads(line) for line in averaged.folder.metrics.read_text().splitlines()]
    at = [evaluate(weights[n * steps - 1], trainer.data.val, 32).loss for n in (1, 2, 3)]
    same = [line["val_loss"] == pytest.approx(loss) for line, loss in zip(lines, at, strict=False)]
    # The first of swa's weights are their own average, with statistics of their own.
    assert same == ([True, True, False] if "swa" in averaged.config.reg[0] else [False] * 3)


def test_the_best_epoch_is_one_of_the_average(tmp_path):
    run = make_run(tmp_path / "r", reg="swa=0.5", **SETTINGS)
    best = []
    for progress in run.advance():
        if progress.record is not None:
            best.append(progress.is_best)
            run.trainer.best_score = max(run.trainer.best_score, 1.0)  # as good as can be
    assert best == [True, False, True, False]


@pytest.mark.parametrize("reg", ["trace=0.003,swa=0.5", "trace=0.003,ema=0.9"])
def test_resumed_to_the_bit(tmp_path, reg):
    settings = {"reg": reg, **SETTINGS, "model_arg": {"width": 4}}
    whole = train_to_end(tmp_path / "a", **settings)
    steps = whole.trainer.steps_per_epoch
    half = make_run(tmp_path / "b", **settings)
    with pytest.raises(Stopped):
        list(half.advance(lambda: 15 if half.trainer.step == 3 * steps + 1 else None))
    rest = train_to_end(tmp_path / "b", resume=True, **settings)
    a, b = content_of(whole), content_of(rest)
    assert a["num_averaged"] == b["num_averaged"]
    for part in ("state_dict", "in_training"):
        for name, value in a[part].items():
            assert torch.equal(b[part][name], value)
    assert a["best_score"] == b["best_score"]
    one, other = (
        {k: v for k, v in run.finish().items() if k not in ("seconds", "trace")}
        for run in (whole, rest)
    )
    assert one == other


def test_what_cannot_go_on(tmp_path):
    settings = {"reg": "swa=0.5", "schedule": "constant"}
    train_to_end(tmp_path / "r", **settings).finish()
    with pytest.raises(ConfigError, match="swa averages the last part"):
        make_run(tmp_path / "r", resume=True, epochs=3, **settings)
    other = tmp_path / "r" / "last.pt"
    content = torch.load(other, weights_only=True)
    torch.save({**content, "num_averaged": 7}, other)
    with pytest.raises(ModelError, match=r"average of 7 weights.* the run's is of 1"):
        make_run(tmp_path / "r", resume=True, **settings)


def test_a_model_that_cannot_be_copied(tmp_path):
    (tmp_path / "m.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "    def __deepcopy__(self, memo):\n"
        "        raise TypeError('no copies')\n"
    )
    with pytest.raises(ConfigError, match=r"--reg ema keeps an averaged copy .* no copies"):
        make_run(tmp_path / "r", reg="ema", model=f"{tmp_path / 'm.py'}:Net", model_arg={})


def test_two_averages_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="swa and ema both average the weights"):
        make_run(tmp_path / "r", reg="swa,ema")
