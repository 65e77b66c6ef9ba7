"""The examples of other loops, as they are: each runs in seconds and the penalty does its work."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "loops"


@pytest.fixture(autouse=True)
def quiet():
    """What other libraries warn of is not this project's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_plain_loop():
    module = example("plain")
    data = module.DataLoader(module.make_data(), batch_size=128)
    free, held = (
        module.hesstrace_cli.estimate_trace(module.train(strength, epochs=10), data).value
        for strength in (0.0, 0.01)
    )
    assert held < 0.8 * free


def test_hugging_faces_trainer():
    pytest.importorskip("transformers")
    module = example("hugging_face")
    loss, trace = module.main(max_steps=2)
    assert 0 < loss < 2 * math.log(16)
    assert trace > 0


def test_parts_of_an_accumulated_batch_have_their_share():
    """By `num_items_in_batch` any means over labels add up to that over all of them."""
    pytest.importorskip("transformers")
    module = example("hugging_face")
    torch = module.torch
    labels = module.Counting().ids[:6].clone()
    labels[0, 4:] = -100
    logits = torch.randn(6, 12, 16, generator=torch.manual_seed(0), dtype=torch.float64)

    def mean_square(outputs, targets):
        return outputs.logits.square().sum(-1)[targets != -100].mean()

    loss, count, totals = module.loss_with(mean_square), (labels[:, 1:] != -100).sum(), []
    for parts in (1, 3):
        pairs = zip(logits.chunk(parts), labels.chunk(parts), strict=True)
        totals.append(sum(loss(SimpleNamespace(logits=f), y, count).item() for f, y in pairs))
    assert totals[1] == pytest.approx(totals[0], rel=1e-6)  # the share is in float32


def test_lightning():
    pytest.importorskip("lightning")
    traces = example("lightning_module").main(epochs=2)
    assert len(traces) == 2
    assert min(traces) > 0


def test_timms_utilities():
    pytest.importorskip("timm")
    module = example("timm_training")
    loss, average = module.main(steps=2)
    assert math.isfinite(loss)
    assert average(module.torch.randn(1, 3, 64, 64)).shape == (1, 4)


def test_checkpoints_of_someone_elses_run():
    traces = example("checkpoints").main()
    assert list(traces) == [f"epoch{i}.pt" for i in range(4)]
    assert min(traces.values()) > 0


def test_every_example_is_tested_and_runs_as_a_program():
    named = {file.stem for file in FOLDER.glob("*.py")}
    assert named == {"plain", "hugging_face", "lightning_module", "timm_training", "checkpoints"}
    ran = subprocess.run(
        [sys.executable, FOLDER / "checkpoints.py"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.count("(exact)") == 4
