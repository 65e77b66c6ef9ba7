"""`hesstrace spectrum` on a trained checkpoint, against its dense Hessian."""

from __future__ import annotations

import json

import pytest
import torch

from hesstrace_cli.analysis.loading import load_checkpoint
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.config import SpectrumConfig
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.flatness import Landscape, average_sharpness
from hesstrace_cli.curvature.matrix import CurvatureMatrix
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.spectrum.lanczos import Krylov, extreme_eigenvalues
from hesstrace_cli.randomness import stream_generator
from tests.conftest import invoke, train_to_end
from tests.curvature import oracles


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("spectrum") / "r"
    settings = {"model_arg": {"width": 4, "depth": 1}, "image_size": 4, "epochs": 20}
    return train_to_end(out, model="mlp", **settings).folder.last


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_record_is_that_of_the_dense_matrix(checkpoint, curvature):
    flags = ("--top", "4", "--num-probes", "30", "--dtype", "float64", "--curvature", curvature)
    result = invoke("spectrum", checkpoint, *flags, "--batch-size", "50", "--json", "-")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["schema"] == "hesstrace/spectrum/1"
    loaded = load_checkpoint(str(checkpoint), SpectrumConfig(dtype="float64"))
    objective = Objective(loaded.model, trainable(loaded.model))
    X, y = next(loaded.split.batches(len(loaded.split)))
    dense = (
        oracles.dense_hessian(objective, X, y)
        if curvature == "hessian"
        else oracles.dense_ggn(objective, X)
    )
    eigenvalues = torch.linalg.eigvalsh(dense)
    largest = eigenvalues.flip(0)[:4].tolist()
    for value, truth, residual in zip(
        record["eigenvalues"], largest, record["residuals"], strict=True
    ):
        assert value == pytest.approx(truth, abs=residual + 1e-9)
    assert record["smallest"] == pytest.approx(
        eigenvalues[0].item(), abs=record["smallest_residual"] + 1e-9
    )
    assert abs(record["trace"] - dense.trace().item()) < 4 * record["trace_stderr"]
    norm = torch.linalg.matrix_norm(dense).item()
    assert abs(record["frobenius_norm"] - norm) < 4 * record["frobenius_norm_stderr"]
    assert record["trace_stderr"] < 0.2 * dense.trace()
    assert record["frobenius_norm_stderr"] < 0.2 * norm
    dimension = dense.trace().item() ** 2 / norm**2
    assert record["effective_dimension"] == pytest.approx(dimension, rel=0.3)
    low, high = record["negative_share_bounds"]
    assert low - 0.05 <= (eigenvalues < 0).double().mean() <= high + 0.05
    assert record["bulk_edge"] == pytest.approx(eigenvalues.quantile(0.99).item(), rel=0.3)
    flatness = record["flatness"]
    landscape = Landscape(DataLoss.counted(objective, lambda: [(X, y)]))
    for name, normalized in (("plain", False), ("filter_normalized", True)):
        average = average_sharpness(
            landscape, radius=flatness["radius"], normalized=normalized,
            num_directions=flatness["num_directions"],
            generator=stream_generator(record["seed"], torch.device("cpu"), "directions"),
        )  # fmt: skip
        assert flatness[name]["average"] == pytest.approx(average.value, rel=1e-6)
    stability = record["stability"]
    assert (stability["lr"], stability["momentum"]) == (0.05, 0.9)  # the run's
    assert stability["threshold"] == pytest.approx(2 * 1.9 / 0.05)


def test_table_plot_and_a_learning_rate_to_judge(checkpoint, tmp_path):
    flags = ("--lr", "10", "--momentum", "0", "--plot", tmp_path / "d.png")
    result = invoke("spectrum", checkpoint, *flags)
    assert result.exit_code == 0, result.output
    assert "not linearly stable" in result.stderr
    assert "Frobenius" in result.stdout
    assert (tmp_path / "d.png").stat().st_size > 1000
    wrong = invoke("spectrum", checkpoint, "--plot", tmp_path / "d.xyz")
    assert wrong.exit_code == 2
    assert invoke("spectrum", tmp_path / "no.pt").exit_code == 4


