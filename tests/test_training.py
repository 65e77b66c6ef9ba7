"""Training: to the bit where it must be, and stopped where it should."""

from __future__ import annotations

import gc
import json

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.amp import GradScaler

from hesstrace_cli.analysis.estimation import top_eigenvalue
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.config.schedule import learning_rate
from hesstrace_cli.curvature import probes
from hesstrace_cli.distributed.parallel import Ranks
from hesstrace_cli.errors import ConfigError, NumericsError, Stopped
from hesstrace_cli.storage.checkpoints import read_checkpoint
from tests.conftest import make_run, train_to_end

PENALTIES = [
    {"reg": "trace=0.01"},
    {"reg": "trace=0.01", "dropout_scheme": "entry"},
    {"reg": "trace=0.01", "estimator": "hutchinson", "num_probes": 2},
    {"reg": "trace=0.001", "curvature": "hessian", "model_arg": {"width": 4, "norm": "none"}},
]


def weights(run):
    return {k: v.clone() for k, v in run.trainer.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("settings", PENALTIES)
def test_same_seed_same_weights_and_strength_matters(settings, tmp_path):
    first, second = (train_to_end(tmp_path / n, **settings) for n in "ab")
    assert same(weights(first), weights(second))
    plain = train_to_end(tmp_path / "c", **{**settings, "reg": "none"})
    assert not same(weights(first), weights(plain))


def test_strength_zero_is_no_penalty_to_the_bit(tmp_path):
    zero = train_to_end(tmp_path / "a", reg="trace=0")
    none = train_to_end(tmp_path / "b", reg="none")
    assert same(weights(zero), weights(none))


@pytest.mark.parametrize("settings", [*PENALTIES, {"reg": "none", "optimizer": "adamw"}])
def test_resume_equals_an_uninterrupted_run(settings, tmp_path):
    whole = train_to_end(tmp_path / "whole", **settings)
    out = tmp_path / "parts"
    for at in (2, 5):  # in the middle of the first and of the second epoch
        run = make_run(out, resume=at > 2, **settings)
        with pytest.raises(Stopped) as stopped:
            for _ in run.advance(lambda run=run, at=at: 15 if run.trainer.step >= at else None):
                pass
        assert stopped.value.exit_code == 143
    resumed = make_run(out, resume=True, **settings)
    assert resumed.trainer.step == 5
    for _ in resumed.advance():
        pass
    assert same(weights(whole), weights(resumed))
    lines = [
        [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (tmp_path / "whole", out)
    ]
    for a, b in zip(*lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_resume_with_changed_settings_is_refused(tmp_path):
    train_to_end(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"lr was 0\.05, is 0\.1"):
        make_run(tmp_path / "a", resume=True, lr=0.1)
    with pytest.raises(ConfigError, match="not empty"):
        make_run(tmp_path / "a")


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(tmp_path):
    run = make_run(tmp_path / "a")
    with torch.no_grad():
        next(run.trainer.model.parameters()).fill_(float("inf"))
    before = weights(run)
    with pytest.raises(NumericsError, match="before the weights moved"):
        next(run.advance())
    after = weights(run)
    for name, _ in run.trainer.model.named_parameters():
        assert torch.equal(before[name], after[name])


def test_batch_statistics_are_updated_once_a_step(tmp_path):
    run = train_to_end(tmp_path / "a", reg="trace=0.001", curvature="hessian", warmup=0)
    counts = [b for n, b in run.trainer.model.named_buffers() if "num_batches" in n]
    assert counts
    assert all(int(c) == run.trainer.total_steps for c in counts)


def test_auto_says_what_it_chose(tmp_path):
    run = make_run(tmp_path / "a", reg="trace=0.01")
    assert run.trainer.regularizers[0].choice.curvature == "ggn"
    assert "batch statistics" in run.trainer.regularizers[0].choice.reason
    asked = make_run(tmp_path / "b", reg="trace=0.01", curvature="hessian")
    assert asked.trainer.regularizers[0].choice.curvature == "hessian"


def test_every_and_warmup(tmp_path):
    run = make_run(tmp_path / "a", reg="trace=0.1", every=2, warmup=0.5, batch_size=16)
    (penalty,) = run.trainer.regularizers
    assert penalty.strength_at(0.0) == 0
    assert penalty.strength_at(0.25) == pytest.approx(0.05)
    assert penalty.strength_at(0.75) == pytest.approx(0.1)
    for _ in run.advance():
        if run.trainer.step == 3:
            break
    assert (
        run.trainer.sums.penalty_steps == 1
    )  # of the steps 0, 1, 2: 0 has no strength, 1 is skipped


def test_run_folder(tmp_path):
    run = train_to_end(tmp_path / "a", reg="trace=0.01")
    summary = run.finish()
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "last.pt", "best.pt", "summary.json"}
    assert json.loads((tmp_path / "a" / "summary.json").read_text()) == summary
    assert summary["schema"] == "hesstrace/run/1"
    assert summary["trace"]["schema"] == "hesstrace/trace/1"
    checkpoint = read_checkpoint(tmp_path / "a" / "last.pt")
    assert same(checkpoint.state_dict, weights(run))
    assert len(run.trainer.data.val) == 20
    assert run.finished


def test_penalty_lowers_the_trace_on_fashion_mnist(tmp_path, fashion_mnist):
    settings = {
        "dataset": "fashion-mnist", "data_dir": fashion_mnist, "train_examples": 500,
        "epochs": 8, "image_size": 14, "model_arg": {"width": 8},
    }  # fmt: skip
    runs = [
        train_to_end(tmp_path / name, reg=reg, **settings)
        for name, reg in (("a", "none"), ("b", "trace=0.01"))
    ]
    plain, penalised = (run.finish()["trace"]["trace"] for run in runs)
    assert penalised < plain / 2


def test_half_precision_run_is_resumed_and_evaluated_in_full(tmp_path):
    settings = {"precision": "fp16", "reg": "trace=0.01", "model_arg": {"width": 4}}
    whole = train_to_end(tmp_path / "a", **settings)
    run = make_run(tmp_path / "b", **settings)
    with pytest.raises(Stopped):
        list(run.advance(lambda: 15 if run.trainer.step == 5 else None))
    again = train_to_end(tmp_path / "b", resume=True, **settings)
    assert same(weights(whole), weights(again))
    summary = again.finish()
    assert summary["trace"]["dtype"] == "float32"
    again.trainer.model.eval()
    X, _ = next(again.trainer.data.test.batches(4))
    assert torch.equal(
        again.trainer.model(X), type(again.trainer.model).forward(again.trainer.model, X)
    )


def test_kept_checkpoints_monitored_trace_and_events(tmp_path):
    settings = {"epochs": 5, "keep_checkpoints": 2, "monitor_trace": 2, "tensorboard": True}
    run = train_to_end(tmp_path / "a", **settings)
    assert sorted(p.name for p in (tmp_path / "a").glob("epoch-*")) == [
        "epoch-0004.pt", "epoch-0005.pt",
    ]  # fmt: skip
    last = read_checkpoint(tmp_path / "a" / "epoch-0005.pt")
    assert same(last.state_dict, weights(run))
    lines = [json.loads(x) for x in run.folder.metrics.read_text().splitlines()]
    assert ["trace" in line for line in lines] == [False, True, False, True, False]
    assert lines[3]["trace"] > 0
    plain = train_to_end(tmp_path / "b", epochs=5)
    assert same(weights(plain), weights(run))  # watching changes nothing
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("trace")] == pytest.approx(
        [lines[1]["trace"], lines[3]["trace"]]
    )
    assert len(events.Scalars("train_loss")) == 5


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_memory_does_not_grow(tmp_path, curvature):
    """Over 500 penalised steps neither tensors nor graph nodes pile up."""
    run = make_run(
        tmp_path / "a", reg="trace=0.001", curvature=curvature, warmup=0, epochs=100,
        train_examples=40, batch_size=8, model_arg={"width": 2, "norm": "none"}, val_fraction=0,
    )  # fmt: skip
    counts = []
    for _ in run.advance():
        if run.trainer.step % 100 == 0:
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert run.trainer.step == 500
    assert len(counts) == 5
    assert max(counts) - counts[0] <= 5


def test_float16_that_overflows_again_and_again_is_stopped(tmp_path):
    run = make_run(tmp_path / "a", precision="fp16", reg="trace=1e8", warmup=0, epochs=8)
    with pytest.raises(NumericsError, match="before the weights moved"):
        list(run.advance())
    lines = [json.loads(x) for x in run.folder.metrics.read_text().splitlines()]
    assert lines[0]["skipped_steps"] == run.trainer.steps_per_epoch


@pytest.mark.parametrize(
    "settings",
    [{"reg": "dropout=0.5"}, {"reg": "trace=0.01,dropout=0.5", "augment": "crop-flip"},
     {"reg": "none", "precision": "fp16"}],
)  # fmt: skip
def test_resumed_in_mid_epoch_with_randomness_of_every_kind(tmp_path, settings):
    whole, run = (make_run(tmp_path / name, **settings, batch_size=50) for name in "ab")
    if run.trainer.stepper.scaler.is_enabled():  # not the scale that a new run begins with
        for each in (whole, run):
            each.trainer.stepper.scaler = GradScaler("cpu", init_scale=128.0)
    list(whole.advance())
    with pytest.raises(Stopped):
        list(run.advance(lambda: 15 if run.trainer.step == 2 else None))
    again = train_to_end(tmp_path / "b", resume=True, **settings, batch_size=50)
    assert same(weights(whole), weights(again))
    assert again.trainer.best_score == whole.trainer.best_score
    assert again.trainer.stepper.scaler.state_dict() == whole.trainer.stepper.scaler.state_dict()


def test_best_accuracy_survives_a_resume(tmp_path):
    run = make_run(tmp_path / "a", epochs=3)
    with pytest.raises(Stopped):
        list(
            run.advance(lambda: 15 if run.trainer.step == run.trainer.steps_per_epoch + 1 else None)
        )
    run.trainer.best_score = 2.0  # above what any epoch reaches
    run._save(run.folder.last)
    run.lock.release()
    before = (tmp_path / "a" / "best.pt").read_bytes()
    again = train_to_end(tmp_path / "a", epochs=3, resume=True)
    assert again.trainer.best_score == 2.0
    assert (tmp_path / "a" / "best.pt").read_bytes() == before


def test_every_step_and_part_draws_anew(tmp_path, monkeypatch):
    drawn, keys = [], []
    real = probes.rademacher

    def recorded(*args, **kwargs):
        drawn.append(real(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(probes, "rademacher", recorded)
    run = make_run(tmp_path / "a", reg="trace=0.01", warmup=0, batch_size=20)
    steps = run.advance()
    next(steps), next(steps)
    assert len(drawn) == 2
    assert not torch.equal(*drawn)

    run = make_run(tmp_path / "b", accumulate=2, augment="crop-flip", batch_size=100)
    generators = run.trainer.stepper.generators
    run.trainer.stepper.generators = lambda *key: (keys.append(key), generators(*key))[1]
    seen = []
    run.trainer.model.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    list(run.advance())
    numbers = [key for key in keys if key[0] == "augmentation"]
    assert len(numbers) == len(set(numbers)) == 2 * run.trainer.total_steps
    monkeypatch.setattr(Ranks, "sum_", lambda *_: None)
    run.trainer.stepper.ranks = Ranks(1, 2)
    keys.clear()
    (examples,) = run.trainer.examples([torch.arange(100)])
    run.trainer.step = 0
    run.trainer.take_step(examples)
    assert not set(keys) & set(numbers)
    plain = {tuple(x.flatten().tolist()) for x in next(run.trainer.data.train.batches(1000))[0]}
    assert any(tuple(x.flatten().tolist()) not in plain for x in seen[1])  # cropped


def test_rounds_of_a_batch_see_the_same_dropout_masks(tmp_path):
    run = make_run(
        tmp_path / "a", reg="trace=0.01,dropout=0.5", form="batch", accumulate=2, warmup=0,
        model_arg={"width": 4, "norm": "none"},
    )  # fmt: skip
    outputs = []
    run.trainer.model.register_forward_hook(lambda _m, _i, output: outputs.append(output.detach()))
    next(run.advance())
    first, second, *again = outputs[-4:]  # the gathering round, then the step's own
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)


def test_channels_last_reaches_the_model(tmp_path):
    run = make_run(tmp_path / "a", channels_last=True, model_arg={"width": 4})
    seen = []
    run.trainer.model[3].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    next(run.advance())
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)
    assert not seen[-1].is_contiguous()


def test_learning_rates():
    def rates(schedule, *at):
        config = TrainConfig(lr=2.0, schedule=schedule)
        return [learning_rate(config, progress) for progress in at]

    assert rates("cosine", 0.0, 0.5, 1.0) == pytest.approx([2, 1, 0])
    assert rates("step", 0.0, 0.3, 0.6, 0.8) == pytest.approx([2, 0.4, 0.08, 0.016])
    assert rates("constant", 0.0, 0.99) == [2, 2]


def test_the_summary_is_of_the_splits_it_names(tmp_path):
    run = train_to_end(tmp_path / "a", epochs=6, train_examples=None, top_eigenvalue=True)
    summary = run.finish()
    model = run.trainer.model.eval()
    for name in ("train", "val", "test"):
        split = getattr(run.trainer.data, name)
        X, y = next(split.batches(len(split)))
        logits = model(X).detach()
        accuracy, loss = (logits.argmax(1) == y).float().mean(), F.cross_entropy(logits, y)
        assert summary[f"{name}_accuracy"] == pytest.approx(accuracy.item())
        assert name == "val" or summary[f"{name}_loss"] == pytest.approx(loss.item(), rel=1e-5)
    sure, right = F.softmax(logits, 1).max(1).values, (logits.argmax(1) == y).float()
    bins = [(sure > i / 15) & (sure <= (i + 1) / 15) for i in range(15)]
    gaps = sum((right[b].sum() - sure[b].sum()).abs() for b in bins) / len(y)
    assert summary["calibration_error"] == pytest.approx(gaps.item(), rel=1e-4)
    train = run.trainer.data.train
    top = top_eigenvalue(model, train, len(train), 0)
    assert summary["top_eigenvalue"] == pytest.approx(top, rel=1e-2)
    assert top_eigenvalue(model, run.trainer.data.test, 600, 0) != pytest.approx(top, rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_ends_at_the_logits(tmp_path, precision):
    run = make_run(tmp_path / "a", precision=precision, reg="trace=0.01", warmup=0)
    run.trainer.model.train()
    X, _ = next(run.trainer.data.train.batches(10))
    seen = []
    run.trainer.model[0].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    assert run.trainer.model(X).dtype == torch.float32
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]


def test_a_gradient_that_is_infinite_beside_a_finite_loss_moves_nothing(tmp_path):
    run = make_run(tmp_path / "a")
    before = weights(run)
    next(iter(run.trainer.model.parameters())).register_hook(lambda g: g * float("inf"))
    with pytest.raises(NumericsError, match="gradient's norm"):
        next(run.advance())
    params = dict(run.trainer.model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in params.items())
