"""Only the images that are asked for are decoded, and each once."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from hesstrace_cli.config import EstimateConfig, resolve
from hesstrace_cli.data import load_data
from hesstrace_cli.data.sources import Images
from tests.conftest import assert_one_line_error, invoke

SETTINGS = {"dataset": "imagefolder:images", "image_size": 8, "val_fraction": 0.0, "model": "mlp"}


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of 60 and 20 images; how often each is decoded."""
    g = torch.Generator().manual_seed(0)
    for number in range(80):
        file = tmp_path / "images" / ("train" if number < 60 else "val") / "ab"[number % 2]
        file.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (3, 9, 9), generator=g).byte()
        to_pil_image(pixels).save(file / f"{number}.png")
    decoded = Counter()
    own = Images.__getitem__

    def counted(folder, index):
        decoded[folder.samples[index][0]] += 1
        return own(folder, index)

    monkeypatch.setattr(Images, "__getitem__", counted)
    return decoded


def data(**changes):
    config = resolve(EstimateConfig, {**SETTINGS, **changes}, None)
    return load_data(config, torch.device("cpu"))


def test_a_look_decodes_a_batch_and_a_pass_everything_once(images):
    split = data().train
    images.clear()
    next(split.batches(2))
    assert sum(images.values()) == 2
    images.clear()
    batches = list(split.batches(25))
    again = list(split.batches(25))
    assert len(images) == 60
    assert sum(images.values()) <= 60 + 25  # the first batch was a look
    for (X, y), (X_again, y_again) in zip(batches, again, strict=True):
        assert torch.equal(X, X_again)
        assert torch.equal(y, y_again)


def test_a_subset_decodes_its_own(images):
    split = data().train
    images.clear()
    some = split.subset(torch.tensor([5, 3, 40]))
    for _ in range(4):
        ((X, y),) = some.batches(100)
    assert len(images) == 3
    assert sum(images.values()) == 3
    whole = torch.cat([X for X, _ in split.batches(7)])
    assert torch.equal(X, whole[[5, 3, 40]])
    assert torch.equal(y.cpu(), split.targets[[5, 3, 40]])
    held = split.subset(torch.tensor([5, 3, 40]))
    images.clear()
    assert torch.equal(next(held.batches(3))[0], X)
    assert not images


def test_repeated_looks_end_in_holding(images):
    split = data().train
    images.clear()
    for _ in range(50):
        next(split.batches(10))
    assert sum(images.values()) <= 2 * 60


def test_the_commands_decode_what_they_use(images, tmp_path):
    flags = ("--dataset", "imagefolder:images", "--image-size", "8", "--model", "mlp")
    small = ("--epochs", "1", "--val-fraction", "0", "--train-examples", "20", "--batch-size", "5")
    assert invoke("train", *flags, *small, "--out", "r").exit_code == 0
    assert len([file for file in images if "/train/" in file]) <= 20 + 1
    assert len([file for file in images if "/val/" in file]) == 20
    images.clear()
    result = invoke("estimate-trace", "r/last.pt", "--num-examples", "6", "--json", "-")
    assert json.loads(result.stdout)["num_examples"] == 6
    assert len(images) < 6 + 10


@pytest.mark.parametrize("file", ["train/a/18.png", "val/b/73.png"])
def test_an_image_that_cannot_be_read_is_named_before_training(images, tmp_path, file):
    (tmp_path / "images" / file).write_bytes(b"no image")
    flags = ("--dataset", "imagefolder:images", "--image-size", "8", "--model", "mlp")
    result = invoke("train", *flags, "--epochs", "1", "--out", "r")
    assert_one_line_error(result, 3, file)
    assert not (tmp_path / "r").exists()
