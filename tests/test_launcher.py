"""What a launcher says in the environment, and which device each of a job's processes takes."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest
import torch

from hesstrace_cli.analysis.loading import select_device
from hesstrace_cli.distributed import launcher, parallel
from hesstrace_cli.distributed.launcher import Place
from hesstrace_cli.errors import ConfigError
from tests.conftest import assert_one_line_error, invoke

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
COMMANDS = [
    ["train"], ["estimate-trace", "x.pt"], ["estimate-trace", "x.pt", "y.pt"], ["compare"],
    ["compare", "--plan"], ["compare", "folder"], ["spectrum", "x.pt"], ["verify"],
]  # fmt: skip
JUNK = [
    *({name: text} for name, text in itertools.product(
        NAMES[:4], ("abc", "", "-1", "1.5", " 1", "٣", "9" * 5000))),
    {"WORLD_SIZE": "0"},
    {"WORLD_SIZE": "0", "RANK": "0"},
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    {"WORLD_SIZE": "1", "RANK": "1"},
    {"WORLD_SIZE": "2", "RANK": "2"},
    {"WORLD_SIZE": "2", "RANK": "x"},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "2"},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "-1"},
    {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "0"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def started(monkeypatch, **environment):
    for name, text in environment.items():
        monkeypatch.setenv(name, text)


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: str(junk)[:60])
def test_junk_is_refused_in_one_line_by_every_command(junk, monkeypatch):
    started(monkeypatch, **junk)
    for command in COMMANDS:
        assert_one_line_error(invoke(*command), 2, "torchrun")
        assert invoke(command[0], "--help").exit_code == 0
    assert invoke("--version").exit_code == 0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place()),
        ({"RANK": "3"}, Place()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Place()),
        ({"WORLD_SIZE": "2", "RANK": "1"}, Place(1, 2, 1, 2)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2"}, Place(3, 4, 1, 2)),
        (
            {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"},
            Place(5, 8, 0, 4),
        ),
    ],
)
def test_place(environment, expected, monkeypatch):
    started(monkeypatch, **environment)
    assert launcher.place() == expected


@pytest.mark.parametrize("command", COMMANDS[3:])
def test_commands_of_one_process(command, monkeypatch):
    started(monkeypatch, WORLD_SIZE="2", RANK="1")
    result = invoke(*command)
    assert result.exit_code == 2
    assert result.stderr.startswith("process 1: error:")
    assert "runs in one process" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "master",
    [{}, {"MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
     {"MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}],
)  # fmt: skip
@pytest.mark.parametrize("command", [["train"], ["estimate-trace", "x.pt"]])
def test_others_that_cannot_be_met(command, master, monkeypatch):
    parallel.join.cache_clear()
    started(monkeypatch, WORLD_SIZE="2", RANK="0", **master)
    assert_one_line_error(invoke(*command), 2, "the other processes of torchrun cannot be met")


def test_others_are_not_waited_for_forever(monkeypatch):
    parallel.join.cache_clear()
    monkeypatch.setattr(parallel, "_ARRIVAL", timedelta(seconds=1))
    started(monkeypatch, WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert_one_line_error_of_second(invoke("train"))


def assert_one_line_error_of_second(result):
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("process 1: error: the other processes of torchrun cannot be met")


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_its_own_gpu(name, monkeypatch):
    assert select_device(name) == torch.device("cuda")
    for rank in (0, 1):
        started(monkeypatch, WORLD_SIZE="2", RANK=str(rank))
        assert select_device(name) == torch.device("cuda", rank)
    started(monkeypatch, WORLD_SIZE="4", RANK="3", LOCAL_WORLD_SIZE="2", LOCAL_RANK="1")
    assert select_device(name) == torch.device("cuda", 1)
    started(monkeypatch, WORLD_SIZE="3", RANK="2", LOCAL_WORLD_SIZE="3", LOCAL_RANK="2")
    with pytest.raises(ConfigError, match="process 3 of 3 on this machine, which has 2 usable"):
        select_device(name)
    assert select_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    assert select_device("cuda:1") == torch.device("cuda", 1)
    started(monkeypatch, WORLD_SIZE="2", RANK="0")
    for name in ("cuda:0", "cuda:1"):
        with pytest.raises(ConfigError, match="puts 2 processes on one GPU"):
            select_device(name)
    assert_one_line_error(invoke("train", "--device", "cuda:0"), 2, "--device cuda")
    started(monkeypatch, LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")  # a machine each
    assert select_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda", 1)])
def test_how_they_talk(device, monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    monkeypatch.setattr(parallel, "rendezvous", lambda *_, **__: iter([("store", 1, 2)]))
    monkeypatch.setattr(
        torch.distributed, "init_process_group",
        lambda backend, **more: asked.update(more, backend=backend),
    )  # fmt: skip
    started(monkeypatch, WORLD_SIZE="2", RANK="1")
    parallel.join.cache_clear()
    assert parallel.join(device) == parallel.Ranks(1, 2)
    parallel.join.cache_clear()
    assert asked["backend"] == ("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    assert asked["device_id"] == (None if device.type == "cpu" else device)
