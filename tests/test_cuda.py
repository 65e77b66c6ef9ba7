"""On a CUDA device that is not there, commands give what they give on the CPU, and wait seldom."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or sys.platform != "linux" or shutil.which("c++") is None,
    reason="needs Linux, a CUDA build of torch (no GPU) and a C++ compiler",
)
COMMANDS = ("train G", "train H", "train lstm", "exact", "hutchinson", "lstm, G", "spectrum")
COMPARED = ("train_loss", "test_loss", "trace", "loss", "eigenvalues", "input_jacobian", "flatness")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """In a process of its own: the device is made before torch is imported."""
    folder = tmp_path_factory.mktemp("cuda")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakecuda.commands", str(folder)], cwd=ROOT, text=True,
        capture_output=True, timeout=580,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def numbers(record):
    """The figures that do not depend on the device, but to rounding."""

    def flat(value):
        if isinstance(value, dict):
            return [
                x for k in sorted(value) if k not in ("seconds", "seed") for x in flat(value[k])
            ]
        if isinstance(value, list):
            return [x for each in value for x in flat(each)]
        return [float(value)] if isinstance(value, (int, float)) else []

    return [x for key in COMPARED if key in record for x in flat(record[key])]


@pytest.mark.parametrize("name", COMMANDS)
def test_as_on_the_cpu(found, name):
    cpu, cuda = (found["commands"][name][device] for device in ("cpu", "cuda"))
    assert cpu["exit_code"] == cuda["exit_code"] == 0, cpu.get("error", "") + cuda.get("error", "")
    assert cuda["device"].startswith("cuda")
    assert cpu["device"] == "cpu"
    if name == "train lstm":
        # Its trace is drawn until an interval is short, and rounding decides after which pass that
        # is; "lstm, G" has one of a pass.
        cpu, cuda = ({k: v for k, v in record.items() if k != "trace"} for record in (cpu, cuda))
    assert numbers(cpu)
    # Trained with convolutions in TF32, as a GPU does; measured in float32.
    rel = 5e-3 if name.startswith("train") else 1e-4
    assert numbers(cuda) == pytest.approx(numbers(cpu), rel=rel, abs=1e-6)


def checks(record, without):
    """What a verification says, with the figures of what is right, but for some checks."""
    rows = [row for row in record["rows"] if not any(part in row["check"] for part in without)]
    figures = [
        row["detail"].split(", by differences ") for row in rows if row["verdict"] == "right"
    ]
    return [(row["check"], row["verdict"]) for row in rows], [
        float(x) for two in figures for x in two
    ]


RULES = "norm rule of"  # an LSTM is one operation on CUDA, and has none
# An LSTM has no forward derivative on CUDA, with cuDNN or without it.
FORWARD = ("taylor mode", "forward mode")


@pytest.mark.parametrize(("name", "without"), [("verify", ()), ("verify lstm", FORWARD)])
def test_verified_as_on_the_cpu(found, name, without):
    cpu, cuda = (found["commands"][name][device] for device in ("cpu", "cuda"))
    assert cpu["exit_code"] == cuda["exit_code"] == 0, cpu.get("error", "") + cuda.get("error", "")
    assert cuda["device"].startswith("cuda")
    assert cuda["dtype"] == cpu["dtype"] == "float64"
    verdicts, figures = checks(cpu, (*without, RULES))
    same_verdicts, same_figures = checks(cuda, (*without, RULES))
    assert same_verdicts == verdicts
    assert same_figures == pytest.approx(figures, rel=1e-5)
    others = [
        row["verdict"] for row in cuda["rows"] if any(part in row["check"] for part in without)
    ]
    assert set(others) <= {"no"}, "what is refused where another mode is right"
    assert {row["verdict"] for row in cuda["rows"] if RULES in row["check"]} == {"right"}


def test_waits(found):
    waits = {name: sum(each["waits"].values()) for name, each in found["waits"].items()}
    for name in ("none", "trace", "trace of H", "mixup", "ema"):
        assert waits[name] <= 5, found["waits"][name]
    assert waits["an evaluation"] <= 3, found["waits"]  # of twelve batches
    assert waits["24 products"] <= 4, found["waits"]


def test_sums_are_in_a_fixed_order(found):
    assert not any(each.get("unordered") for each in found["waits"].values())
