"""What is measured is measured in full precision, and every setting is left as it was."""

from __future__ import annotations

import os

import pytest
import torch

from hesstrace_cli.autodiff.precision import deterministic_algorithms, full_precision
from hesstrace_cli.plugins import load_factory
from tests.conftest import assert_one_line_error, invoke

BACKENDS = torch.backends


def settings():
    """All that can be asked, as text; some contradict each other, which PyTorch then says."""

    def asked(get):
        try:
            return str(get())
        except RuntimeError:
            return "contradictory"

    return {
        "convolutions": asked(lambda: BACKENDS.cudnn.conv.fp32_precision),
        "recurrent": asked(lambda: BACKENDS.cudnn.rnn.fp32_precision),
        "products": asked(lambda: BACKENDS.cuda.matmul.fp32_precision),
        "cudnn.allow_tf32": asked(lambda: BACKENDS.cudnn.allow_tf32),
        "matmul.allow_tf32": asked(lambda: BACKENDS.cuda.matmul.allow_tf32),
        "matmul precision": asked(torch.get_float32_matmul_precision),
        "all": asked(lambda: BACKENDS.fp32_precision),
        "all of cudnn": asked(lambda: BACKENDS.cudnn.fp32_precision),
    }


CASES = {
    "default": lambda: None,
    "allow_tf32 off": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "convolutions exact": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "products in tf32": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "matmul.allow_tf32": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "all in tf32": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "all of cudnn in tf32": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "all exact": lambda: setattr(BACKENDS, "fp32_precision", "ieee"),
}


@pytest.mark.parametrize("name", CASES)
def test_settings(name):
    """In a process of its own, as PyTorch's settings cannot all be taken back."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    try:
        CASES[name]()
        before = settings()
        with full_precision():
            inside = settings()
            assert {inside[k] for k in ("convolutions", "recurrent", "products")} == {"ieee"}
            with full_precision():
                assert settings() == inside
            assert settings() == inside
            if name in ("default", "high", "medium", "matmul.allow_tf32"):
                assert inside["cudnn.allow_tf32"] == inside["matmul.allow_tf32"] == "False"
                with torch.backends.cudnn.flags(enabled=False):  # a user's model may do that
                    pass
                assert settings()["convolutions"] != "tf32"
        assert settings() == before
        with pytest.raises(ValueError), full_precision():  # noqa: PT011
            raise ValueError
        assert settings() == before
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


MODEL = """
import torch
from torch import nn

class Noting(nn.Module):
    seen = []

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10))

    def forward(self, X):
        where = "training" if self.training else "evaluation"
        self.seen.append((where, X.dtype, torch.backends.cudnn.conv.fp32_precision))
        return self.net(X)
"""


def test_commands_measure_in_full_precision_and_train_as_set(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    spec = f"{tmp_path / 'model.py'}:Noting"
    seen = load_factory(spec, ValueError).seen

    def precisions(*words):
        seen.clear()
        result = invoke(*words, "--model", spec, "--device", "cpu")
        assert result.exit_code == 0, result.output
        return seen

    trained = precisions("train", "--epochs", 1, "--train-examples", 60, "--out", tmp_path / "run",
                         "--reg", "trace", "--monitor-trace", 1, "--top-eigenvalue")  # fmt: skip
    steps = [p for where, dtype, p in trained if where == "training" and dtype == torch.float32]
    assert steps.count("tf32") >= 2  # what is checked of the derivatives before is measured too
    assert trained[-1][2] == "ieee"
    last, few = tmp_path / "run" / "last.pt", ["--num-examples", 20]
    assert {p for *_, p in precisions("estimate-trace", last, *few)} == {"ieee"}
    steps = ["--steps", 3, "--top", 1, "--num-probes", 1, "--num-directions", 1]
    assert {p for *_, p in precisions("spectrum", last, *few, *steps)} == {"ieee"}
    checked = [p for _, dtype, p in precisions("verify") if dtype == torch.float64]
    assert checked.count("ieee") > 0.9 * len(checked)  # all but the first looks at the model
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_deterministic_algorithms(mode):
    try:
        torch.set_deterministic_debug_mode(mode)
        before = torch.get_deterministic_debug_mode()
        with deterministic_algorithms(torch.device("cuda")):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_deterministic_debug_mode() == max(1, before)
            assert not torch.utils.deterministic.fill_uninitialized_memory
        assert torch.get_deterministic_debug_mode() == before
        assert torch.utils.deterministic.fill_uninitialized_memory
        with deterministic_algorithms(torch.device("cpu")):
            assert torch.get_deterministic_debug_mode() == before
    finally:
        torch.set_deterministic_debug_mode("default")


LACKING = """
import torch
from torch import nn

class Lacking(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer, self.norm = nn.Linear(64, num_classes), nn.BatchNorm1d(num_classes)

    def forward(self, X):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("there is no such kernel")
        return self.norm(self.layer(X.flatten(1)))
"""


def test_a_device_that_lacks_an_operation_in_half_precision(tmp_path):
    (tmp_path / "lacking.py").write_text(LACKING)
    model = ["--model", "lacking.py:Lacking", "--device", "cpu", "--out", "r"]
    result = invoke("train", *model, "--precision", "fp16")
    words = (
        "--precision fp16: model 'lacking.py:Lacking' does not run in it on cpu",
        "no such kernel",
    )
    assert_one_line_error(result, 2, *words)
