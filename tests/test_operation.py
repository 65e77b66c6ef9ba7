"""As scripts and people run it: streams that are closed or full, signals, children, plug-ins."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hesstrace_cli.storage.locks import FolderLock
from tests.conftest import TINY, assert_one_line_error, invoke

HESS = f"{sys.executable} -m hesstrace_cli"
TRAIN = f"{HESS} train --epochs 2 --train-examples 64 --model mlp --out r"
QUICK = "--method hutchinson --num-probes 1 --num-examples 16"


def shell(command, cwd, limit=120):
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, capture_output=True, text=True, timeout=limit,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize(
    "streams",
    ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-", "2> >(exec true)", "> >(exec true)"],
)
def test_training_goes_on_without_anybody_to_tell(tmp_path, streams):
    done = shell(f"{TRAIN} {streams}", tmp_path)
    assert done.returncode == 0
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["epochs"] == 2
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("train --lr -1 2>&-", 2),
        ("train --lr -1 <&- >&- 2>/dev/full", 2),
        ("estimate-trace {} --json - >&-", 2),
        ("estimate-trace {} >&-", 2),
        ("estimate-trace {} >/dev/full", 2),
        ("estimate-trace {} 2>&-", 0),
        ("compare --plan >/dev/full", 2),
        ("--version >/dev/full", 2),
        ("train --help >/dev/full", 2),
        ("estimate-trace {} --json - | true; exit ${{PIPESTATUS[0]}}", 1),
    ],
)
def test_a_result_that_cannot_be_written_is_an_error(tmp_path, checkpoint, command, code):
    estimate = f"{checkpoint} {QUICK}"
    done = shell(f"{HESS} {command.format(estimate)}", tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if code == 2 and "2>" not in command:
        assert [line.startswith("error: ") for line in done.stderr.splitlines()].count(True) == 1


SLOW = """
import time
from torch import nn
from hesstrace_cli.models.small import MLP

print("loading", flush=True)
if {place!r} == "import":
    time.sleep(60)

class Slow(MLP):
    def forward(self, X):
        if {place!r} == "summary" and not self.training and len(X) > 40:
            print("summary", flush=True)
            time.sleep(60)
        return super().forward(X)

def build(num_classes, in_shape):
    if {place!r} == "build":
        print("build", flush=True)
        time.sleep(60)
    return Slow(num_classes, in_shape)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("place", ["import", "build", "summary"])
