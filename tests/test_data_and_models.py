"""Splits, augmentation and the built-in models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from hesstrace_cli.config import TrainConfig
from hesstrace_cli.data import load_data, stratified_order
from hesstrace_cli.data.augment import crop_flip
from hesstrace_cli.data.splits import DatasetSplit, TensorSplit
from hesstrace_cli.errors import ModelError, Stopped
from hesstrace_cli.models import BUILT_IN, build_model
from tests.conftest import make_run, train_to_end

CPU = torch.device("cpu")


def test_the_first_examples_of_a_stratified_order_have_the_classes_shares():
    labels = torch.cat([torch.full((300,), 0), torch.full((100,), 1)])
    order = stratified_order(labels, seed=3)
    assert sorted(order.tolist()) == list(range(400))
    for size in (40, 100, 200):
        assert abs((labels[order[:size]] == 1).sum() - size / 4) <= 1
    assert torch.equal(order, stratified_order(labels, seed=3))
    assert not torch.equal(order, stratified_order(labels, seed=4))


def test_validation_examples_are_not_trained_on():
    data = load_data(TrainConfig(val_fraction=0.2), CPU)
    assert len(data.train) + len(data.val) == 1198
    assert len(data.test) == 599
    train = {tuple(x.tolist()) for x in data.train.inputs.flatten(1)}
    val = [tuple(x.tolist()) for x in data.val.inputs.flatten(1)]
    assert not train & set(val)
    assert load_data(TrainConfig(val_fraction=0), CPU).val is None
    same = load_data(TrainConfig(val_fraction=0.2, seed=5), CPU)
    assert torch.equal(same.train.targets, data.train.targets)


def test_crop_flip_shifts_and_mirrors():
    X = torch.arange(64.0).reshape(1, 1, 8, 8).expand(200, 1, 8, 8) + 1
    out = crop_flip(X, generator=torch.Generator().manual_seed(0), padding=1)
    assert out.shape == X.shape
    views = torch.nn.functional.pad(X[:1], [1] * 4).unfold(2, 8, 1).unfold(3, 8, 1)
    views = views.reshape(9, 8, 8)
    candidates = torch.cat([views, views.flip(2)])
    matches = (out.reshape(200, 1, 64) == candidates.reshape(1, 18, 64)).all(2)
    assert matches.any(1).all()
    assert matches.any(0).all()  # each of the 9 places, mirrored or not, comes up


@pytest.mark.parametrize("name", [n for n in BUILT_IN if n not in ("wrn-28-10", "lstm", "gpt")])
def test_built_in_models(name):
    model = build_model(name, num_classes=7, in_shape=(3, 32, 32), model_args={}, seed=1)
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    again = build_model(name, num_classes=7, in_shape=(3, 32, 32), model_args={}, seed=1)
    first, second = next(model.parameters()), next(again.parameters())
    assert torch.equal(first, second)


def test_files_read_by_workers_give_the_run_of_one_tensor(tmp_path):
    """The same weights to the bit from memory, from files, by workers, and resumed in mid-epoch."""
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        part = "train" if number < 30 else "test"
        file = tmp_path / "images" / part / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(torch.randint(0, 256, (3, 8, 8), generator=generator).byte()).save(file)
    settings = {
        "dataset": f"imagefolder:{tmp_path / 'images'}", "train_examples": None, "batch_size": 7,
        "augment": "crop-flip", "reg": "trace=0.01,mixup=0.2,cutout=2", "warmup": 0,
    }  # fmt: skip
    held = train_to_end(tmp_path / "held", image_size=8, **settings)
    assert isinstance(held.trainer.data.train, TensorSplit)
    for workers in (0, 2):
        run = train_to_end(tmp_path / f"workers-{workers}", num_workers=workers, **settings)
        assert isinstance(run.trainer.data.train, DatasetSplit)
        for name, tensor in held.trainer.model.state_dict().items():
            assert torch.equal(tensor, run.trainer.model.state_dict()[name])
    stopped = make_run(tmp_path / "stopped", num_workers=2, **settings)
    with pytest.raises(Stopped):
        list(stopped.advance(lambda: 15 if stopped.trainer.step == 3 else None))
    again = train_to_end(tmp_path / "stopped", num_workers=2, resume=True, **settings)
    for name, tensor in held.trainer.model.state_dict().items():
        assert torch.equal(tensor, again.trainer.model.state_dict()[name])


@pytest.mark.parametrize("side", [4, 8, 28, 32])
def test_even_pooling_is_adaptive_pooling(side):
    """Without adaptive pooling, whose backward on a GPU sums in no fixed order."""
    model = build_model("small-cnn", num_classes=3, in_shape=(1, side, side), model_args={}, seed=0)
    assert not any(isinstance(module, nn.AdaptiveAvgPool2d) for module in model.modules())
    adaptive = copy.deepcopy(model)
    (place,) = (i for i, module in enumerate(model) if isinstance(module, nn.AvgPool2d))
    adaptive[place] = nn.AdaptiveAvgPool2d(2)
    X = torch.randn(5, 1, side, side)
    outputs = [each(X) for each in (model, adaptive)]
    for output in outputs:
        output.square().sum().backward()
    pairs = [
        (p.grad, q.grad) for p, q in zip(model.parameters(), adaptive.parameters(), strict=True)
    ]
    for found, expected in [outputs, *pairs]:
        torch.testing.assert_close(found, expected)
        assert side == 28 or torch.equal(found, expected)  # 49 numbers, divided by 7 and 7 there
    assert [*model.state_dict()] == [*adaptive.state_dict()]


@pytest.mark.parametrize("shape", [(5, 5), (6, 8), (7, 4)])
def test_uneven_pooling_is_adaptive(shape):
    model = build_model("small-cnn", num_classes=3, in_shape=(1, *shape), model_args={}, seed=0)
    even = all(side // 2 % 2 == 0 for side in shape)
    assert any(isinstance(m, nn.AdaptiveAvgPool2d) for m in model.modules()) == (not even)
    assert model(torch.randn(2, 1, *shape)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "argument", "value", "words"),
    [
        ("gpt", "heads", 0, "its heads is 0, expected a whole number, at least 1"),
        ("lstm", "layers", -1, "at least 1"),
        ("mlp", "width", 2.5, "its width is 2.5, expected a whole number"),
        ("small-cnn", "width", True, "expected a whole number"),
        ("wrn-16-4", "depth", -2, "at least 0"),
        ("lstm", "dropout", "half", "its dropout is 'half', expected a number"),
        ("lstm", "tied", "maybe", "expected true or false"),
        ("gpt", "activation", 3, "expected a name"),
        ("lstm", "wdth", 4, "did you mean 'width'. It takes width, layers, dropout, tied"),
        ("resnet18", "width", 4, "It takes none"),
    ],
)
def test_arguments_that_a_built_in_model_does_not_take(name, argument, value, words):
    with pytest.raises(ModelError, match=words):
        build_model(name, num_classes=3, in_shape=(4,), model_args={argument: value}, seed=0)


def test_no_hidden_layer_and_a_whole_number_for_another():
    build_model("mlp", num_classes=3, in_shape=(4,), model_args={"depth": 0}, seed=0)
    build_model("lstm", num_classes=3, in_shape=(4,), model_args={"dropout": 0}, seed=0)
