"""A run that is killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import random
import time

import pytest
import torch

from hesstrace_cli.errors import ConfigError
from hesstrace_cli.storage.checkpoints import read_checkpoint, save_checkpoint
from hesstrace_cli.storage.files import leftovers
from hesstrace_cli.training.run import Run
from tests.conftest import make_run, train_to_end

KILLS = 20
SETTINGS = {"reg": "trace=0.01", "epochs": 8, "batch_size": 16, "momentum": 0.9}


def train_resumed(out):
    train_to_end(out, resume_or_start=True, **SETTINGS).finish()


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


def test_killed_at_twenty_random_moments(tmp_path):
    begin = time.monotonic()
    train_to_end(tmp_path / "whole", **SETTINGS).finish()
    seconds = time.monotonic() - begin
    context = multiprocessing.get_context("forkserver")  # imports torch once for all of them
    context.set_forkserver_preload(["hesstrace_cli.training.run"])
    warm = context.Process(target=int)
    warm.start()
    warm.join()
    moments = random.Random(0)
    out = tmp_path / "killed"
    lengths = set()
    for kill in range(5 * KILLS):
        if kill >= KILLS and len(lengths) > 1:
            break  # else the machine is busy: more kills, and later ones
        process = context.Process(target=train_resumed, args=(out,))
        process.start()
        process.join(moments.uniform(0, seconds / 3) * (1 + kill / KILLS))
        process.kill()
        process.join()
        if (out / "metrics.jsonl").is_file():
            lengths.add(len((out / "metrics.jsonl").read_text().splitlines()))
    assert len(lengths) > 1, "the kills fell into one epoch"
    train_resumed(out)
    assert not leftovers(out)

    assert records(out) == records(tmp_path / "whole")
    for name in ("last.pt", "best.pt"):
        whole, killed = (read_checkpoint(f / name).content for f in (tmp_path / "whole", out))
        assert all(torch.equal(v, killed["state_dict"][k]) for k, v in whole["state_dict"].items())
        momentum = [c["optimizer"]["state"][0]["momentum_buffer"] for c in (whole, killed)]
        assert torch.equal(*momentum)


class Killed(BaseException):
    """Stands for the end of the process between two writes, which a random kill seldom hits."""


@pytest.mark.parametrize("call", range(3))
def test_killed_between_two_writes(tmp_path, monkeypatch, call):
    settings = {"epochs": 2, "reg": "none"}
    whole = train_to_end(tmp_path / "whole", **settings)
    run, save, calls = make_run(tmp_path / "r", **settings), Run._save, []

    def save_or_die(self, path):  # the line of the epoch is written; best.pt or last.pt is not
        calls.append(path)
        if len(calls) > call:
            raise Killed
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", save_or_die)
        with pytest.raises(Killed):
            list(run.advance())
    run.lock.release()
    again = train_to_end(tmp_path / "r", resume=True, **settings)
    assert records(tmp_path / "r") == records(tmp_path / "whole")
    for k, v in whole.trainer.model.state_dict().items():
        assert torch.equal(v, again.trainer.model.state_dict()[k])


def test_what_a_killed_start_left_is_no_run(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".hesstrace-0123456789abcdef.tmp").write_text("seed: 0\nhalf")
    train_to_end(tmp_path / "r")
    assert not list((tmp_path / "r").glob(".*"))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    run = make_run(tmp_path / "r")
    steps = run.advance()
    while next(steps).record is None:
        pass
    good = (tmp_path / "r" / "last.pt").read_bytes()
    real_save = torch.save

    def full(content, file):
        real_save(content, file)
        file.truncate(len(good) // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match="No space left"):
        save_checkpoint(tmp_path / "r" / "last.pt", {"a": 1})
    assert (tmp_path / "r" / "last.pt").read_bytes() == good
    assert not leftovers(tmp_path / "r")
