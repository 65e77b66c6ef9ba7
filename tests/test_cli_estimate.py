"""`hesstrace estimate-trace` on checkpoints of every kind: records, tables, plots and errors."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from torchvision.transforms.v2.functional import to_pil_image

from tests.conftest import assert_one_line_error, invoke


def test_wrong_checkpoints(tmp_path, checkpoint):
    whole = checkpoint.read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"state_dict": torch.nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    for name in ("half.pt", "text.pt", "pickled.pt", "missing.pt"):
        assert_one_line_error(invoke("estimate-trace", tmp_path / name), 4, name)
    other = invoke("estimate-trace", checkpoint, "--model", "mlp")
    assert_one_line_error(other, 4, "missing", "layers.1.weight", "unexpected")
    assert_one_line_error(invoke("train", "--model", "no-such"), 4, "no-such")
    assert_one_line_error(invoke("train", "--model", "no.py:f"), 4, "no.py")


@pytest.mark.parametrize("method", ["hutchinson", "dropout", "hutch++", "xtrace"])
def test_estimate_trace_json(checkpoint, method):
    flags = ["--method", method, "--num-probes", "6"]
    arguments = ("estimate-trace", checkpoint, "--json", "-", "--per-layer", *flags)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    expected = {
        "schema", "trace", "stderr", "ci95", "curvature", "method", "num_probes", "num_examples",
        "num_parameters", "loss", "accuracy", "per_layer", "checkpoint", "model", "dataset",
        "split", "dtype", "device", "seed", "seconds", "versions",
    }  # fmt: skip
    assert expected <= set(record)
    assert record["ci95"][0] < record["trace"] < record["ci95"][1]
    assert sum(x["trace"] for x in record["per_layer"]) == pytest.approx(record["trace"], rel=1e-5)
    assert record["method"] == method
    again = json.loads(invoke(*arguments).stdout)
    assert again["trace"] == record["trace"]


def test_estimate_trace_is_exact_for_the_built_in_network(checkpoint):
    """One figure whatever the batch size, dtype and seed; the table says how it was made."""
    records = [
        json.loads(invoke("estimate-trace", checkpoint, "--json", "-", *flags).stdout)
        for flags in (
            ["--dtype", "float64"],
            ["--dtype", "float64", "--batch-size", "7", "--seed", "5", "--method", "exact"],
            ["--curvature", "ggn"],
        )
    ]
    for record in records:
        assert (record["method"], record["stderr"], record["passes"]) == ("exact", 0, 1)
        assert record["ci95"] == [record["trace"], record["trace"]]
    assert records[0]["trace"] == pytest.approx(records[1]["trace"], rel=1e-12)
    assert records[0]["trace"] == pytest.approx(records[2]["trace"], rel=1e-4)
    shown = invoke("estimate-trace", checkpoint)
    assert "(exact)" in shown.stdout
    assert "piecewise linear" in shown.stderr


def test_exact_where_it_is_not_possible(tmp_path):
    flags = ("--model", "mlp", "--model-arg", "activation=gelu", "--epochs", "1")
    assert (
        invoke("train", *flags, "--train-examples", "100", "--out", tmp_path / "r").exit_code == 0
    )
    last = tmp_path / "r" / "last.pt"
    assert_one_line_error(invoke("estimate-trace", last, "--method", "exact"), 2, "Gelu", "ggn")
    ggn = invoke("estimate-trace", last, "--method", "exact", "--curvature", "ggn", "--json", "-")
    assert json.loads(ggn.stdout)["stderr"] == 0
    auto = invoke("estimate-trace", last, "--json", "-", "--rtol", "0.02")
    record = json.loads(auto.stdout)
    assert record["method"] == "exact+hutchinson"
    assert record["stderr"] > 0
    plain = ("--method", "hutchinson", "--rtol", "0.02", "--max-passes", "500")
    other = json.loads(invoke("estimate-trace", last, "--json", "-", *plain).stdout)
    error = (record["stderr"] ** 2 + other["stderr"] ** 2) ** 0.5
    assert abs(record["trace"] - other["trace"]) < 4 * error


def test_a_subset_has_an_error_of_its_own(checkpoint):
    arguments = ("estimate-trace", checkpoint, "--json", "-", "--num-examples")
    part = json.loads(invoke(*arguments, "40").stdout)
    whole = json.loads(invoke(*arguments, "100000").stdout)
    assert whole["subset_stderr"] == 0
    assert part["stderr"] == 0
    assert abs(part["trace"] - whole["trace"]) < 4 * part["subset_stderr"]


def test_estimate_trace_draws(checkpoint, tmp_path):
    for name, paths in (("layers.png", [checkpoint]), ("epochs.pdf", [checkpoint] * 2)):
        result = invoke("estimate-trace", *paths, "--plot", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).stat().st_size > 1000
    wrong = invoke("estimate-trace", checkpoint, "--plot", tmp_path / "layers.nonsense")
    assert wrong.exit_code == 2
    assert "layers.nonsense" in wrong.stderr.splitlines()[-1]


def test_estimate_trace_single_probe_has_no_error_bar(checkpoint):
    arguments = ("--json", "-", "--num-probes", "1", "--method", "hutchinson")
    record = json.loads(invoke("estimate-trace", checkpoint, *arguments).stdout)
    assert record["stderr"] is None
    assert record["ci95"] is None


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "dropout"],
        ["--method", "dropout", "--dropout-scheme", "entry", "--keep-prob", "0.5"],
        ["--method", "hutchinson"],
        ["--method", "hutchinson", "--curvature", "ggn"],
        ["--method", "xtrace"],
        ["--method", "hutch++", "--curvature", "ggn"],
    ],
)
def test_estimate_trace_methods_agree(checkpoint, flags):
    base = json.loads(invoke("estimate-trace", checkpoint, "--json", "-").stdout)
    other = json.loads(
        invoke("estimate-trace", checkpoint, "--json", "-", "--rtol", "0.2", *flags).stdout
    )
    # A ReLU network in eval mode: tr(H) = tr(G).
    error = (base["stderr"] ** 2 + other["stderr"] ** 2) ** 0.5
    assert abs(base["trace"] - other["trace"]) < 4 * error


def test_several_checkpoints(checkpoint):
    paths = (checkpoint, checkpoint.with_name("best.pt"))
    result = invoke("estimate-trace", *paths, "--json", "-", "--num-probes", "2")
    assert json.loads(result.stdout)["schema"] == "hesstrace/traces/1"


def test_a_torchvision_model_on_image_folders(tmp_path):
    """1,000 classes, a bare state dict in half precision, images of several sizes."""
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        file = tmp_path / "images" / ("train" if number < 9 else "val") / "ab"[number % 2]
        file.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (3, 40 + number, 50), generator=generator).byte()
        to_pil_image(pixels).save(file / f"{number}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.resnet18()
    torch.save(model.half().state_dict(), tmp_path / "bare.pth")
    arguments = (
        "estimate-trace", tmp_path / "bare.pth", "--model", "torchvision:resnet18", "--dataset",
        f"imagefolder:{tmp_path / 'images'}", "--image-size", "32", "--num-classes", "1000",
        "--val-fraction", "0", "--num-probes", "2", "--json", "-",
    )  # fmt: skip
    record = json.loads(invoke(*arguments, "--max-passes", "1").stdout)
    assert record["method"] == "signs"
    assert record["num_parameters"] == 11_689_512
    assert record["num_examples"] == 9
    assert record["stderr"] < record["trace"] / 2


def test_json_through_a_link_and_to_places_that_cannot_be(checkpoint, tmp_path):
    (tmp_path / "real.json").write_text("")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert invoke("estimate-trace", checkpoint, "--json", tmp_path / "link.json").exit_code == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["schema"] == "hesstrace/trace/1"
    for place in (tmp_path, tmp_path / "no" / "x.json", tmp_path / "real.json" / "x.json"):
        result = invoke("estimate-trace", checkpoint, "--json", place)
        assert_one_line_error(result, 2, "cannot be written")


def test_stopping_rules_hold_beside_num_probes(checkpoint):
    flags = ("--method", "hutchinson", "--num-probes", "2", "--json", "-")
    one = json.loads(invoke("estimate-trace", checkpoint, *flags).stdout)
    four = json.loads(
        invoke("estimate-trace", checkpoint, *flags, "--max-passes", "4", "--rtol", "0").stdout
    )
    wide = json.loads(invoke("estimate-trace", checkpoint, *flags, "--atol", "1e6").stdout)
    assert (one["passes"], four["passes"]) == (1, 4)
    assert wide["ci95"][1] - wide["ci95"][0] <= 2e6


def test_one_bad_checkpoint_among_several_hides_no_other(checkpoint, tmp_path):
    file = tmp_path / "t.json"
    result = invoke("estimate-trace", checkpoint, tmp_path / "no.pt", "--json", file)
    assert result.exit_code == 4
    assert "last.pt" in result.stdout
    assert "no.pt" in result.stderr
    traces = json.loads(file.read_text())["traces"]
    assert [t["checkpoint"] for t in traces] == [str(checkpoint)]
