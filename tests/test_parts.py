"""A batch in parts, over rounds and processes, gives what the whole batch gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from hesstrace_cli.checkpoints import read_checkpoint
from hesstrace_cli.cli import app
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.parallel import ALONE, Ranks
from hesstrace_cli.steps import split_batch
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
    return dict(run.model.state_dict())


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


def test_accumulation_leaves_statistics_and_dropout_masks_of_one_pass(tmp_path):
    settings = {"reg": "trace=0.01,dropout=0.5", "accumulate": 2, "warmup": 0}
    run = train_to_end(tmp_path / "a", **settings)
    counts = [b for n, b in run.model.named_buffers() if "num_batches" in n]
    assert counts
    assert all(int(c) == 2 * run.total_steps for c in counts)  # once a part, not twice


@pytest.mark.parametrize("reg", ["sam", "grad-norm=0.1"])
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
    assert split_batch(num_examples, ALONE, rounds=1, least=1)[0].is_whole


def torchrun(processes, *arguments):
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
        "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
        "-m", "hesstrace_cli", *map(str, arguments),
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


TRAIN = (
    "train", "--epochs", "2", "--train-examples", "203", "--batch-size", "30",
    "--model-arg", "width=4", "--model-arg", "norm=none", "--warmup", "0",
)  # fmt: skip


@pytest.mark.parametrize(
    "penalty",
    [["--reg", "trace=0.01"], ["--reg", "trace=0.003", "--curvature", "hessian"]],
)
def test_two_processes_give_the_same_weights(tmp_path, penalty):
    flags = [*TRAIN, *penalty]
    one = subprocess.run(
        [sys.executable, "-m", "hesstrace_cli", *flags, "--out", str(tmp_path / "one")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    two = torchrun(2, *flags, "--out", tmp_path / "two", "--accumulate", "2")
    assert two.returncode == 0, two.stderr
    a, b = (read_checkpoint(tmp_path / n / "last.pt").state_dict for n in ("one", "two"))
    assert_close(a, b)
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two")]
    assert summaries[1]["test_loss"] == pytest.approx(summaries[0]["test_loss"], rel=1e-4)
    assert two.stdout.count("test accuracy") == 1  # one process speaks
    assert one.stdout.count("test accuracy") == 1
    again = torchrun(2, *flags, "--out", tmp_path / "two", "--accumulate", "2", "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("nothing to do") == 1


@pytest.mark.parametrize(
    "penalty",
    [["--reg", "trace=0.01"], ["--reg", "trace=0.0003", "--curvature", "hessian"]],
)
def test_synced_batch_norm_is_that_of_one_process(tmp_path, penalty):
    """The last batch has 4 examples: processes 0 and 1 share them, and 2 has none."""
    flags = ["train", "--epochs", "2", "--train-examples", "64", "--batch-size", "20",
             "--val-fraction", "0", "--model-arg", "width=4", "--warmup", "0"]  # fmt: skip
    flags += penalty
    subprocess.run(
        [sys.executable, "-m", "hesstrace_cli", *flags, "--out", str(tmp_path / "one")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    three = torchrun(3, *flags, "--out", tmp_path / "three", "--sync-bn")
    assert three.returncode == 0, three.stderr
    a, b = (read_checkpoint(tmp_path / n / "last.pt").state_dict for n in ("one", "three"))
    assert any("running_var" in name for name in a)
    assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["exact", "hutchinson", "xtrace"])
def test_estimate_over_two_processes(tmp_path, method):
    run = train_to_end(tmp_path / "r", model_arg={"width": 4}, epochs=4)
    flags = ["estimate-trace", run.folder.last, "--method", method, "--batch-size", "50",
             "--per-layer", "--num-probes", "20" if method != "xtrace" else "60"]  # fmt: skip
    two = torchrun(2, *flags, "--json", tmp_path / "two.json")
    assert two.returncode == 0, two.stderr
    one = subprocess.run(
        [sys.executable, "-m", "hesstrace_cli", *map(str, flags), "--json", "-"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    a, b = json.loads(one.stdout), json.loads((tmp_path / "two.json").read_text())
    if method == "hutchinson":  # other probes
        assert a["trace"] != b["trace"]
        assert abs(a["trace"] - b["trace"]) < 4 * (a["stderr"] ** 2 + b["stderr"] ** 2) ** 0.5
    else:
        assert b["trace"] == pytest.approx(a["trace"], rel=1e-5)
        assert b["stderr"] == pytest.approx(a["stderr"], rel=1e-3, abs=1e-12)
    assert two.stdout.count("trace of the Hessian") == 1


def test_commands_of_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for command in (["compare"], ["spectrum", "x.pt"], ["verify"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert result.stderr.startswith("process 1: error:")
        assert "runs in one process" in result.stderr
