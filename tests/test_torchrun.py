"""Several processes of one job: the same weights as one, and an end to it however it comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hesstrace_cli.cli.signals import StopRequest
from hesstrace_cli.storage.checkpoints import read_checkpoint
from tests.conftest import train_to_end
from tests.test_parts import assert_close


def start(processes, *arguments):
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
        "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
        "-m", "hesstrace_cli", *map(str, arguments),
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True,
    )  # fmt: skip


def torchrun(processes, *arguments):
    process = start(processes, *arguments)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


TRAIN = (
    "train", "--epochs", "2", "--train-examples", "203", "--batch-size", "30",
    "--model-arg", "width=4", "--model-arg", "norm=none", "--warmup", "0",
)  # fmt: skip


@pytest.mark.parametrize(
    "penalty",
    [
        ["--reg", "trace=0.01,ema=0.9"],
        pytest.param(["--reg", "trace=0.003", "--curvature", "hessian"], marks=pytest.mark.slow),
        pytest.param(
            ["--reg", "trace=0.01", "--form", "example", "--shard"], marks=pytest.mark.slow
        ),
    ],
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
    lines = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        a, b = json.loads(a), json.loads(b)
        for key in ("train_loss", "train_accuracy", "penalty_trace", "val_loss"):
            assert b[key] == pytest.approx(a[key], rel=1e-3)
    assert two.stdout.count("test accuracy") == 1  # one process speaks
    assert one.stdout.count("test accuracy") == 1
    again = torchrun(2, *flags, "--out", tmp_path / "two", "--accumulate", "2", "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("nothing to do") == 1


@pytest.mark.parametrize(
    "penalty",
    [
        ["--reg", "trace=0.01"],
        pytest.param(["--reg", "trace=0.0003", "--curvature", "hessian"], marks=pytest.mark.slow),
    ],
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


def to_whole_group(process):
    """Ctrl-C at a terminal: the processes get it, and then once more from torchrun."""
    os.killpg(process.pid, signal.SIGINT)


def kill_second(process):
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[1]), signal.SIGKILL)


LONGER = [*TRAIN, "--reg", "trace=0.01,dropout=0.3", "--epochs", "30"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = torchrun(2, *LONGER, "--out", out)
    assert done.returncode == 0, done.stderr
    return read_checkpoint(out / "last.pt").state_dict


@pytest.mark.parametrize(
    ("end", "said"),
    [
        pytest.param(
            subprocess.Popen.terminate,
            "error: stopped by signal 15 in epoch",
            marks=pytest.mark.slow,
        ),
        (to_whole_group, "error: stopped by signal 2 in epoch"),
        (kill_second, "error: another process of the job is gone"),
    ],
)
def test_job_that_is_ended_goes_on_to_the_same_weights(tmp_path, uninterrupted, end, said):
    process = start(2, *LONGER, "--out", tmp_path / "ended")
    metrics = tmp_path / "ended" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.05)
    end(process)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said in stderr
    assert read_checkpoint(tmp_path / "ended" / "last.pt").content["step"] < 30 * 7
    again = torchrun(2, *LONGER, "--out", tmp_path / "ended", "--resume")
    assert again.returncode == 0, again.stderr
    resumed = read_checkpoint(tmp_path / "ended" / "last.pt").state_dict
    assert_close(uninterrupted, resumed, rtol=0, atol=0)


def test_a_second_signal_kills_but_not_at_once():
    begun = time.monotonic()
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # as a launcher passes it on
        assert stop() == signal.SIGINT
        time.sleep(1.1 - (time.monotonic() - begun))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
