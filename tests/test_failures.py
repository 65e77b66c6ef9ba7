"""A machine that fails is not mistaken for a model, a file or a peer that does."""

from __future__ import annotations

import ast
import errno
import importlib
import sys
import traceback
import zlib
from pathlib import Path

import pytest
import torch

import hesstrace_cli
from hesstrace_cli.distributed.parallel import meeting
from hesstrace_cli.failures import is_of_the_machine, is_out_of_memory
from hesstrace_cli.plugins import load_factory
from tests.conftest import assert_one_line_error, invoke

NO_MEMORY = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory"),
    RuntimeError("Storage size calculation overflowed with sizes=[100000000000000000, 64]"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
    zlib.error("Error -4 while decompressing data"),
    ImportError("libjpeg.so.62: failed to map segment from shared object"),
]
BROKEN = [
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RecursionError("maximum recursion depth exceeded"),
    RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. "),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in "
                 "a non-contiguous input."),
    RuntimeError("[gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:1024"),
    NotImplementedError("Trying to use forward AD with mkldnn_rnn_layer that does not support it"),
    RuntimeError("could not create a primitive descriptor for a matmul primitive"),
    zlib.error("Error -3 while decompressing data: incorrect header check"),
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
    ValueError("out of memory is what I am about"),
    ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard"),
    ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
]  # fmt: skip


@pytest.mark.parametrize("problem", NO_MEMORY, ids=repr)
def test_out_of_memory(problem):
    assert is_out_of_memory(problem)
    assert is_of_the_machine(problem)


@pytest.mark.parametrize("problem", BROKEN, ids=repr)
def test_a_part_of_the_machine_that_fails(problem):
    assert is_of_the_machine(problem)
    assert not is_out_of_memory(problem)


@pytest.mark.parametrize("problem", OTHERS, ids=repr)
def test_neither(problem):
    assert not is_of_the_machine(problem)


def test_torch_is_not_needed(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    module = importlib.reload(importlib.import_module("hesstrace_cli.failures"))
    assert not module.is_of_the_machine(ValueError("no"))
    assert module.is_out_of_memory(MemoryError())
    assert "torch" not in sys.modules


def test_memory_that_no_machine_has():
    result = invoke("train", "--num-classes", 2 * 10**9, "--model-arg", "width=200")
    assert_one_line_error(result, 2, "out of memory", "--batch-size")


def test_a_process_out_of_memory_is_not_alone():
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"), meeting():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")


ASKED = ("is_of_the_machine", "is_out_of_memory", "derivative_error", "_explained")
# Errors of matplotlib; damaged archives, which ask for any size.
LOOKED_AT = {
    "plots.py:save", "sources.py:_npz", "hugging_face.py:hugging_face", "text.py:_of_folder",
}  # fmt: skip


def test_nobody_catches_runtime_errors_unasked():
    """A handler that takes them, or all exceptions, passes on those of the machine."""
    package = Path(hesstrace_cli.__file__).parent
    unasked, handlers = [], 0
    for file in package.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if not isinstance(node, ast.ExceptHandler):
                    continue
                names = {n.id for n in ast.walk(node.type or node) if isinstance(n, ast.Name)}
                if not names & {"RuntimeError", "ImportError", "Exception", "_NO_DERIVATIVE"}:
                    continue
                handlers += 1
                text = "".join(map(ast.unparse, node.body))
                place = f"{file.name}:{function.name}"
                if not any(f"{name}(" in text for name in ASKED) and place not in LOOKED_AT:
                    unasked.append(place)
    assert handlers > 15
    assert not unasked


PLUGIN = """
import torch
from torch import nn

class Failing(nn.Module):
    calls = None  # set by the test

    def __init__(self):
        super().__init__()
        type(self).calls()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10))

    def forward(self, X):
        type(self).calls()
        return self.net(X)
"""
DATA = ["--dataset", "digits", "--device", "cpu"]
TRAIN = [*DATA, "--epochs", 1, "--train-examples", 40, "--warmup", 0, "--reg", "trace=0.01"]
ESTIMATE = ["--num-examples", 20, "--device", "cpu", "--max-passes", 1]
COMMANDS = {
    "train G": ["train", *TRAIN],
    "train H": ["train", *TRAIN, "--curvature", "hessian"],
    "estimate": ["estimate-trace", "{checkpoint}", *ESTIMATE],
    "estimate G by probes": [
        "estimate-trace", "{checkpoint}", *ESTIMATE, "--curvature", "ggn", "--method", "hutchinson"
    ],
    "xtrace": ["estimate-trace", "{checkpoint}", *ESTIMATE, "--method", "xtrace"],
    "spectrum": ["spectrum", "{checkpoint}", "--num-examples", 20, "--steps", 3, "--top", 1,
                 "--num-probes", 1, "--num-directions", 1],
    "verify": ["verify", *DATA],
}  # fmt: skip


class Calls:
    """Notes from where the model is called, and fails at one of these places."""

    def __init__(self):
        self.places, self.failing, self.problem = {}, None, None

    def __call__(self):
        frames = traceback.extract_stack()
        place = tuple((f.name, f.lineno) for f in frames if "hesstrace_cli" in f.filename)
        self.places.setdefault(place)
        if self.failing is not None and place == self.failing:
            raise self.problem


@pytest.fixture
def run(tmp_path):
    """Runs a command in which the model fails at a place, and gives the calls and the result."""
    file = tmp_path / "model.py"
    file.write_text(PLUGIN)
    numbers = iter(range(10**6))

    def run(command, place=None, problem=None):
        calls = Calls()
        calls.failing, calls.problem = place, problem
        out = tmp_path / f"run{next(numbers)}"
        words = [str(word).format(checkpoint=tmp_path / "trained" / "last.pt") for word in command]
        more = ["--out", out] if command[0] == "train" else []
        load_factory(f"{file}:Failing", ValueError).calls = staticmethod(calls)
        return calls, invoke(*words, "--model", f"{file}:Failing", *more)

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_wherever_the_model_is_called(run, tmp_path, name):
    command = COMMANDS[name]
    if command[0] in ("estimate-trace", "spectrum"):
        _, result = run(COMMANDS["train G"])
        assert result.exit_code == 0, result.output
        (tmp_path / "run0").rename(tmp_path / "trained")
    calls, result = run(command)
    assert result.exit_code in (0, 5), result.output + repr(result.exception)
    assert len(calls.places) > 3
    for number, place in enumerate(calls.places):
        if number % 2:
            broken = torch.AcceleratorError("CUDA error: unspecified launch failure")
            _, result = run(command, place, broken)
            assert result.exception is broken, (place, result.output)  # a traceback
            continue
        _, result = run(command, place, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
        assert result.exit_code == 2, (place, result.output, result.exception)
        assert "error: out of memory (CUDA" in result.stderr.strip().splitlines()[-1], place
