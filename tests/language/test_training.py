"""Training along a text: the state carried and detached, resumed, clipped, on a plateau."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

from hesstrace_cli.config import TrainConfig, resolve
from hesstrace_cli.config.schedule import learning_rate
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.errors import ModelError, Stopped
from hesstrace_cli.storage.checkpoints import read_checkpoint
from hesstrace_cli.tasks import Classification, Tokens
from hesstrace_cli.training import cost
from hesstrace_cli.training.summary import for_a_trace
from tests.conftest import assert_one_line_error, invoke, make_run, train_to_end
from tests.test_resume import assert_same_run

WORDS = "the cat saw a dog and the dog saw a cat but no bird . a bird saw the cat and flew off .\n"


@pytest.fixture
def settings(tmp_path):
    for part, times in (("train", 12), ("valid", 3), ("test", 2)):
        (tmp_path / f"{part}.txt").write_text(WORDS * times)

    def of(**more):
        return {
            "dataset": f"text:{tmp_path}", "model": "lstm", "model_arg": {"width": 6}, "seq_len": 5,
            "train_examples": None, "batch_size": 4, "lr": 0.5, "momentum": 0.0,
            "weight_decay": 0.0, "schedule": "constant", **more,
        }  # fmt: skip

    return of


def states_of(trainer):
    return {n: p.clone() for n, p in trainer.model.state_dict().items()}


def states(run):
    return states_of(run.trainer)


@pytest.mark.parametrize("batch_size", [4, 7])
def test_an_epoch_is_the_loop_of_pytorchs_example(settings, tmp_path, batch_size):
    """Streams side by side, the state detached between windows, plain SGD: written out."""
    run = make_run(tmp_path / "r", epochs=1, **settings(batch_size=batch_size))
    model, data = copy.deepcopy(run.trainer.model), run.trainer.data.train
    for _ in run.advance():
        pass
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    runs = torch.arange(len(data)).tensor_split(batch_size)
    state = model.zero_state(batch_size)
    for k in range(len(runs[0])):
        rows = torch.tensor([own[k] for own in runs if k < len(own)])
        ((X, y),) = data.parts([rows])
        given = model(X, state=state[: len(rows)].detach())
        state = given["state"]
        optimizer.zero_grad()
        F.cross_entropy(given["logits"].flatten(0, 1), y.flatten(), ignore_index=-100).backward()
        optimizer.step()
    for each, value in model.state_dict().items():
        torch.testing.assert_close(
            run.trainer.model.state_dict()[each], value, rtol=1e-5, atol=1e-7
        )


def test_the_state_matters_and_a_transformer_has_none(settings, tmp_path):
    run = make_run(tmp_path / "r", epochs=1, **settings())
    next(run.advance())
    carried = run.trainer.carried.state
    assert carried.shape == (4, 2, 2, 6)
    assert not carried.requires_grad
    assert carried.abs().sum() > 0
    other = make_run(tmp_path / "g", **settings(model="gpt", model_arg={})).trainer
    assert other.carried is None
    orders = {t: [torch.cat(list(t._batches(epoch))) for epoch in (0, 1)] for t in (
        other, run.trainer)}  # fmt: skip
    assert not torch.equal(*orders[other])  # windows on their own are shuffled
    assert torch.equal(*orders[run.trainer])


NORMED = """
import torch
from torch import nn

