"""A batch in parts gives what the whole batch gives."""

from __future__ import annotations

import json

import pytest
import torch

from hesstrace_cli.distributed.parallel import ALONE, Ranks
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.training.step import split_batch
from tests.conftest import make_run, train_to_end

SMALL = {"model_arg": {"width": 4, "norm": "none"}, "epochs": 2, "batch_size": 25}
PENALTIES = [
    {"reg": "none"},
    {"reg": "trace=0.01", "num_probes": 2, "warmup": 0},
    {"reg": "trace=0.01", "dropout_scheme": "entry", "warmup": 0},
    {"reg": "trace=0.01", "dropout_scheme": "block", "keep_prob": 0.3, "warmup": 0},
    {"reg": "trace=0.003", "curvature": "hessian", "warmup": 0},
    {"reg": "confidence=0.1,label-smoothing=0.1"},
]


def weights_of(run):
    return dict(run.trainer.model.state_dict())


def assert_close(a, b, **tolerance):
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, **{"rtol": 1e-4, "atol": 2e-6, **tolerance})


@pytest.mark.parametrize("penalty", PENALTIES)
def test_accumulation_equals_the_big_batch(tmp_path, penalty):
    settings = {**SMALL, **penalty}
    whole = train_to_end(tmp_path / "a", **settings)
    parts = train_to_end(tmp_path / "b", accumulate=4, **settings)  # 25 as 7, 6, 6, 6
    assert_close(weights_of(whole), weights_of(parts))
    records = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in "ab"
    ]
    for a, b in zip(*records, strict=True):
        for key in ("train_loss", "train_accuracy", "penalty_trace"):
            assert b[key] == (None if a[key] is None else pytest.approx(a[key], rel=1e-4))


def test_accumulation_counts_its_statistics_once(tmp_path):
    settings = {"reg": "trace=0.01,dropout=0.5", "accumulate": 2, "warmup": 0}
    run = train_to_end(tmp_path / "a", **settings)
    counts = [b for n, b in run.trainer.model.named_buffers() if "num_batches" in n]
    assert counts
    assert all(int(c) == 2 * run.trainer.total_steps for c in counts)  # once a part, not twice


@pytest.mark.parametrize("reg", ["sam", "asam", "grad-norm=0.1", "grad-norm-fd"])
def test_what_needs_the_whole_batch_is_refused(tmp_path, reg):
    with pytest.raises(
        ConfigError, match=f"--reg {reg.split('=')[0]} needs the gradient of the whole batch"
    ):
        make_run(tmp_path / "a", reg=reg, accumulate=2)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_examples", [1, 2, 4, 5, 17])
@pytest.mark.parametrize("least", [1, 2])
def test_every_example_has_its_weight_once(size, num_examples, least):
    if num_examples < least:
        return
    parts = [
        part
        for rank in range(size)
        for part in split_batch(num_examples, Ranks(rank, size), rounds=3, least=least)
    ]
    weight = torch.zeros(num_examples)
    for part in parts:
        assert len(part.rows) >= least
        weight[part.rows] += part.share / len(part.rows)
    torch.testing.assert_close(weight, torch.full((num_examples,), 1 / num_examples))
    (whole,) = split_batch(num_examples, ALONE, rounds=1, least=1)
    assert (len(whole.rows), whole.share) == (num_examples, 1)