def test_flatness_and_slices_of_two_checkpoints(checkpoint, tmp_path):
    first = checkpoint.parent / "best.pt"
    flags = ("--slice", "2", "--slice-points", "5", "--top", "2", "--num-probes", "1")
    result = invoke(
        "spectrum", checkpoint, first, *flags, "--plot", tmp_path / "s.png",
        "--json", tmp_path / "s.json", "--nesterov",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Nesterov" in result.stdout
    assert (tmp_path / "s.png").stat().st_size > 1000
    several = json.loads((tmp_path / "s.json").read_text())
    assert several["schema"] == "hesstrace/spectra/1"
    record = several["spectra"][0]
    assert record["slice"]["grid"] == [-1, -0.5, 0, 0.5, 1]
    assert record["slice"]["losses"][2][2] == pytest.approx(record["loss"], rel=1e-5)
    for kind in ("plain", "filter_normalized"):
        own = record["flatness"][kind]
        assert own["worst"] > own["average"] + own["average_stderr"]
    line = invoke("spectrum", checkpoint, "--slice", "1", "--plot", tmp_path / "l.svg")
    assert line.exit_code == 0, line.output
    assert invoke("spectrum", checkpoint, "--slice", "1").exit_code == 2
    even = invoke("spectrum", checkpoint, "--slice", "1", "--slice-points", "4", "--json", "-")
    assert even.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weight_decay": 0.01}, {"weight_decay": 0.01, "momentum": 0.9, "nesterov": False}),
        (
            {"nesterov": True, "momentum": 0.5},
            {"momentum": 0.5, "nesterov": True},
        ),
        ({"optimizer": "adamw", "lr": 0.001}, None),
    ],
)
def test_the_stability_is_that_of_the_run(tmp_path, settings, expected):
    small = {"model_arg": {"width": 4, "depth": 1}, "image_size": 4, "epochs": 1}
    run = train_to_end(tmp_path / "r", model="mlp", **small, **settings)
    flags = ("--top", "1", "--num-probes", "1", "--steps", "10", "--json", "-")
    record = json.loads(invoke("spectrum", run.folder.last, *flags).stdout)
    if expected is None:
        assert record["stability"] is None
        return
    assert {key: record["stability"][key] for key in expected} == expected
    assert "the run's initial learning rate" in record["stability"]["sentence"]


def test_a_flat_checkpoint_and_one_that_is_none(tmp_path, checkpoint):
    content = torch.load(checkpoint)
    for tensor in content["state_dict"].values():
        tensor.mul_(1e4)
    torch.save(content, tmp_path / "flat.pt")
    (tmp_path / "none.pt").write_text("nothing")
    flags = ("--plot", tmp_path / "p.png", "--json", tmp_path / "j.json")
    result = invoke("spectrum", tmp_path / "flat.pt", tmp_path / "none.pt", *flags)
    assert result.exit_code == 4
    assert "none.pt" in result.stderr
    records = json.loads((tmp_path / "j.json").read_text())["spectra"]
    assert len(records) == 1
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_doubts_are_said(checkpoint):
    result = invoke("spectrum", checkpoint, "--max-products", "3", "--steps", "3", "--top", "5")
    assert "--max-products raises" in result.stderr
    assert "3 of --top 5 eigenvalues" in result.stderr


def test_the_running_statistics_are_used_and_the_products_counted(tmp_path):
    run = train_to_end(tmp_path / "r", model_arg={"width": 4})  # with BatchNorm
    summary = run.finish()
    flags = ("--top", "1", "--num-probes", "3", "--steps", "6", "--json", "-", "--dtype", "float64")
    record = json.loads(invoke("spectrum", run.folder.last, *flags).stdout)
    assert record["loss"] == pytest.approx(summary["train_loss"], rel=1e-5)
    assert record["products"] >= 18
    loaded = load_checkpoint(str(run.folder.last), SpectrumConfig(dtype="float64"))
    objective = Objective(loaded.model.eval(), trainable(loaded.model))
    split = loaded.split
    matrix = CurvatureMatrix(DataLoss.counted(objective, lambda: split.batches(100)), "hessian")
    start = torch.ones(matrix.size, dtype=torch.float64)
    top = extreme_eigenvalues(Krylov(matrix, start), k=1, rtol=1e-4).largest[0]
    assert record["eigenvalues"][0] == pytest.approx(top, rel=1e-3)