class Normed(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.table, self.norm = nn.Embedding(num_classes, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, num_classes)

    def zero_state(self, num_examples):
        return torch.zeros(num_examples, 1)

    def forward(self, X, state=None):
        logits = self.head(self.norm(self.table(X).mean(1)))[:, None].expand(-1, X.shape[1], -1)
        return logits if state is None else {"logits": logits, "state": state + 1}
"""


def test_streams_of_unequal_length_with_batch_statistics(settings, tmp_path):
    """The last window of the one longer stream would be a batch of one; it sits the epoch out."""
    (tmp_path / "normed.py").write_text(NORMED)
    (tmp_path / "train.txt").write_text("a b " * 23)
    flags = settings(model=f"{tmp_path}/normed.py:Normed", model_arg={}, seq_len=1, batch_size=9)
    trainer = make_run(tmp_path / "r", epochs=2, val_fraction=0, **flags).trainer
    assert len(trainer.data.train) % 9 == 1
    steps = [(each.epoch, each.step) for each in trainer.advance()]
    count = trainer.steps_per_epoch
    assert count == len(trainer.data.train) // 9
    assert steps == [(epoch, step) for epoch in (1, 2) for step in range(1, count + 1)]


RUNS = {
    "plain": {},
    "dropout": {"model_arg": {"width": 6, "dropout": 0.5}},
    "clipped, on a plateau": {"clip_grad": 0.25, "schedule": "plateau", "lr": 30.0},
    "penalty": {"reg": "trace=0.01", "model_arg": {"width": 6, "tied": True}},
    "by example": {"reg": "trace=0.01", "form": "example", "penalty_examples": 0.5},
    "penalty on tr(H)": {"reg": "trace=0.001", "curvature": "hessian"},
    "sam": {"reg": "sam=0.05"},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "lr_warmup": 0.3, "weight_decay": 0.1,
              "weight_decay_on": "matrices"},
    "in rounds": {"accumulate": 2, "reg": "trace=0.01"},
}  # fmt: skip


QUICK = ("plain", "dropout", "clipped, on a plateau", "penalty", "adamw")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS]
)
def test_resumed_to_the_bit_in_mid_epoch(name, settings, tmp_path):
    flags = settings(epochs=3, **RUNS[name])
    whole = train_to_end(tmp_path / "whole", **flags)
    run = make_run(tmp_path / "r", **flags)
    stop = run.trainer.steps_per_epoch + 4
    with pytest.raises(Stopped):
        list(run.advance(lambda: 15 if run.trainer.step == stop else None))
    content = torch.load(tmp_path / "r" / "last.pt", weights_only=True)
    assert content["carried"].abs().sum() > 0
    resumed = train_to_end(tmp_path / "r", resume=True, **flags)
    assert_same_run(tmp_path / "whole", tmp_path / "r")
    assert whole.trainer.plateaus == resumed.trainer.plateaus
    if "plateau" in name:
        assert whole.trainer.plateaus > 0


def test_a_state_that_is_not_the_runs(settings, tmp_path):
    run = make_run(tmp_path / "r", **settings())
    with pytest.raises(Stopped):
        list(run.advance(lambda: 15))
    content = torch.load(tmp_path / "r" / "last.pt", weights_only=True)
    for carried, words in ((torch.zeros(3, 2, 2, 6), "one of shape"), (None, "none, expected")):
        changed = {k: v for k, v in content.items() if k != "carried"}
        changed |= {} if carried is None else {"carried": carried}
        torch.save(changed, tmp_path / "r" / "last.pt")
        with pytest.raises(ModelError, match=f"carried state is .*{words}") as caught:
            make_run(tmp_path / "r", resume=True, **settings())
        assert "\n" not in str(caught.value)
    torch.save({**content, "carried": torch.full((4, 2, 2, 6), torch.nan)}, tmp_path / "r/last.pt")
    with pytest.raises(ModelError, match="its carried is not the state"):
        make_run(tmp_path / "r", resume=True, **settings())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_rounds_carry_the_state_of_their_rows(settings, tmp_path, precision):
    one, parts = (
        train_to_end(tmp_path / str(n), accumulate=n, precision=precision, **settings())
        for n in (1, 3)
    )
    for each, value in states(one).items():
        off = (states(parts)[each] - value).abs().max()
        assert off < (1e-5 if precision == "float32" else 0.02), each


def test_the_gradient_is_clipped(settings, tmp_path):
    free, clipped, wide = (
        make_run(tmp_path / str(limit), **settings(clip_grad=limit)) for limit in (None, 0.01, 1e6)
    )
    for run in (free, clipped, wide):
        next(run.advance())
    sizes = [
        torch.nn.utils.get_total_norm([p.grad for p in run.trainer.model.parameters()])
        for run in (free, clipped, wide)
    ]
    assert sizes[0] == sizes[2] > 0.01
    assert sizes[1] == pytest.approx(0.01, rel=1e-3)
    for a, b in zip(
        free.trainer.model.parameters(), clipped.trainer.model.parameters(), strict=True
    ):
        torch.testing.assert_close(a.grad * (sizes[1] / sizes[0]), b.grad, rtol=1e-4, atol=1e-9)


def test_the_learning_rate_falls_on_a_plateau(settings, tmp_path):
    train_to_end(tmp_path / "r", epochs=6, **settings(schedule="plateau", lr=30.0))
    lines = [json.loads(x) for x in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    best, lr = float("inf"), 30.0
    for line in lines:
        assert line["lr"] == pytest.approx(lr)
        if line["val_metrics"]["perplexity"] < best:
            best = line["val_metrics"]["perplexity"]
        else:
            lr /= 4
    assert lr < 30
    kept = read_checkpoint(tmp_path / "r" / "best.pt").content["epoch"]
    scores = [line["val_metrics"]["perplexity"] for line in lines]
    assert kept == 1 + scores.index(min(scores))
    result = invoke("train", "--schedule", "plateau", "--val-fraction", "0")
    assert_one_line_error(result, 2, "--schedule plateau goes by the validation")


def test_a_linear_warm_up():
    config = resolve(TrainConfig, {"lr": 0.2, "lr_warmup": 0.25, "schedule": "constant"}, None)
    rates = [learning_rate(config, step / 8) for step in range(8)]
    assert rates == pytest.approx([0, 0.1, *[0.2] * 6])


def test_weight_decay_on_matrices_alone(settings, tmp_path):
    """With no gradient through it, what decays shrinks, and nothing else moves."""
    flags = settings(weight_decay=0.1, weight_decay_on="matrices")
    run = make_run(tmp_path / "r", **flags)
    before = states(run)
    for p in run.trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    run.trainer.optimizer.step()
    for name, p in run.trainer.model.named_parameters():
        factor = 1 - 0.5 * 0.1 if p.dim() > 1 else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name])
        assert (p.dim() > 1) == ("weight" in name)


@pytest.mark.slow
def test_a_summary_has_perplexity_and_accuracy(settings, tmp_path):
    summary = train_to_end(tmp_path / "r", **settings(epochs=1)).finish()
    for part in ("metrics", "val_metrics", "train_metrics"):
        assert set(summary[part]) == {"perplexity", "accuracy"}
    assert summary["selection"] == {"metric": "perplexity", "higher_is_better": False}


@pytest.mark.parametrize("scheme", ["tensor", "entry"])
def test_dropped_entries_of_a_tied_table_go_by_the_whole_batch(scheme, settings, tmp_path):
    run = make_run(
        tmp_path / "r", **settings(
            model="gpt", model_arg={"width": 8, "layers": 1, "heads": 2, "tied": True},
            reg="trace=0.01", form="example", dropout_scheme=scheme,
        )
    )  # fmt: skip
    (penalty,) = run.trainer.regularizers
    said, words = penalty.description()["form_reason"], "entries of a tied table are dropped"
    assert (f"1 of the whole batch as {words} (embedding.weight)" in said) == (scheme == "entry")
    assert (words in (penalty.reads_weights or "")) == (scheme == "entry")


def test_what_a_penalty_costs_without_cudnn_is_measured(settings, tmp_path, monkeypatch):
    penalised = make_run(tmp_path / "a", **settings(reg="trace=0.01")).trainer
    plain = make_run(tmp_path / "b", **settings()).trainer
    transformer = make_run(tmp_path / "c", **settings(model="gpt", reg="trace", model_arg={}))
    assert cost.cost_without_cudnn(penalised) is None  # on a CPU
    monkeypatch.setattr(cost, "_has_cudnn", lambda device: True)
    seconds = {True: 0.002, False: 0.007}
    for cudnn in seconds:
        before = states_of(penalised)
        assert cost._seconds_of_gradient(penalised, cudnn=cudnn) > 0
        assert all(torch.equal(before[n], p) for n, p in states_of(penalised).items())
        assert all(p.grad is None for p in penalised.model.parameters())
    monkeypatch.setattr(cost, "_seconds_of_gradient", lambda trainer, cudnn: seconds[cudnn])
    assert "takes 3.5 times as long here" in cost.cost_without_cudnn(penalised)
    assert cost.cost_without_cudnn(plain) is None
    assert cost.cost_without_cudnn(transformer.trainer) is None


@pytest.mark.parametrize(
    ("task", "shape", "kept"),
    [
        (Classification(), (2500,), 2000),
        (Tokens(), (2500, 10), 200),
        (Tokens(), (2500, 35), 64),
        (Tokens(), (50, 35), 50),
    ],
)
def test_the_trace_of_a_run_is_over_as_many_terms_whatever_the_task(task, shape, kept):
    targets = torch.arange(math.prod(shape)).reshape(shape) % 7
    split = TensorSplit(targets, targets, Preprocess(), torch.float32, task)
    assert len(for_a_trace(split)) == kept
