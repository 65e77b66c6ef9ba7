"""The command line, in process and as a real program: output, exit codes, one line an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from hesstrace_cli.storage.checkpoints import read_checkpoint
from tests.conftest import TINY, assert_one_line_error, invoke


def arrays(path, **changes):
    g = np.random.default_rng(0)
    content = {
        "x_train": g.normal(size=(40, 1, 6, 6)).astype(np.float32),
        "y_train": np.arange(40) % 3,
        "x_test": g.normal(size=(20, 1, 6, 6)).astype(np.float32),
        "y_test": np.arange(20) % 3,
    }
    np.savez(path, **{**content, **changes})
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--lambda", "-1", "--reg", "trace"], ["lambda", "-1"]),
        (["train", "--reg", "trace=-1"], ["trace", "-1"]),
        (["train", "--reg", "trac"], ["did you mean 'trace'"]),
        (["train", "--keep-prob", "0"], ["keep-prob", "more than 0"]),
        (["train", "--epochs", "two"], ["epochs", "whole number"]),
        (["train", "--lambda", "0.1"], ["--reg trace"]),
        (["train", "--no-such-flag"], ["no-such-flag"]),
        (["trian"], ["train"]),
        (["train", "--config", "missing.yaml"], ["missing.yaml"]),
        (["train", "--device", "tpu"], ["tpu"]),
        (["train", "--dataset", "nothing"], ["nothing"]),
        (["compare", "--reg", "none", "--reg", "none"], ["same"]),
        (["compare", "missing"], ["missing"]),
    ],
)
def test_wrong_usage(arguments, words):
    assert_one_line_error(invoke(*arguments), 2, *words)


def test_cuda_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    assert_one_line_error(invoke("train", "--device", "cuda"), 2, "cuda")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning-rate: 1", ["learning-rate", "unknown key"]),
        ("epoch: 1", ["'epochs'"]),
        ("lr: fast", ["lr", "a number"]),
        ("reg: [", ["YAML"]),
        ("- 1", ["list"]),
        ("lr: 1\nepochs: 2\nlr: 2", ["'lr' is there twice"]),
    ],
)
def test_wrong_config(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert_one_line_error(invoke("train", "--config", tmp_path / "c.yaml"), 2, *words)


def test_flags_win_over_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 3\nlr: 1e-2\ntrain_examples: 100\n")
    out = tmp_path / "run"
    result = invoke("train", "--config", tmp_path / "c.yaml", "--epochs", "1", "--out", out)
    assert result.exit_code == 0, result.output
    config = (out / "config.yaml").read_text()
    assert "epochs: 1\n" in config
    assert "lr: 0.01\n" in config
    assert "momentum: 0.9\n" in config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_train": np.zeros((0, 1, 6, 6)), "y_train": np.zeros(0, int)}, ["no examples"]),
        ({"x_train": np.full((40, 1, 6, 6), np.nan, np.float32)}, ["NaN"]),
        ({"y_train": np.full(40, -1)}, ["-1"]),
        ({"y_train": np.zeros(39, int)}, ["39 targets"]),
        ({"x_train": np.array(["a"])}, ["uint8, scaled"]),
    ],
)  # fmt: skip
def test_wrong_data(tmp_path, changes, words):
    path = arrays(tmp_path / "d.npz", **changes)
    assert_one_line_error(invoke("train", "--dataset", path), 3, *words)


def test_labels_beyond_num_classes(tmp_path):
    path = arrays(tmp_path / "d.npz")
    result = invoke("train", "--dataset", path, "--num-classes", "2")
    assert_one_line_error(result, 3, "0 to 2", "expected 0 to 1")


def test_missing_data(tmp_path):
    assert_one_line_error(invoke("train", "--dataset", "no.npz"), 3, "no.npz")
    assert_one_line_error(invoke("train", "--dataset", f"imagefolder:{tmp_path}"), 3, "train/")
    result = invoke("train", "--dataset", "mnist", "--data-dir", tmp_path)
    assert_one_line_error(result, 3, "--download")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    assert_one_line_error(invoke("train", "--dataset", tmp_path / "cut.npz"), 3, "cut.npz")


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("train", *TINY, "--out", tmp_path / "file" / "run")
    assert_one_line_error(result, 2, "file")


def test_a_diverging_run_exits_with_5(tmp_path):
    result = invoke("train", *TINY, "--lr", "1e30", "--out", tmp_path / "run")
    assert result.exit_code == 5
    assert "before the weights moved" in result.stderr


def test_plugins(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def model(num_classes, hidden=4):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, hidden),\n"
        "        torch.nn.Tanh(), torch.nn.Linear(hidden, num_classes))\n"
        "def data():\n"
        "    X, y = torch.randn(40, 1, 6, 6), torch.arange(40) % 3\n"
        "    return TensorDataset(X, y), TensorDataset(X, y)\n"
    )
    plugin = tmp_path / "mine.py"
    out = tmp_path / "run"
    result = invoke(
        "train", "--model", f"{plugin}:model", "--model-arg", "hidden=5", "--dataset",
        f"{plugin}:data", "--epochs", "1", "--reg", "trace", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert_one_line_error(invoke("estimate-trace", out / "last.pt"), 4, "repeat it: --model")
    model = ("--model", f"{plugin}:model")
    assert_one_line_error(invoke("estimate-trace", out / "last.pt", *model), 4, "--dataset")
    again = invoke("estimate-trace", out / "last.pt", *model, "--dataset", f"{plugin}:data")
    assert again.exit_code == 0, again.output


def test_compare_and_collect(tmp_path):
    out = tmp_path / "c"
    arguments = ("compare", *TINY, "--reg", "none", "--reg", "trace=0.01", "--seeds", "0,1")
    result = invoke(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    comparison = json.loads((out / "results.json").read_text())
    assert comparison["schema"] == "hesstrace/comparison/1"
    none, trace = comparison["rows"]
    assert (none["regularizer"], trace["regularizer"]) == ("none", "trace=0.01")
    assert trace["num_seeds"] == 2
    assert trace["difference_to_none"]["test_loss"]["mean"] == pytest.approx(
        trace["test_loss"]["mean"] - none["test_loss"]["mean"]
    )
    assert (out / "results.csv").is_file()
    assert "| none |" in (out / "results.md").read_text()
    before = time.monotonic()
    assert invoke(*arguments, "--out", out).exit_code == 0  # nothing is trained again
    assert invoke("compare", out).exit_code == 0
    assert json.loads((out / "results.json").read_text())["rows"] == comparison["rows"]
    assert time.monotonic() - before < 60


def test_a_run_that_diverges_leaves_the_others(tmp_path):
    result = invoke(
        "compare", *TINY, "--reg", "none", "--reg", "trace=1e30", "--warmup", "0", "--seeds", "0",
        "--out", tmp_path / "c",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "c" / "results.json").read_text())["rows"]
    assert [row["num_diverged"] for row in rows] == [0, 1]


def test_the_real_program(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "hesstrace_cli", *arguments],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip

    assert run("--version").stdout.startswith("hesstrace ")
    trained = run("train", *TINY, "--out", "r")
    assert trained.returncode == 0, trained.stderr
    assert "\x1b" not in trained.stdout + trained.stderr
    record = run("estimate-trace", "r/last.pt", "--json", "-", "--num-probes", "2")
    assert json.loads(record.stdout)["schema"] == "hesstrace/trace/1"
    resumed = run("train", "--resume", "--out", "r")
    assert resumed.returncode == 0
    assert "finished" in resumed.stderr
    wrong = run("train", "--keep-prob", "0")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom hesstrace_cli.cli import app\n"
        "try:\n    app(['train', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules\nassert 'scipy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_sigterm_saves_and_exits_with_143(tmp_path):
    command = [sys.executable, "-m", "hesstrace_cli", "train", "--epochs", "500", "--out", "r"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "epoch 1/500" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "--resume" in rest.splitlines()[-1]
    saved = read_checkpoint(tmp_path / "r" / "last.pt")
    assert saved.content["step"] >= 17


MODELS = """
import torch
from torch import nn