def test_a_signal_outside_the_loop_is_one_line(tmp_path, place, number, code):
    (tmp_path / "slow.py").write_text(SLOW.format(place=place))
    flags = ["--epochs", "1", "--train-examples", "50", "--val-fraction", "0", "--out", "r"]
    command = [sys.executable, "-m", "hesstrace_cli", "train", "--model", "slow.py:build", *flags]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        sign = "loading" if place == "import" else place
        while process.stdout.readline().strip() != sign:
            assert process.poll() is None
        time.sleep(0.2)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    errors = [line for line in err.splitlines() if "epoch 1/1" not in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: stopped by signal {int(number)}")
    if place == "summary":
        assert "--resume --out r" in errors[0]
        (tmp_path / "slow.py").write_text(SLOW.format(place="nowhere"))
        assert invoke("train", "--resume", "--out", "r").exit_code == 0
        assert (tmp_path / "r" / "summary.json").is_file()


EARLY = {
    "before": "cli.streams.secure = signalled",
    "parsing": "TyperGroup.parse_args = signalled",
    "told": "cli.boundary._report = signalled; sys.argv.append('--nothing')",
}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("place", EARLY)
def test_a_signal_outside_a_command_is_one_line(tmp_path, place, number, code):
    (tmp_path / "program.py").write_text(
        "import os, sys\nfrom typer.core import TyperGroup\n"
        "from hesstrace_cli import __main__, cli\n"
        f"def signalled(*_):\n    os.kill(os.getpid(), {int(number)})\n"
        f"sys.argv = ['hesstrace', 'train']\n{EARLY[place]}\n__main__.main()\n"
    )
    done = shell(f"{sys.executable} program.py", tmp_path)
    assert done.returncode == code
    assert done.stderr == f"error: stopped by signal {int(number)}\n"


def test_a_signal_that_code_swallows_still_stops_the_training(tmp_path):
    (tmp_path / "swallow.py").write_text(
        "import os, signal\nfrom hesstrace_cli.models.small import MLP\n"
        "def build(num_classes, in_shape):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException:\n        pass\n    return MLP(num_classes, in_shape)\n"
    )
    done = shell(f"{HESS} train --epochs 9 --model swallow.py:build --out r", tmp_path)
    assert done.returncode == 143
    assert "stopped by signal 15 in epoch 1" in done.stderr


def processes_of(marker):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker in (folder / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc here")
def test_jobs_save_and_end_when_their_parent_is_killed(tmp_path):
    out = tmp_path / "c"
    flags = ["--epochs", "400", "--train-examples", "300", "--seeds", "0", "--reg", "none",
             "--reg", "sam", "--jobs", "2", "--out", str(out)]  # fmt: skip
    command = [sys.executable, "-m", "hesstrace_cli", "compare", *flags]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as parent:
        end = time.monotonic() + 120
        while len(list(out.glob("runs/*/last.pt"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        parent.kill()
    end = time.monotonic() + 30
    while processes_of(str(out)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_of(str(out))
    logs = [log.read_text() for log in out.glob("runs/*.log")]
    assert len(logs) == 2
    assert all("stopped by signal 15 in epoch" in log for log in logs)


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    lock = FolderLock(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # as a data loader's worker, when its parent has been killed
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    lock.release()
    FolderLock(tmp_path).release()
    os.write(write, b"x")
    os.waitpid(child, 0)
    for handle in (read, write):
        os.close(handle)


def test_a_lock_is_free_before_a_forked_process_has_run(tmp_path):
    lock = FolderLock(tmp_path)
    held = os.dup(lock._handle)  # as the process has it until its first line
    lock.release()
    FolderLock(tmp_path).release()
    os.close(held)


def test_a_forked_process_does_not_let_go_of_its_parents_lock(tmp_path):
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    held = shell(
        f"{sys.executable} -c 'import sys; from pathlib import Path; "
        "from hesstrace_cli.storage.locks import FolderLock; FolderLock(Path(sys.argv[1]))' "
        f"{tmp_path}",
        tmp_path,
    )
    assert "in use by another process" in held.stderr
    lock.release()


EXITS = """
import sys
import torch
from hesstrace_cli.models.small import MLP
from hesstrace_cli.regularizers import Regularizer

def leave(where):
    if where == {place!r}:
        {call}

leave("import")

class Own(MLP):
    def forward(self, X):
        leave("forward")
        return super().forward(X)

class Data(torch.utils.data.Dataset):
    targets = [0, 1] * 20
    def __len__(self):
        return 40
    def __getitem__(self, index):
        if index:
            leave("example")
        return torch.ones(1, 8, 8) * index, index % 2

class Reg(Regularizer):
    def __init__(self, strength, config):
        leave("regularizer")
    def transform(self, X, y, generator):
        leave("step")
        return X, y

def build(num_classes, in_shape):
    leave("model")
    return Own(num_classes, in_shape)

def data():
    leave("data")
    return Data(), Data()
"""


@pytest.mark.parametrize("call", ["sys.exit(0)", "exit()", "raise SystemExit"])
@pytest.mark.parametrize(
    "place", ["import", "model", "forward", "data", "example", "regularizer", "step"]
)
def test_code_that_ends_the_program_has_not_done_the_work(tmp_path, place, call):
    (tmp_path / "own.py").write_text(EXITS.format(place=place, call=call))
    plugins = ("--model", "own.py:build", "--dataset", "own.py:data")
    flags = (*plugins, "--epochs", "1", "--val-fraction", "0", "--out", "r")
    result = invoke("train", *flags, "--reg", "own.py:Reg=1")
    assert result.exit_code in (2, 3, 4), result.output
    assert_one_line_error(result, result.exit_code, "own.py")
    if place not in ("regularizer", "step"):
        assert invoke("verify", *plugins).exit_code in (3, 4)
    assert not (tmp_path / "r" / "summary.json").exists()


@pytest.mark.parametrize("call", ["sys.exit(0)", "os.kill(os.getpid(), 9)", "os._exit(0)"])
def test_a_worker_that_is_gone_is_one_line(tmp_path, call):
    (tmp_path / "own.py").write_text(EXITS.format(place="example", call=f"import os; {call}"))
    flags = ["--epochs", "1", "--model", "mlp", "--dataset", "own.py:data", "--num-workers", "1"]
    done = shell(f"{HESS} train {' '.join(flags)} --out r", tmp_path)
    assert done.returncode == 3, done.stderr
    assert [
        line.startswith("error: a process that reads") for line in done.stderr.splitlines()
    ] == [True]


def test_a_job_that_ends_with_0_and_no_summary_has_failed(tmp_path):
    (tmp_path / "own.py").write_text(
        "import os\nfrom hesstrace_cli.models.small import MLP\n"
        "def build(num_classes, in_shape):\n    os._exit(0)\n"
    )
    result = invoke(
        "compare", *TINY[:4], "--model", "own.py:build", "--reg", "none", "--seeds", "0",
        "--jobs", "2", "--out", "c",
    )  # fmt: skip
    assert_one_line_error(result, 1, "failed", "no message")