class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.t = nn.Linear(64, 10), nn.Parameter(torch.tensor(1.0))
    def forward(self, X):
        return self.linear(X.flatten(1)) * torch.exp(self.t)

class Pair(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
    def forward(self, X):
        logits = super().forward(X.flatten(1))
        return (logits, logits) if self.training else logits

class Centred(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
    def forward(self, X):
        logits = super().forward(X.flatten(1))
        return logits - logits.mean(0)

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh().square())

class OnceNet(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
    def forward(self, X):
        return Once.apply(super().forward(X.flatten(1)))
"""


def test_odd_models(tmp_path):
    """A 0-dim parameter; auxiliary outputs; no second derivative, which training does not need."""
    (tmp_path / "odd.py").write_text(MODELS)

    def train(name, *more):
        flags = ("--epochs", "1", "--train-examples", "60", "--out", tmp_path / name, *more)
        return invoke("train", "--model", f"{tmp_path}/odd.py:{name}", *flags)

    assert train("Temperature").exit_code == 0
    assert_one_line_error(train("Pair"), 4, "tuple", "training mode")
    assert not (tmp_path / "Pair").exists()
    assert train("Centred").exit_code == 0
    centred = (tmp_path / "Centred" / "last.pt", "--model", f"{tmp_path}/odd.py:Centred")
    estimated = invoke("estimate-trace", *centred, "--rtol", "0.3")
    assert "warning" in estimated.stderr
    assert "batch statistics" in estimated.stderr
    assert "method hutchinson" in estimated.stderr
    once = train("OnceNet")
    assert once.exit_code == 0, once.output
    assert "not known" in once.stdout
    summary = json.loads((tmp_path / "OnceNet" / "summary.json").read_text())
    assert summary["trace"]["trace"] is None
    assert "OnceNet" in summary["trace"]["reason"]


def test_one_example_left_over_sits_out_of_batch_statistics(tmp_path):
    (tmp_path / "flat.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))\n"
    )
    flags = ("--epochs", "1", "--train-examples", "73", "--val-fraction", "0", "--model")
    flat = f"{tmp_path}/flat.py:build"
    for model, name in ((flat, "a"), ("small-cnn", "b")):
        result = invoke("train", *flags, model, "--batch-size", "24", "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    one = invoke("train", *flags, flat, "--batch-size", "1", "--out", tmp_path / "c")
    assert_one_line_error(one, 2, "batch statistics")


@pytest.mark.parametrize(
    "flags",
    [
        ("--form", "example", "--curvature", "hessian"),
        ("--form", "example", "--compile", "--no-nesterov"),
        ("--sync-bn", "--accumulate", "2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_a_run(flags):
    for command in (("train",), ("compare", "--plan")):
        assert_one_line_error(invoke(*command, *flags), 2, flags[0], flags[-2])


def test_other_settings_are_not_taken_for_the_same_comparison(tmp_path):
    flags = (*TINY[2:], "--seeds", "0", "--reg", "none", "--out", tmp_path / "c")
    assert invoke("compare", *flags, "--epochs", "1").exit_code == 0
    assert_one_line_error(invoke("compare", *flags, "--epochs", "2"), 2, "epochs was 1, is 2")


@pytest.mark.parametrize(
    "value", ["cpu:", "cpu:3", "cuda:", "cuda:x", "gpu", "cuda:3000000000", "cuda:" + "9" * 5000]
)
def test_devices_that_are_none(value):
    assert_one_line_error(invoke("train", "--device", value), 2, value[:20])


def test_strengths_keep_all_their_digits(tmp_path):
    flags = (*TINY, "--seeds", "0", "--reg", "trace=0.123456789", "--reg", "trace=0.1234567")
    plan = invoke("compare", *flags, "--out", tmp_path / "c", "--plan").stdout
    assert "trace=0.123456789 " in plan
    assert "trace=0.1234567 " in plan


def test_a_full_disk_behind_stdout_and_a_terminal_without_unicode(checkpoint):
    command = [sys.executable, "-m", "hesstrace_cli", "estimate-trace", str(checkpoint)]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[0].startswith("error: the output cannot be written")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([*command, "--per-layer"], capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert b"? stderr" in result.stdout


PLUGINS = """
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

def needs(depth, num_classes):
    return nn.Linear(depth, num_classes)

def broken(num_classes):
    return nn.Linear(None, num_classes)

class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1), 0

class Of(Dataset):
    def __init__(self, example):
        self.example = example
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return self.example

def endless(): return Endless(), Endless()
def image(): return Of(("picture", 0)), Of(("picture", 0))
def word(): return Of((torch.zeros(3), "cat")), Of((torch.zeros(3), "cat"))
def bare(): return Of(torch.zeros(3)), Of(torch.zeros(3))
def folder(path): return Of(path), Of(path)
def good(): return Of((torch.zeros(3), 0)), Of((torch.zeros(3), 1))
"""


@pytest.mark.parametrize(
    ("flag", "name", "code", "words"),
    [
        ("--model", "needs", 4, ["missing 1 required positional argument: 'depth'", "num_classes"]),
        ("--dataset", "endless", 3, ["Endless", "with a length"]),
        ("--dataset", "image", 3, ["an input is a str", "expected a tensor"]),
        ("--dataset", "word", 3, ["target is 'cat'"]),
        ("--dataset", "bare", 3, ["an example is a Tensor"]),
        ("--dataset", "folder", 3, ["missing 1 required positional argument: 'path'"]),
    ],
)
def test_factories_that_do_not_fit(tmp_path, flag, name, code, words):
    (tmp_path / "plugins.py").write_text(PLUGINS)
    result = invoke("train", flag, f"plugins.py:{name}", "--out", "r")
    assert_one_line_error(result, code, *words)


def test_a_bug_in_a_factory_keeps_its_traceback(tmp_path):
    (tmp_path / "plugins.py").write_text(PLUGINS)
    result = invoke("train", "--model", "plugins.py:broken", "--out", "r")
    assert isinstance(result.exception, TypeError)


def test_image_size_of_a_plugin_is_the_plugins_own(tmp_path):
    (tmp_path / "plugins.py").write_text(PLUGINS)
    result = invoke("train", "--dataset", "plugins.py:good", "--image-size", "8", "--out", "r")
    assert_one_line_error(result, 2, "--image-size does not resize")
